"""The mistakes that a user can mend.

Here        one class per kind of mistake; each message is one line: what was given, why it fails, what would work.
Elsewhere   turning them into an exit status (the command line, above).
Promise     whatever is not a DougongError is our bug and keeps its traceback.
"""


class DougongError(Exception):
    """The user can mend it."""


class ConfigError(DougongError):
    """A setting that makes no sense, alone or beside another."""


class DataError(DougongError):
    """A table, a column or too many records that cannot be used."""


class BundleError(DougongError):
    """A folder that is not a whole, unaltered bundle."""


class CheckpointError(DougongError):
    """A run that cannot be continued from what is on the disk."""


class RunError(DougongError):
    """A run folder that is in the way, or is not one."""


class RankError(DougongError):
    """Another process that trains the same model is gone, or hangs. Launching the run again goes on with it."""
