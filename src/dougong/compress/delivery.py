"""From a bundle to an export that keeps to a budget: what `dougong export` does.

Here        ExportRequest, `deliver`, Delivered; `records_of` (batches of a table, for calibrating and for judging);
            `plan_within` (the bits that use a budget up, as measured).
Elsewhere   its steps: cutting and writing (export.py), scores and bits (quantise.py), times (latency.py).
Promise     what is told of the export was measured with the export, on records that had no part in choosing its bits;
            an export that is over its budget is not left behind.
"""

from __future__ import annotations

import functools
import itertools
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Self, cast

import torch
from pydantic import Field, model_validator

from dougong.bundle import runtime
from dougong.bundle.exported import KIND, Engine, EngineConfig
from dougong.bundle.files import load_network_from
from dougong.bundle.model import Model
from dougong.compress.clock import Timed, interleaved
from dougong.compress.engines.eager import Eager
from dougong.compress.engines.openvino import OpenVino
from dougong.compress.export import Source, To, answering_bytes, export, fastest_kind, open_engine
from dougong.compress.latency import LayerTimes, fit_layer_times
from dougong.compress.parts import Layer
from dougong.compress.plan import CHOICES, Choice, Compute, Plan, read_choice
from dougong.compress.quantise import (
    Announce,
    Budget,
    Calibrated,
    QuantiseConfig,
    Quantised,
    bytes_of,
    calibrate,
    check_plan,
    choose,
    round_layers,
)
from dougong.compress.recover import RecoverConfig, recover
from dougong.compress.sensitivity import divergence
from dougong.core.bundle import bundle_in, is_bundle, kind_of
from dougong.core.config import Config
from dougong.core.errors import ConfigError, DataError
from dougong.core.sizes import bytes_as_text
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.modality.medium import media_bytes
from dougong.data.table import open_table
from dougong.engine.batches import to_tensors
from dougong.engine.metrics import decide
from dougong.nn.batch import Batch

LARGEST_BATCH: Final = 64
ROUNDS: Final = 4
"""Times that a plan is made anew because the engine took longer than predicted."""


class ExportRequest(Config):
    """What the export is to be."""

    to: Literal["auto", "openvino", "onnx", "torch", "inductor"] = "auto"
    """auto measures openvino, onnx and torch; where bits are chosen it is openvino."""

    bits: str | None = None
    """Of all layers alike (16, 8, 4, or w8a16 ...), or mixed: chosen for each. None: as they are."""

    plan: Plan | None = None
    """A choice for each layer, in place of `bits`; layers that it does not name are stored in 16 bits."""

    compute: Compute | None = None
    """In which floating point all is computed that bits leave in it. None: as the plan says, float32 without one."""

    most_bytes: float | None = Field(default=None, gt=0)
    """Of all graphs together. With bits=mixed."""

    most_seconds: float | None = Field(default=None, gt=0)
    """Of a batch, measured. With bits=mixed."""

    batch_size: int = Field(default=1, gt=0, le=LARGEST_BATCH)
    """Records of the batch that is timed."""

    num_records: int = Field(default=256, gt=1)
    """Records of the table that are used, at most: half to calibrate with, half to judge by."""

    edge: bool = False
    """Measure how much memory answering takes where Dougong is not installed, and have the folder state it."""

    recover: RecoverConfig | None = None
    """Teach the rounded model, where rounding it once costs too much. None: no."""

    quantise: QuantiseConfig = QuantiseConfig()
    engine: EngineConfig = EngineConfig()

    @model_validator(mode="after")
    def _bits_that_are_known(self) -> Self:
        budget = self.most_bytes is not None or self.most_seconds is not None
        if self.bits not in (None, "mixed"):
            read_choice(self.bits)
        if budget and self.bits != "mixed":
            raise ValueError("a size or a latency is met by choosing bits. Use --bits mixed beside it.")
        if self.bits == "mixed" and not budget:
            raise ValueError("--bits mixed chooses bits to keep to a budget. Give --size 8MB, --latency 5ms, or both.")
        if self.bits is not None and self.to not in ("auto", "openvino"):
            raise ValueError(f"--bits are chosen for openvino alone, and --to {self.to} was given. Leave one out.")
        if self.plan is not None and (self.bits is not None or self.to not in ("auto", "openvino")):
            raise ValueError(
                "a plan says all of the bits, and openvino alone carries it out. Leave --bits and --to out."
            )
        if self.compute is not None and not self.rounds:
            raise ValueError(f"--compute {self.compute} goes with bits that are chosen. Give --bits 16 too, or fewer.")
        if self.recover is not None and not self.rounds:
            raise ValueError("--recover teaches a model to live with its bits, and none are chosen. Give --bits too.")
        return self

    @property
    def rounds(self) -> bool:
        """Whether bits are chosen at all."""
        return self.bits is not None or self.plan is not None

    @property
    def needs_records(self) -> bool:
        """Whether bits cannot be chosen or given without any."""
        if self.recover is not None or self.bits == "mixed":
            return True
        choices = set() if self.plan is None else set(self.plan.layers.values())
        return any(each.endswith("a8") for each in choices | ({read_choice(self.bits)} if self.bits else set()))


