"""The whole path from a teacher in eager fp32 to what is shipped, each step alone and all together.

Here        the ways (engine, bits, student, all of them; three other quantisers of the teacher); their times at batch 1
            and 16; accuracy; accuracy with each modality missing and with media spoilt.
Elsewhere   teachers and their records (students.py); the other quantisers (peers.py); the larger model (large.py).
Promise     every way answers the same test records and batches, in one thread, and computes as it says: nothing is
            simulated. All together is the student on the engine that was measured fastest before; it counts as losing
            what the worst of those loses that could have been. Times are taken in turn, in an order drawn anew, in two
            ways: of one call after those of the others, which finds the processor's caches full of something else, as
            where requests are rare; and of several calls in a row, as under load. The student of this part also learns
            with modalities withheld, from its teacher's answers to the same, so that it is as robust; its best weights
            are chosen by records held out of training. Intervals of accuracies are from the lowest seed to the highest.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

from harness import Kept
from large import large_batch, large_sandwich
from paired import quartiles, ratio
from parts import each_seed, once
from peers import ONE_CORE, peers_of
from students import SEEDS, SUBJECTS, lessons, mean, measured_importance, quarter, student_of, teacher_of

from dougong.bundle.exported import Engine, EngineNetwork
from dougong.bundle.model import Model
from dougong.compress.backends import fastest_floats
from dougong.compress.clock import Timed, interleaved
from dougong.compress.delivery import uniform_plans
from dougong.compress.distil import distil
from dougong.compress.engines.eager import Eager, fastest
from dougong.compress.export import Source, export, open_engine
from dougong.compress.importance import ImportanceConfig, measure_importance
from dougong.compress.plan import Choice, Compute
from dougong.compress.quantise import round_layers
from dougong.compress.sensitivity import observe
from dougong.compress.structure import structure_of
from dougong.core.figures import Figure
from dougong.data.corruption import Corruption
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.split import sample_table
from dougong.data.table import Table
from dougong.engine.batches import to_tensors
from dougong.model.sandwich import Sandwich
from dougong.nn.batch import Batch, only_media

WITHHOLD: Final = 0.1
SPOILT: Final = 0.5
TEST_RECORDS: Final = 2000
CALIBRATION_RECORDS: Final = 256
AFTER_OTHERS: Final = 1
IN_A_ROW: Final = 8
"""Calls of one way in a turn."""

BASE: Final = "eager fp32"
WHOLE: Final = ("student and engine", "student, engine and int8", "student and ONNX Runtime")
"""All together: the student on whichever of these is measured fastest here, as `dougong compress` chooses."""

FLOATS: Final[Compute] = fastest_floats()
PEERS: Final = ("NNCF default int8", "ONNX Runtime dynamic int8", "torchao int8, compiled")


def measure(quick: bool, kept: Kept) -> Iterator[Figure]:
    how = "quick" if quick else "whole"
    for subject in SUBJECTS:
        find = functools.partial(one_seed, subject, kept=kept, quick=quick)
        found = each_seed(kept, f"path, {subject}, {how}", 1 if quick else SEEDS, find)
        yield from accuracies(subject, found)
        make = functools.partial(times_of, subject, kept, quick)
        yield from once(kept, f"path, times on {subject}, {how}", make)
    yield from once(kept, f"path, times of the larger one, {how}", lambda: times_of_large(quick))


def accuracies(subject: str, found: Sequence[Mapping[str, Any]]) -> Iterator[Figure]:
    teacher = mean(each["accuracy"][BASE] for each in found)
    for way in found[0]["accuracy"]:
        values = [each["accuracy"][way] for each in found]
        yield Figure(
            name=f"{subject}: accuracy, {way}",
            value=mean(values),
            unit="",
            low=min(values),
            high=max(values),
            seeds=len(values),
            baseline=teacher,
        )
    lost = [each["accuracy"][BASE] - min(each["accuracy"][way] for way in WHOLE) for each in found]
    yield Figure(
        name=f"{subject}: accuracy lost by all together",
        value=mean(lost),
        unit="",
        asked="<= 0.01",
        low=min(lost),
        high=max(lost),
        seeds=len(lost),
    )
    for condition in found[0]["robust"]:
        before = [each["robust"][condition][0] for each in found]
        after = [min(each["robust"][condition][1:]) for each in found]
        worse = [one - other for one, other in zip(before, after, strict=True)]
        yield Figure(
            name=f"{subject}: accuracy, {condition}: all together",
            value=mean(after),
            unit="",
            seeds=len(after),
            baseline=mean(before),
        )
        yield Figure(
            name=f"{subject}: lost, {condition}",
            value=mean(worse),
            unit="",
            asked="<= 0.02",
            low=min(worse),
            high=max(worse),
            seeds=len(worse),
        )


def one_seed(subject: str, seed: int, *, kept: Kept, quick: bool) -> dict[str, Any]:
    """What every way answers of one teacher's test records, and how robust the teacher is and what may be shipped."""
    taught = teacher_of(subject, seed, kept, quick=quick)
    teacher, student = taught.teacher, student_for(subject, seed, kept, quick)
    records = sample_table(taught.tables.test, 200 if quick else TEST_RECORDS, seed=seed)
    with tempfile.TemporaryDirectory() as temporary:
        calibration = batches(teacher, taught.tables.train, 32, CALIBRATION_RECORDS)
        engines = ways(teacher, student, calibration, Path(temporary))
        asked = {way: answering(teacher, engine) for way, engine in engines.items()}
        accuracy = {way: model.evaluate(records).metrics["accuracy"] for way, model in asked.items()}
        robust = {}
        for condition, (keep, spoilt) in conditions(list(teacher.preparation.modalities)).items():
            robust[condition] = [
                asked[way].evaluate(records, keep=keep, corruptions=spoilt).metrics["accuracy"]
                for way in (BASE, *WHOLE)
            ]
    return {"accuracy": accuracy, "robust": robust}


