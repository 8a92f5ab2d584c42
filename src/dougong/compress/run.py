"""From a bundle to a smaller and faster one of the same signature.

Here        `compress_bundle`, Result; `read_ratio`, for what people write in a budget.
Elsewhere   the search (search.py); records (records.py); the command (cli/).
Promise     a folder that holds anything else is not written to; the figures of the result are of records that nothing
            was learnt from or chosen by; a search that was stopped goes on.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from dougong.bundle.exported import KIND
from dougong.bundle.files import load_network_from
from dougong.bundle.model import Model
from dougong.compress.candidate import EAGER, Backend, Budget, Eager, Point
from dougong.compress.distil import agreement, judge_on, of_both
from dougong.compress.draft import Say
from dougong.compress.outcome import BudgetError, Outcome
from dougong.compress.picture import as_rows, draw_points
from dougong.compress.records import Records, split_records
from dougong.compress.search import Search
from dougong.compress.search_config import SearchConfig
from dougong.core.bundle import Manifest, bundle_in, is_bundle, kind_of
from dougong.core.errors import BundleError, ConfigError, RunError
from dougong.core.events import Listener
from dougong.core.files import write_atomic, write_json
from dougong.data.collate import View
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.table import Table, open_table
from dougong.engine.evaluate import Evaluation, evaluate
from dougong.engine.metrics import primary_metric

MOST_CONDITIONS: Final = 5
"""Modalities up to which each is withheld, too, when the result is judged."""

WRITTEN: Final = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


class Result(NamedTuple):
    """What came of it."""

    folder: Path
    outcome: Outcome
    metric: str
    judged: dict[str, dict[str, float]]
    """By condition, on records that nothing was learnt from or chosen by: teacher, compressed, loss; low and high, the
    95 % interval of the loss, where records are right or wrong."""

    notes: tuple[str, ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        chosen = self.outcome.chosen
        return {
            "bundle": None if chosen is None else str(self.folder / "bundle"),
            "learnt": None if chosen is None or chosen.candidate.engine == EAGER else str(self.folder / "learnt"),
            "metric": self.metric,
            "teacher": as_rows([self.outcome.teacher])[0],
            "chosen": None if chosen is None else as_rows([chosen])[0],
            "judged": self.judged,
            "front": as_rows(self.outcome.front()),
            "closest": as_rows(self.outcome.closest),
            "binds": list(self.outcome.binds),
            "points": as_rows(self.outcome.points),
            "notes": list(self.notes),
            "seconds": round(self.seconds, 1),
        }


def compress_bundle(
    bundle: Path,
    data: Path,
    budget: Budget,
    out: Path,
    config: SearchConfig | None = None,
    *,
    judge: Path | None = None,
    resume: bool = False,
    time_limit: float | None = None,
    say: Say = lambda line: None,
    listeners: Sequence[Listener] = (),
    backends: Sequence[Backend] = (Eager(),),
) -> Result:
    """Compress, and leave in `out`: bundle/, compress.json, points.svg, and the search itself in search/.

    Where another engine than torch was chosen, bundle/ is an export for it (export.py), and learnt/ a bundle of the
    weights before they were rounded.

    Records of `data` are learnt from, and chosen by; some are held out to judge on, where `judge` gives no others.

    Raises:
        BudgetError: the budget cannot be met; compress.json and points.svg are written all the same.
        ConfigError, DataError, RunError, BundleError: what was given cannot be used.
    """
    config, started = config or SearchConfig(), time.perf_counter()
    teacher = _load(bundle)
    _check_folder(out, bundle)
    records = split_records(
        open_table(data),
        teacher.preparation,
        share=config.held_out,
        unit=config.unit,
        judge=None if judge is None else open_table(judge),
        seed=config.seed,
    )
    for note in records.notes:
        say(f"note: {note}")
    search = Search(
        teacher,
        records,
        budget,
        config,
        out / "search",
        resume=resume,
        time_limit=time_limit,
        say=say,
        listeners=listeners,
        backends=backends,
    )
    metric = primary_metric(teacher.preparation.target.task).name if records.labelled else "agreement"
    try:
        outcome = search.run()
    except BudgetError as error:
        _write(Result(out, error.outcome, metric, {}, records.notes, time.perf_counter() - started))
        raise
    assert outcome.chosen is not None
    runner = search.runner_of(outcome.chosen)
    learnt = search.network_of(outcome.chosen)
    shipped = Model(runner.network, learnt.preparation, learnt.manifest)
    say(f"judging on {records.judge.num_rows} records")
    judged = judge_both(teacher, shipped, records)
    manifest = _told(learnt, teacher, outcome.chosen, judged, metric, records)
    runner.ship(out / "bundle", manifest)
    if outcome.chosen.candidate.engine != EAGER:
        learnt.save(out / "learnt")
    result = Result(out, outcome, metric, judged, records.notes, time.perf_counter() - started)
    _write(result)
    return result


def judge_both(teacher: Model, student: Model, records: Records) -> dict[str, dict[str, float]]:
    """Both on the records that nothing was learnt from or chosen by: whole, and without each modality."""
    names = tuple(student.preparation.modalities)
    conditions = {"all": names}
    if 1 < len(names) <= MOST_CONDITIONS:
        conditions |= {f"without {name}": tuple(other for other in names if other != name) for name in names}
    metric = primary_metric(teacher.preparation.target.task)
    told = judge_on(teacher.network, records.judge, teacher.preparation)
    found: dict[str, dict[str, float]] = {}
    for condition, keep in conditions.items():
        # A teacher of more modalities answers as it would have: with all that it reads, but what is withheld.
        more = tuple(name for name in teacher.preparation.modalities if name in keep or name not in names)
        before, after = _judged(teacher, records.judge, more), _judged(student, records.judge, keep)
        if records.labelled:
            figures = {"teacher": before.metrics[metric.name], "compressed": after.metrics[metric.name]}
        else:
            figures = {"teacher": agreement(before, told), "compressed": agreement(after, told)}
        better = metric.higher_is_better or not records.labelled
        lost = figures["teacher"] - figures["compressed"]
        figures["loss"] = lost if better else figures["compressed"] / (figures["teacher"] or 1.0) - 1
        found[condition] = figures | _interval(before, after)
    return found


def _judged(model: Model, table: Table, keep: tuple[str, ...]) -> Evaluation:
    config = LoaderConfig(batch_size=256)
    loader = Loader(table, model.preparation, config, views=(View(keep=keep),))
    return evaluate(model.network, loader, model.preparation.target)


def _interval(before: Evaluation, after: Evaluation) -> dict[str, float]:
    """Of the difference of accuracies, record by record: 1.96 standard errors."""
    if before.target_B is None or before.confusion is None:
        return {}
    before_B, after_B = of_both(before, after)
    if len(before_B) < 2:
        return {}
    targets = before.target_B[before_B]
    lost_B = (before.prediction_B[before_B] == targets).astype(float) - (after.prediction_B[after_B] == targets)
    error = 1.96 * float(lost_B.std(ddof=1)) / float(np.sqrt(len(lost_B)))
    return {"low": float(lost_B.mean()) - error, "high": float(lost_B.mean()) + error}


def _told(
    model: Model, teacher: Model, chosen: Point, judged: dict[str, dict[str, float]], metric: str, records: Records
) -> Manifest:
    """What the bundle says of itself."""
    told = {
        "from": teacher.manifest.name,
        "how": chosen.candidate.in_words(),
        "parameters": f"{chosen.num_parameters:,}",
        "learnt from": f"{records.learn.path.name}, {records.learn.num_rows} records, for {chosen.steps} steps",
        "judged on": f"{records.judge.path.name}, {records.judge.num_rows} records",
    }
    return model.manifest.model_copy(
        update={
            "provenance": {**model.manifest.provenance, "compressed": told},
            "metrics": {name: {metric: figures["compressed"]} for name, figures in judged.items()},
        }
    )


def _write(result: Result) -> None:
    write_json(result.folder / "compress.json", result.as_json())
    write_atomic(result.folder / "points.svg", draw_points(result.outcome, result.metric))


def _load(bundle: Path) -> Model:
    folder = bundle_in(bundle)
    if is_bundle(folder) and (kind := kind_of(folder)) not in (None, KIND):
        raise BundleError(f"{bundle} holds a {kind}, and a model that decides is what can be compressed.")
    return load_network_from(bundle)


def _check_folder(out: Path, bundle: Path) -> None:
    if out.resolve() == bundle.resolve():
        raise RunError(f"--out {out} is the bundle itself. Name another folder.")
    if out.is_dir() and any(out.iterdir()) and not (out / "search").is_dir():
        raise RunError(f"--out {out} holds other things. Name a folder that is not there yet.")


def read_ratio(text: str, option: str) -> float:
    """
    Raises:
        ConfigError: it is no ratio.
    """
    found = WRITTEN.fullmatch(text)
    if found is None or found[2] not in ("", "x") or not float(found[1]):
        raise ConfigError(f"{option} {text!r} is no ratio. Write for example 10x or 2.5.")
    return float(found[1])