class Delivered(NamedTuple):
    """What came of it."""

    folder: Path
    to: str
    plan: Plan | None
    num_bytes: int
    """Of the graphs."""

    figures: dict[str, float]
    """Measured, by name; seconds of a batch, and on judged records the divergence from the source in nats and the share
    of equal answers. Empty without records."""

    precisions: dict[str, str]
    """What ran, by layer, as the engine tells it."""

    memory_bytes: int | None = None
    """The most that answering took, with edge=True."""

    def as_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "to": self.to,
            "plan": {} if self.plan is None else self.plan.layers,
            "compute": "f32" if self.plan is None else self.plan.compute,
            "num_bytes": self.num_bytes,
            "figures": self.figures,
            "precisions": self.precisions,
            "memory_bytes": self.memory_bytes,
        }


def deliver(
    source: Path, folder: Path, request: ExportRequest, table: Path | None = None, announce: Announce | None = None
) -> Delivered:
    """Export a bundle as asked.

    `table` has records such as the model reads; their target need not be known. Without one, nothing is measured.

    Raises:
        ConfigError: bits need records and there is no table, the budget cannot be met (it says by how much), or the
            export would take the place of trained weights.
        BundleError: no bundle there, or the place is taken by something else.
    """
    model = load_network_from(source)
    _check_place(folder, source)
    calibration, judged = ([], []) if table is None else records_of(model, table, request.num_records)
    if request.needs_records and not calibration:
        raise ConfigError(
            "such bits are chosen by what records do in the model, and there are none. Give some with --data."
        )
    timed = _timed_batch(model, table, request.batch_size)
    made = Source(model)
    if not request.rounds:
        to = request.to
        if to == "auto":
            if timed is None:
                raise ConfigError("--to auto measures which engine is fastest, on records. Give some with --data.")
            found, _ = fastest_kind(made, timed, request.engine)
            to = "torch" if found == "eager" else cast(To, found)
        memory_bytes = _write(made, folder, to, None, request, table)
        told = _told(model, folder, cast(str, to), None, judged, timed, request)
        return told._replace(memory_bytes=memory_bytes)
    layers = made.cut.layers
    task = model.preparation.target.task
    known: Calibrated | None = None
    if calibration and (request.needs_records or request.quantise.error_correction):
        known = calibrate(model.network, layers, calibration, task, request.quantise, announce)
        made = made.shown(known.seen)
        layers = made.cut.layers
    if request.bits == "mixed":
        assert known is not None
        assert timed is not None
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=_parent(folder)) as temporary:
            plan = plan_within(
                made,
                known,
                timed,
                Path(temporary),
                most_bytes=request.most_bytes,
                most_seconds=request.most_seconds,
                compute=request.compute or "f32",
                quantise=request.quantise,
                engine=request.engine,
                announce=announce,
            )
    elif request.plan is not None:
        plan = request.plan.model_copy(update={"compute": request.compute or request.plan.compute})
    else:
        plan = uniform_plans(layers, request.compute or "f32")[read_choice(cast(str, request.bits))]
    rounding = request.quantise
    if request.recover is not None:
        assert known is not None
        check_plan(layers, plan, known.seen)
        taught = recover(model.network, plan, known.seen, calibration, task, request.recover, announce)
        made = Source(Model(taught, model.preparation, model.manifest)).shown(known.seen)
        rounding = rounding.model_copy(update={"error_correction": False})  # as it was taught
    seen = None if known is None else known.seen
    quantised = round_layers(made.cut.layers, plan, seen, correct=rounding.error_correction)
    memory_bytes = _write(made, folder, "openvino", quantised, request, table)
    told = _told(model, folder, "openvino", plan, judged, timed, request)
    return told._replace(memory_bytes=memory_bytes)


def _check_place(folder: Path, source: Path) -> None:
    """
    Raises:
        ConfigError: the export would take the place of trained weights.
    """
    if folder.exists() and bundle_in(source).resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ConfigError(f"{folder} is what is exported. Name another folder by --out.")
    if is_bundle(folder) and kind_of(folder) != KIND:
        raise ConfigError(
            f"{folder} holds a bundle that is no export, and would be lost. Name another folder by --out."
        )


