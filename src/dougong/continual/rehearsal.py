"""Some records of what was learnt, kept for learning it again: bounded, and unreadable on the disk.

Here        RehearsalStore, `read_key`.
Elsewhere   when they are learnt again (continual/learn.py); without a store, none is ever kept.
Promise     what lies on the disk is encrypted and cannot be changed unnoticed; no more bytes than allowed; which
            records stay follows from the seed, each that was offered with the same chance.
"""

from __future__ import annotations

import base64
import io
import os
import struct
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dougong.core.errors import ConfigError, DataError
from dougong.core.files import inside, write_atomic
from dougong.core.seeds import derive_seed

KEY_VARIABLE: Final = "DOUGONG_REHEARSAL_KEY"
_HEAD: Final = b"DGRH1"
_NONCE: Final = 12


def read_key(file: Path | None) -> bytes:
    """32 bytes, in base64 in a file (made where it is not there, for its owner alone), or in DOUGONG_REHEARSAL_KEY.

    Raises:
        ConfigError: there is neither, or it is no key.
    """
    if file is None:
        text = os.environ.get(KEY_VARIABLE)
        if text is None:
            raise ConfigError(f"--rehearsal needs a key. Give --key FILE (made if it is not there), or {KEY_VARIABLE}.")
    else:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(handle, "wb") as opened:
                opened.write(base64.b64encode(os.urandom(32)))
        text = file.read_text(encoding="ascii", errors="replace")
    try:
        key = base64.b64decode(text.strip(), validate=True)
    except ValueError:
        key = b""
    if len(key) != 32:
        raise ConfigError(f"{file or KEY_VARIABLE} is no key: it must be 32 bytes in base64. Name a new file for one.")
    return key


class RehearsalStore:
    """A folder with one file a task: parts of records, encrypted by AES-256-GCM."""

    def __init__(self, folder: Path, key: bytes, *, most_bytes: int = 64 * 2**20, seed: int = 0) -> None:
        """`most_bytes` is of each task's file.

        Raises:
            ConfigError: the library for it is not installed.
        """
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError:
            raise ConfigError("a rehearsal store is encrypted by what is not installed: dougong[continual].") from None
        self._cipher = AESGCM(key)
        self._folder, self._most_bytes, self._seed = folder, most_bytes, seed

    def records(self, task: str) -> pa.Table | None:
        """What is kept of a task; None where nothing is.

        Raises:
            DataError: the file was altered, or is of another key.
        """
        found = self._read(task)
        return None if found is None else found[0]

    def offer(self, task: str, rows: pa.Table) -> int:
        """Keep an even choice of all that was ever offered; returns how many are kept.

        A reservoir (Vitter 1985): each record ever offered has the same chance, whenever it came.

        Raises:
            DataError: the file was altered, is of another key, or has other columns.
        """
        found = self._read(task)
        kept, offered = (None, 0) if found is None else found
        if kept is not None and not kept.schema.equals(rows.schema):
            raise DataError(
                f"task {task!r} has records with other columns in its rehearsal store. Use another store for these."
            )
        random = np.random.default_rng(derive_seed(self._seed, "rehearsal", task, offered))
        room = rows.num_rows + offered if kept is None else max(kept.num_rows, 1)
        full = kept is not None and kept.num_rows < offered
        places = list(range(0 if kept is None else kept.num_rows))
        everything = rows if kept is None else pa.concat_tables([kept, rows])
        first_new = len(places)
        for number in range(rows.num_rows):
            if not full:
                places.append(first_new + number)
                continue
            drawn = int(random.integers(offered + number + 1))
            if drawn < room:
                places[drawn] = first_new + number
        chosen = everything.take(pa.array(places, pa.int64()))
        while True:
            content = self._sealed(task, chosen, offered + rows.num_rows)
            if len(content) <= self._most_bytes or chosen.num_rows == 0:
                break
            fewer = int(chosen.num_rows * min(0.9, self._most_bytes / len(content)))
            order = np.sort(random.permutation(chosen.num_rows)[:fewer])
            chosen = chosen.take(pa.array(order, pa.int64()))
        write_atomic(self._file(task), content)
        return int(chosen.num_rows)

    def forget(self, task: str) -> None:
        """Keep nothing of a task any more."""
        self._file(task).unlink(missing_ok=True)

    def _file(self, task: str) -> Path:
        found = inside(self._folder, f"{task}.rehearsal")
        if found is None:
            raise ConfigError(f"{task!r} cannot name a file. Use letters, digits, '.', '_' and '-'.")
        return found

    def _sealed(self, task: str, rows: pa.Table, offered: int) -> bytes:
        plain = io.BytesIO()
        plain.write(struct.pack("<Q", offered))
        pq.write_table(rows, plain, compression="zstd")
        nonce = os.urandom(_NONCE)
        # The task's name is sealed too: one task's file cannot stand in for another's.
        return b"".join([_HEAD, nonce, self._cipher.encrypt(nonce, plain.getvalue(), _HEAD + task.encode())])

    def _read(self, task: str) -> tuple[pa.Table, int] | None:
        from cryptography.exceptions import InvalidTag

        file = self._file(task)
        if not file.is_file():
            return None
        content = file.read_bytes()
        try:
            if not content.startswith(_HEAD):
                raise InvalidTag
            nonce = content[len(_HEAD) : len(_HEAD) + _NONCE]
            plain = self._cipher.decrypt(nonce, content[len(_HEAD) + _NONCE :], _HEAD + task.encode())
        except (InvalidTag, ValueError):
            raise DataError(
                f"{file} cannot be opened: the key is another one, or the file was altered. Give the key it was made "
                "with, or remove it to begin anew."
            ) from None
        (offered,) = struct.unpack("<Q", plain[:8])
        return pq.read_table(io.BytesIO(plain[8:])), int(offered)