def conditions(names: Sequence[str]) -> dict[str, tuple[list[str], list[Corruption]]]:
    found: dict[str, tuple[list[str], list[Corruption]]] = {
        f"without {name}": ([other for other in names if other != name], []) for name in names
    }
    for name in names:
        found[f"{name} spoilt by half"] = (list(names), [Corruption(modality=name, level=SPOILT)])
    found["all spoilt by half"] = (list(names), [Corruption(modality=name, level=SPOILT) for name in names])
    return found


def answering(model: Model, engine: Engine) -> Model:
    """An engine with what feeds it."""
    network = EngineNetwork(engine, list(model.preparation.modalities))
    return Model(cast(Sandwich, network), model.preparation, model.manifest)


def student_for(subject: str, seed: int, kept: Kept, quick: bool) -> Model:
    """The teacher's student of a quarter of its parameters, taught once of the same sources."""
    recipe, tables, teacher = teacher_of(subject, seed, kept, quick=quick)
    structure = structure_of(teacher.network)
    importance = measured_importance(teacher, structure, tables, seed)
    student = student_of(teacher, quarter(teacher, structure, importance), importance, seed)
    config = lessons(recipe, seed, taught=True, quick=quick).model_copy(update={"withhold": WITHHOLD})
    folder = kept.folder / f"student-{SUBJECTS.index(subject)}-{seed}-{'quick' if quick else 'whole'}"
    # Where it was taught before, it ends at once with its best weights.
    distil(
        student.network,
        student.preparation,
        teacher,
        tables.train,
        tables.validation,
        config,
        folder,
        resume=folder.exists(),
    )
    return student


def ways(teacher: Model, student: Model, calibration: Sequence[Batch], scratch: Path) -> dict[str, Engine]:
    """Each step alone, all together, and the other quantisers of the teacher."""
    source, small = Source(teacher), Source(student)

    def opened(choice: Choice, of: Source, name: str) -> Engine:
        return open_engine(at_bits(choice, of, calibration, scratch / name), ONE_CORE)

    return {
        BASE: Eager(teacher.network),
        "engine alone": open_engine(export(source, scratch / "teacher", "openvino"), ONE_CORE),
        f"engine and 16 bits in {FLOATS}": opened("w16a16", source, "teacher-16"),
        "engine and int8": opened("w8a8", source, "teacher-int8"),
        "student alone": Eager(student.network),
        "student and engine": open_engine(export(small, scratch / "student", "openvino"), ONE_CORE),
        "student, engine and int8": opened("w8a8", small, "student-int8"),
        "student and ONNX Runtime": open_engine(export(small, scratch / "student-onnx", "onnx"), ONE_CORE),
        **peers_of(source, calibration, scratch),
    }


