"""Who may ask, and how often.

Here        Access: the key of a request to its caller, and the caller's rate.
Elsewhere   the settings (settings.py); what is answered otherwise (app.py).
Promise     how long looking at a key takes says nothing of the keys that are known. Keys are held as sums.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import NamedTuple

from dougong.serve.settings import KeyConfig


class Caller(NamedTuple):
    """Who asks."""

    name: str
    admin: bool


class _Bucket:
    __slots__ = ("at", "left")

    def __init__(self, left: float, at: float) -> None:
        self.left = left
        self.at = at


class Access:
    """The callers that are known."""

    def __init__(self, keys: Sequence[KeyConfig]) -> None:
        self._keys = [(key.sha256.encode(), key) for key in keys]
        self._buckets = {key.name: _Bucket(key.burst, 0.0) for key in keys}

    @property
    def open(self) -> bool:
        """Whether nobody needs a key."""
        return not self._keys

    def caller(self, key: bytes | None, address: str) -> Caller | None:
        """Who this is; None where the key is missing or unknown. Without keys, callers are their addresses."""
        if not self._keys:
            return Caller(address, admin=True)  # only this machine can reach a server without keys
        given = hashlib.sha256(key or b"").hexdigest().encode()
        found = None
        for known, config in self._keys:  # all of them, whichever fits
            if hmac.compare_digest(known, given):
                found = config
        return None if found is None or key is None else Caller(found.name, found.admin)

    def wait_seconds(self, caller: Caller, now: float) -> float:
        """0 if this caller may ask now, and has then done so; else seconds until it may. A bucket of tokens."""
        if not self._keys:
            return 0.0
        bucket = self._buckets.get(caller.name)
        config = next((config for _, config in self._keys if config.name == caller.name), None)
        if bucket is None or config is None or config.per_second is None:
            return 0.0
        bucket.left = min(config.burst, bucket.left + (now - bucket.at) * config.per_second)
        bucket.at = now
        if bucket.left < 1:
            return (1 - bucket.left) / config.per_second
        bucket.left -= 1
        return 0.0


def key_of(authorization: bytes | None, api_key: bytes | None) -> bytes | None:
    """From `Authorization: Bearer KEY` or `X-Api-Key: KEY`."""
    if api_key:
        return api_key
    if authorization and authorization[:7].lower() == b"bearer ":
        return authorization[7:].strip()
    return None
