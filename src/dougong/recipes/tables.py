"""The tables that a recipe speaks of, opened and split.

Here        Tables, open_tables, judged_views.
Elsewhere   preparing collections (data/sources/); splitting by unit (data/split.py).
Promise     the test table is never split from, learnt from or looked at before the end.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dougong.core.errors import ConfigError
from dougong.data.columns import ColumnRole, infer_roles
from dougong.data.modality.medium import media_key
from dougong.data.sources.captions import prepare_captions
from dougong.data.sources.digits import prepare_digits
from dougong.data.sources.easy_vqa import prepare_easy_vqa
from dougong.data.split import split_table
from dougong.data.table import Table, open_table
from dougong.recipes.recipe import DataConfig

Announce = Callable[[str, int, int], None]


class Tables(NamedTuple):
    """What a run reads."""

    train: Table
    validation: Table
    test: Table
    test_is_validation: bool
    roles: dict[str, ColumnRole]
    target: str
    unit: str | None
    """The column whose values are never on two sides of a split: what is resampled whole in an interval."""

    notes: tuple[str, ...]
    """What a reader of the figures must know."""


def cache_folder() -> Path:
    """Where prepared collections are kept: $DOUGONG_HOME, or the user's cache."""
    home = os.environ.get("DOUGONG_HOME")
    return Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dougong"


def open_tables(data: DataConfig, *, seed: int, announce: Announce | None = None) -> Tables:
    """Open, infer the columns' roles, and hold out what is missing of validation and test.

    Raises:
        ConfigError: no training table is named.
        DataError: a table cannot be used.
    """
    train_path, validation_path, test_path, notes = _locate(data, announce)
    train = open_table(train_path)
    roles = infer_roles(train, target=data.target, named=data.columns)
    target = next(name for name, found in roles.items() if found.role == "target")
    unit = data.unit or _shared_medium(train, roles)
    if validation_path is not None:
        validation = open_table(validation_path)
    else:
        train, validation = split_table(train, data.validation_share, unit=unit, seed=seed)
        by = f"by {unit}" if unit else "by record"
        notes = (*notes, f"{validation.num_rows} validation records were held out of the training table, {by}")
    test = open_table(test_path) if test_path is not None else validation
    if test_path is None:
        notes = (
            *notes,
            "no test table was given: the figures are of the validation records, which chose the checkpoint",
        )
    for other in (validation, test):
        missing = [name for name, found in roles.items() if found.role != "ignore" and name not in other.schema.names]
        if missing:
            raise ConfigError(f"{other.path.name} lacks the column {missing[0]!r} of {train.path.name}.")
    return Tables(train, validation, test, test_path is None, roles, target, unit, notes)


def _locate(data: DataConfig, announce: Announce | None) -> tuple[Path, Path | None, Path | None, tuple[str, ...]]:
    if data.source == "easy-vqa":
        folder = Path(data.folder) if data.folder else cache_folder() / "easy-vqa"
        prepare_easy_vqa(folder, announce=announce)
        drawn, spoken = "easy-VQA: generated pictures and questions", "the spoken questions are synthetic (espeak-ng)"
        return folder / "train.parquet", None, folder / "test.parquet", (drawn, spoken)
    if data.source == "captions":
        folder = prepare_captions(Path(data.folder) if data.folder else cache_folder() / "captions")
        made = "easy-VQA: generated pictures; captions are made of what its questions and answers prove"
        return folder / "train.parquet", None, folder / "test.parquet", (made,)
    if data.source == "digits":
        if data.folder is None:
            raise ConfigError("source digits needs data.folder: the recordings of the Free Spoken Digit Dataset.")
        folder = cache_folder() / "digits"
        prepare_digits(Path(data.folder), folder)
        apart = "validation and test are one speaker each, unheard in training"
        return folder / "train.parquet", folder / "validation.parquet", folder / "test.parquet", (apart,)
    if data.train is None:
        raise ConfigError("no training table is named. Set data.train, for example --set data.train=records.parquet.")
    return (
        Path(data.train),
        Path(data.validation) if data.validation else None,
        Path(data.test) if data.test else None,
        (),
    )


def _shared_medium(table: Table, roles: dict[str, ColumnRole]) -> str | None:
    """A media column whose values repeat: its records must not be on two sides."""
    for name, found in roles.items():
        if found.role in ("image", "audio"):
            keys = [media_key(cell) for cell in table.read(0, [name]).column(name).to_pylist()[:2000]]
            there = [key for key in keys if key is not None]
            if len(set(there)) < 0.9 * len(there):
                return name
    return None
