"""The tables that a recipe speaks of, opened and split.

Here        Tables, open_tables; open_joined, one table of a recipe; judged_views.
Elsewhere   preparing collections (data/sources/); joining (data/join.py); splitting by unit (data/split.py).
Promise     the test table is never split from, learnt from or looked at before the end, but to see that no unit and no
            medium of it stands in another table.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dougong.core.errors import ConfigError
from dougong.data.columns import MEDIA, ColumnRole, infer_roles
from dougong.data.holdout import belonging, hold_out
from dougong.data.join import join_table
from dougong.data.leak import Leak, check_leaks, find_leaks
from dougong.data.sources.captions import prepare_captions
from dougong.data.sources.digits import prepare_digits
from dougong.data.sources.easy_vqa import prepare_easy_vqa
from dougong.data.sources.seen_and_spoken import PAIRINGS, prepare_seen_and_spoken
from dougong.data.sources.uci_views import fetch_uci_views, prepare_uci_views
from dougong.data.sources.xor import prepare_xor
from dougong.data.split import Inseparable
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
    target: str | None
    """None where nothing is decided."""

    unit: str | None
    """The column whose values are never on two sides of a split: what is resampled whole in an interval."""

    notes: tuple[str, ...]
    """What a reader of the figures must know."""

    leaks: tuple[Leak, ...] = ()
    """What tables that were given separately share; only where that is allowed."""


def cache_folder() -> Path:
    """Where prepared collections are kept: $DOUGONG_HOME, or the user's cache."""
    home = os.environ.get("DOUGONG_HOME")
    return Path(home) if home else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dougong"


def open_tables(data: DataConfig, *, seed: int, announce: Announce | None = None, decides: bool = True) -> Tables:
    """Open, infer the columns' roles, and hold out what is missing of validation and test.

    Where nothing is decided, there need be no target, and one that is named is read by nobody.

    Raises:
        ConfigError: no training table is named.
        DataError: a table cannot be used, or two of them share a unit or a medium and data.allow_leak is not set.
    """
    train_path, validation_path, test_path, notes = _locate(data, announce, seed=seed)
    train, joined = open_joined(train_path, data)
    notes = (*notes, *joined)
    roles = infer_roles(train, target=data.target, named=data.columns, decides=decides)
    unread = ("ignore",) if decides else ("ignore", "target")
    target = next(name for name, found in roles.items() if found.role == "target") if decides else None
    if data.unit is not None and data.unit not in train.schema.names:
        known = ", ".join(train.schema.names[:40])
        raise ConfigError(f"data.unit {data.unit!r} is no column of {train.path.name}. Use one of {known}.")
    read = data.modalities or tuple(roles)
    media = [name for name, found in roles.items() if found.role in MEDIA and name in read]
    # Collections that are prepared here are split by their unit alone, where they name one.
    belongs = belonging(train, [] if data.source is not None and data.unit is not None else media, data.unit)
    given = {"train": train}
    for part, path in (("validation", validation_path), ("test", test_path)):
        if path is not None:
            given[part], joined = open_joined(path, data)
            notes = (*notes, *joined)
    leaks, said = _leaks(given, roles, data)
    notes = (*notes, *said)
    if "validation" in given:
        validation = given["validation"]
    else:
        try:
            held = hold_out(train, data.validation_share, belongs, seed=seed)
        except Inseparable as error:
            raise Inseparable(f"{error} Give a validation table.") from None
        train, validation = held.rest, held.aside
        notes = (*notes, f"{validation.num_rows} validation records were held out of the training table, {held.by}")
        notes += held.notes
    test = given.get("test", validation)
    if test_path is None:
        notes = (
            *notes,
            "no test table was given: the figures are of the validation records, which chose the checkpoint",
        )
    for other in (validation, test):
        missing = [name for name, found in roles.items() if found.role not in unread and name not in other.schema.names]
        if missing:
            raise ConfigError(f"{other.path.name} lacks the column {missing[0]!r} of {train.path.name}.")
    return Tables(train, validation, test, test_path is None, roles, target, belongs.unit, notes, leaks)


def open_joined(path: Path, data: DataConfig) -> tuple[Table, tuple[str, ...]]:
    """A table with what is joined to it, and what came of that."""
    table = open_table(path)
    if not data.join:
        return table, ()
    media = [name for name, role in data.columns.items() if role in MEDIA]
    joined, reports = join_table(table, data.join, media)
    dropped = table.num_rows - joined.num_rows
    notes = tuple(f"joined to {table.path.name}: {report.line()}" for report in reports)
    return joined, (*notes, *((f"{dropped} records of {table.path.name} were dropped by join",) if dropped else ()))


def _leaks(
    given: dict[str, Table], roles: dict[str, ColumnRole], data: DataConfig
) -> tuple[tuple[Leak, ...], tuple[str, ...]]:
    """What separate tables share. Collections that are prepared here are split by their own promise."""
    if len(given) < 2 or data.source is not None:
        return (), ()
    leaks = find_leaks(given, roles, data.unit)
    if not data.allow_leak:
        check_leaks(leaks)
    notes = [f"data.allow_leak: {leak.line()}" for leak in leaks]
    lacking = [part for part, table in given.items() if data.unit is not None and data.unit not in table.schema.names]
    notes += [f"{part} has no column {data.unit!r}: whether it shares units is not known" for part in lacking]
    return leaks, tuple(notes)


def _locate(
    data: DataConfig, announce: Announce | None, *, seed: int
) -> tuple[Path, Path | None, Path | None, tuple[str, ...]]:
    if data.source == "easy-vqa":
        folder = Path(data.folder) if data.folder else cache_folder() / "easy-vqa"
        prepare_easy_vqa(folder, announce=announce)
        drawn, spoken = "easy-VQA: generated pictures and questions", "the spoken questions are synthetic (espeak-ng)"
        return folder / "train.parquet", None, folder / "test.parquet", (drawn, spoken)
    if data.source == "xor":
        folder = Path(data.folder) if data.folder else cache_folder() / "xor" / f"seed-{seed}"
        prepare_xor(folder, seed=seed)
        return *_three_tables(folder), ("pictures and sentences are synthetic",)
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
        return *_three_tables(folder), (apart,)
    if data.source == "seen-and-spoken":
        if data.folder is None:
            raise ConfigError(
                "source seen-and-spoken needs data.folder: the recordings of the Free Spoken Digit Dataset."
            )
        folder = cache_folder() / "seen-and-spoken" / f"seed-{seed}"
        pairings = data.pairings if data.pairings is not None else PAIRINGS
        prepare_seen_and_spoken(Path(data.folder), folder, seed=seed, pairings=pairings)
        apart = "validation and test are one speaker each, unheard in training, and pictures unseen in training"
        return *_three_tables(folder), (apart, "pictures and recordings are of other people, paired by digit")
    if data.source == "uci-views":
        # A split of its own for each seed, which says how much the figures depend on it.
        folder = cache_folder() / "uci-views" / f"seed-{seed}"
        origin = Path(data.folder) if data.folder else fetch_uci_views(cache_folder() / "uci-views")
        prepare_uci_views(origin, folder, seed=seed)
        return *_three_tables(folder), (f"split by record, stratified by digit, with seed {seed}",)
    if data.train is None:
        raise ConfigError("no training table is named. Set data.train, for example --set data.train=records.parquet.")
    return (
        Path(data.train),
        Path(data.validation) if data.validation else None,
        Path(data.test) if data.test else None,
        (),
    )


def _three_tables(folder: Path) -> tuple[Path, Path, Path]:
    return folder / "train.parquet", folder / "validation.parquet", folder / "test.parquet"