def at_bits(choice: Choice, source: Source, calibration: Sequence[Batch], folder: Path) -> Path:
    """An export with all layers alike; what is left in floating point is computed in bf16 where the processor has units
    for it, as the other quantisers' is."""
    layers = source.cut.layers
    linear = [name for name, layer in layers.items() if "w8a8" in layer.choices]
    seen = observe(source.model.network, linear, calibration)
    rounded = round_layers(layers, uniform_plans(layers, FLOATS)[choice], seen)
    return export(source, folder, "openvino", rounded)


def batches(model: Model, table: Table, size: int, most: int) -> list[Batch]:
    some = sample_table(table, most, seed=0)
    loader = Loader(some, model.preparation, LoaderConfig(batch_size=size, workers=0))
    return [to_tensors(arrays) for arrays in loader.one_pass() if len(arrays.row_B) == size]


def times_of(subject: str, kept: Kept, quick: bool) -> Iterator[Figure]:
    taught = teacher_of(subject, 0, kept, quick=quick)
    with tempfile.TemporaryDirectory() as temporary:
        calibration = batches(taught.teacher, taught.tables.train, 32, CALIBRATION_RECORDS)
        engines = ways(taught.teacher, student_for(subject, 0, kept, quick), calibration, Path(temporary))
        timed = {size: without_target(batches(taught.teacher, taught.tables.test, size, size)[0]) for size in (1, 16)}
        yield from times(subject, engines, timed, quick)


def without_target(batch: Batch) -> Batch:
    return Batch({name: only_media(media) for name, media in batch.media.items()}, None)


def times_of_large(quick: bool) -> Iterator[Figure]:
    """BERT-small and ViT-small; the student has a quarter of the parameters, as the others'."""
    teacher = large_sandwich()
    calibration = [large_batch(4), large_batch(5)]
    structure = structure_of(teacher.network)
    importance = measure_importance(
        teacher.network, structure, calibration, teacher.preparation.target, ImportanceConfig(criterion="magnitude")
    )
    student = student_of(teacher, quarter(teacher, structure, importance), importance, 0)
    whole = sum(p.numel() for p in teacher.network.parameters())
    share = sum(p.numel() for p in student.network.parameters()) / whole
    yield Figure(name="BERT-small and ViT-small: student's share of the parameters", value=share, unit="")
    with tempfile.TemporaryDirectory() as temporary:
        engines = ways(teacher, student, calibration, Path(temporary))
        timed = {1: large_batch(1), 16: large_batch(16)}
        yield from times("BERT-small and ViT-small", engines, timed, quick, rows=(AFTER_OTHERS,))


def times(
    name: str,
    engines: Mapping[str, Engine],
    timed: Mapping[int, Batch],
    quick: bool,
    rows: Sequence[int] = (AFTER_OTHERS, IN_A_ROW),
) -> Iterator[Figure]:
    """Seconds of a batch: at 1 its latency, at 16 what bounds the throughput."""
    for size, batch in timed.items():
        shipped, _ = fastest({way: engines[way] for way in WHOLE}, batch)
        for count in rows:
            how = "after others" if count == AFTER_OTHERS else "in a row"
            calls: dict[str, Callable[[], object]] = {
                way: functools.partial(in_a_row, functools.partial(engine.run, batch), count)
                for way, engine in engines.items()
            }
            found = {
                way: Timed(tuple(each / count for each in timing.seconds))
                for way, timing in interleaved(calls, turns=7 if quick else 31).items()
            }
            yield from compared(f"{name}, batch {size}, {how}", found, shipped)


def in_a_row(call: Callable[[], object], count: int) -> None:
    for _ in range(count):
        call()


def compared(name: str, found: Mapping[str, Timed], shipped: str) -> Iterator[Figure]:
    base, whole = found[BASE], found[shipped]
    best = min(PEERS, key=lambda peer: found[peer].median)
    for way, timing in found.items():
        yield quartiles(f"{name}: {way}", timing.seconds, base.median * 1000)
        if way != BASE:
            yield ratio(f"{name}: {BASE} over {way}", base.seconds, timing.seconds, None)
    yield ratio(f"{name}: {BASE} over all together ({shipped})", base.seconds, whole.seconds, ">= 10")
    yield ratio(f"{name}: best of the others ({best}) over all together", found[best].seconds, whole.seconds, ">= 1")
