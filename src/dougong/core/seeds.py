"""One seed for a run, and independent ones for everything in it.

Here        `derive_seed`: a number for a purpose, from the run's seed and the purpose's name.
Elsewhere   the random states of a tensor library (saved with a checkpoint, above).
Promise     the same root and names give the same number on every machine and Python version; adding a new
            purpose changes no other one's numbers.
"""

import hashlib


def derive_seed(root: int, *names: str | int) -> int:
    """A seed below 2**63 for the purpose that `names` spell, e.g. `derive_seed(0, "order", epoch)`."""
    text = "\x1f".join([str(root), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