def _write(
    made: Source, folder: Path, to: To, quantised: Quantised | None, request: ExportRequest, table: Path | None
) -> int | None:
    """Export; returns the memory of answering, where that is asked for."""
    memory_bytes = None
    if request.edge:
        if table is None:
            raise ConfigError("--edge measures the memory of answering, on records. Give some with --data.")
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=_parent(folder)) as temporary:
            tried = export(made, Path(temporary) / "tried", to, quantised)
            memory_bytes = answering_bytes(tried, _as_lines(made.model, table, Path(temporary), request.batch_size))
    export(made, folder, to, quantised, memory_bytes)
    return memory_bytes


def _as_lines(model: Model, table: Path, folder: Path, most: int) -> Path:
    """A table's first records as a .jsonl file, their media as files beside it."""
    opened = open_table(table)
    known = [column for column in model.preparation.columns if column in opened.schema.names]
    lines = []
    for row, record in enumerate(opened.first(0, most, known).to_pylist()):
        for column, cell in record.items():
            content = cell.get("bytes") if isinstance(cell, dict) else cell
            path = cell.get("path") if isinstance(cell, dict) else None
            if isinstance(content, bytes) or path is not None:
                name = f"{row}-{known.index(column)}"
                (folder / name).write_bytes(content if isinstance(content, bytes) else media_bytes(path, opened.folder))
                record[column] = name
        lines.append(json.dumps(record, default=str))
    file = folder / "records.jsonl"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def _parent(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder.parent


def export_plan(made: Source, folder: Path, plan: Plan, known: Calibrated | None, config: QuantiseConfig) -> Path:
    """Round the layers as the plan says, and export."""
    seen = None if known is None else known.seen
    return export(made, folder, "openvino", round_layers(made.cut.layers, plan, seen, correct=config.error_correction))


def plan_within(
    made: Source,
    known: Calibrated,
    timed: Batch,
    scratch: Path,
    *,
    most_bytes: float | None = None,
    most_seconds: float | None = None,
    compute: Compute = "f32",
    quantise: QuantiseConfig = QuantiseConfig(),  # noqa: B008, frozen
    engine: EngineConfig = EngineConfig(),  # noqa: B008, frozen
    announce: Announce | None = None,
    counted: Callable[[Path], int] | None = None,
) -> Plan:
    """The plan with the least score whose export keeps to the budget, as measured; `scratch` is its to use. `counted`
    says which bytes of an export count; None: all of its graphs.

    Raises:
        ConfigError: no choice of bits keeps to it, or none that was found in so many tries.
    """
    layers = made.cut.layers
    costs, counted = bytes_of(layers), counted or graph_bytes
    # What no choice changes, as the smallest export has it: graphs of 16 bits keep some numbers in more.
    fewest = Plan(layers={name: min(each, key=each.__getitem__) for name, each in costs.items()})
    base = export_plan(made, scratch / "base", fewest, known, quantise)
    fixed = counted(base) - sum(min(each.values()) for each in costs.values())
    most = None if most_bytes is None else most_bytes - fixed
    if most is not None and most <= 0:
        raise ConfigError(
            f"the size binds: what no choice of bits changes takes {bytes_as_text(fixed)} alone, and "
            f"{bytes_as_text(cast(float, most_bytes))} were asked for. Ask for more, or prune the model first."
        )
    times = None
    if most_seconds is not None:
        times = layer_times(made, known, timed, quantise, engine, scratch, announce, compute)
    allowed = most_seconds
    for number in range(ROUNDS):
        seconds = None if times is None or allowed is None else allowed - times.rest
        plan = choose(known.scores, costs, None if times is None else times.seconds, Budget(most, seconds))
        plan = plan.model_copy(update={"compute": compute})
        tried = export_plan(made, scratch / f"tried-{number}", plan, known, quantise)
        over_bytes = 0.0 if most_bytes is None else counted(tried) / most_bytes
        over_time = 0.0
        if most_seconds is not None:
            over_time = time_engine(open_engine(tried, engine), timed).median / most_seconds
        if over_bytes <= 1.0 and over_time <= 1.0:
            return plan
        # Predicted too low: aim as much lower than what was just tried; a limit that still allows it changes nothing.
        if most is not None and over_bytes > 1.0:
            chosen = sum(costs[name][choice] for name, choice in plan.layers.items())
            most = min(most, chosen) - (counted(tried) - cast(float, most_bytes))
        if allowed is not None and over_time > 1.0:
            allowed /= over_time * 1.02
    raise ConfigError(
        f"no plan within the budget was found in {ROUNDS} tries: the last took {over_time:.2f} of the latency and "
        f"{over_bytes:.2f} of the size that were asked for. Ask for less, or prune the model first."
    )


def uniform_plans(layers: Mapping[str, Layer], compute: Compute = "f32") -> dict[Choice, Plan]:
    """The same bits for all layers, by these."""
    known = {name: layer.choices for name, layer in layers.items()}
    return {choice: Plan.uniform(choice, known, compute) for choice in CHOICES}


def layer_times(
    made: Source,
    known: Calibrated,
    timed: Batch,
    config: QuantiseConfig,
    engine_config: EngineConfig,
    scratch: Path,
    announce: Announce | None = None,
    compute: Compute = "f32",
) -> LayerTimes:
    """Times of every layer at every choice, from one export for each choice."""
    plans = uniform_plans(made.cut.layers, compute)
    profiles: dict[Choice, dict[str, float]] = {}
    engines: dict[str, Engine] = {}
    for place, (choice, plan) in enumerate(plans.items()):
        if announce is not None:
            announce("times of layers", place, len(plans))
        folder = export_plan(made, scratch / choice, plan, known, config)
        profiles[choice] = profile(OpenVino(folder, engine_config, profile=True), timed)
        engines[choice] = open_engine(folder, engine_config)
    timings = interleaved({choice: functools.partial(engine.run, timed) for choice, engine in engines.items()})
    return fit_layer_times(profiles, {choice: timings[choice].median for choice in plans}, plans)


def profile(engine: OpenVino, batch: Batch, turns: int = 15) -> dict[str, float]:
    """Each layer's median time."""
    found: dict[str, list[float]] = {}
    for turn in range(turns + 3):
        engine.run(batch)
        if turn >= 3:
            for name, seconds in engine.seconds().items():
                found.setdefault(name, []).append(seconds)
    return {name: sorted(seconds)[len(seconds) // 2] for name, seconds in found.items()}


def time_engine(engine: Engine, batch: Batch) -> Timed:
    """The time of one batch."""
    return interleaved({"": functools.partial(engine.run, batch)})[""]


def graph_bytes(folder: Path) -> int:
    """Of an export's graphs."""
    return sum(path.stat().st_size for path in (folder / runtime.GRAPHS).iterdir())


def number_bytes(folder: Path) -> int:
    """Of an export's weights and scales, where they have files of their own: what says how to compute takes as much for
    a small model as for a large one."""
    return sum(path.stat().st_size for path in (folder / runtime.GRAPHS).iterdir() if path.suffix != ".xml")


def _told(
    model: Model,
    folder: Path,
    to: str,
    plan: Plan | None,
    judged: Sequence[Batch],
    timed: Batch | None,
    request: ExportRequest,
) -> Delivered:
    engine = open_engine(folder, request.engine)
    figures: dict[str, float] = {}
    if judged:
        figures |= compare(model, engine, judged)
    if timed is not None:
        eager = Eager(model.network, request.engine)
        runs = {"export": functools.partial(engine.run, timed), "eager": functools.partial(eager.run, timed)}
        timings = interleaved(runs)
        figures |= {f"seconds of {timed.num_records}, {name}": timing.median for name, timing in timings.items()}
    return Delivered(folder, to, plan, graph_bytes(folder), figures, engine.precisions())


def compare(model: Model, engine: Engine, batches: Sequence[Batch]) -> dict[str, float]:
    """An engine's answers beside the source's: mean divergence in nats, and the share that is the same answer."""
    target = model.preparation.target
    total, same, count = 0.0, 0, 0
    with torch.inference_mode():
        for batch in batches:
            exact_BC, found_BC = model.network(batch).output_BC, engine.run(batch)["output_BC"]
            total += float(divergence(exact_BC, found_BC, target.task).sum())
            if target.task != "regression":
                one, other = (decide(target, each).prediction_B.view(len(each), -1) for each in (exact_BC, found_BC))
                same += int((one == other).all(dim=1).sum())
            count += batch.num_records
    found = {"divergence": total / count}
    return found if target.task == "regression" else {**found, "same answers": same / count}


def records_of(model: Model, table: Path, most: int) -> tuple[list[Batch], list[Batch]]:
    """Batches of a table's first records: every other one to calibrate with, the others to judge by.

    Raises:
        DataError: not two batches of usable records.
    """
    size = max(1, min(32, most // 4))
    config = LoaderConfig(batch_size=size, workers=0)
    loader = Loader(open_table(table), model.preparation, config, seed=0)
    found = (to_tensors(arrays) for arrays in loader.one_pass() if len(arrays.row_B))
    batches = list(itertools.islice(found, -(-most // size)))
    if len(batches) < 2:
        raise DataError(
            f"{table.name} has fewer than {2 * size} usable records: too few to calibrate with and to judge by."
        )
    return batches[::2], batches[1::2]


def _timed_batch(model: Model, table: Path | None, size: int) -> Batch | None:
    if table is None:
        return None
    config = LoaderConfig(batch_size=size, workers=0)
    for arrays in Loader(open_table(table), model.preparation, config, seed=0).one_pass():
        if len(arrays.row_B) == size and all(one.present_B.any() for one in arrays.media.values()):
            return to_tensors(arrays)
    raise DataError(f"{table.name} has no {size} usable records in a row that have every modality between them.")
