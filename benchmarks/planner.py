"""The planner's predictions against published training runs, naive layouts, and bytes counted on ranks.

Here        the runs, the fit, and what is made of it (claim 2 of docs/claims.md); memory that was said against memory
            that was counted.
Elsewhere   the formulas (engine/planner/predict.py), the rehearsal (rehearse.py); options and the result (harness.py).
Promise     a run is predicted by constants that were fitted on the others of its series. Peaks, bandwidths and layouts
            are as published (data/published_runs.json); what is not published is said here.

Series      Megatron-LM on A100 (Narayanan et al. 2021, table 1): activations made anew, no sharing of tokens, attention
            scores written out. Megatron-LM on H100 (README, 2024): nothing made anew, tokens shared out, flash
            attention, gradients' exchange hidden; its micro-batch is not published and taken as 1.
Fitted      the share of a peak that matrix products reach, bytes between them, and on A100 those of attention scores:
            two or three numbers for nine or ten runs, by least squares of the logarithms.
Ratios      of the throughputs of any two runs of a series, predicted over published; and how many of these pairs are
            predicted in the right order.

"planned over" is the predicted throughput of the best layout found for Megatron's 145 B run on its 1536 GPUs, over that
of a layout that one could take without a plan; the rows say which (`naive_layouts`). They were written down before they
were computed.

Memory      of the first rank of each stage, of four, in a step of the engine on CPU processes: said by one process
            without ranks, and counted there. The formulas' figure stands beside, for which nothing is asked: it leaves
            out what lies between two operations, and what is on its way.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from harness import run
from scipy.optimize import least_squares
from scipy.stats import spearmanr
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from torch.nn import functional

from dougong.core.figures import Figure
from dougong.core.files import write_json
from dougong.core.signature import ImageInput, Signature, Target, TextInput
from dougong.data.position import Share
from dougong.engine.memory.account import Account, StepBytes
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.parallel.ranks import Ranks
from dougong.engine.planner.cluster import KNOWN, ClusterConfig
from dougong.engine.planner.predict import KEEP_ALL, MIXED, Activations, Choice, Prediction, predict
from dougong.engine.planner.rehearse import Rehearsal, rehearse
from dougong.engine.planner.search import SearchConfig, describe, find_layouts
from dougong.engine.planner.shape import ModelShape, measure_shape, transformer_shape
from dougong.engine.prepare import prepare_model
from dougong.engine.step import TrainParts, train_step
from dougong.model.bridge import BridgeConfig
from dougong.model.decoder import DecoderConfig, ExpertsConfig
from dougong.model.sandwich import SandwichConfig
from dougong.nn.batch import Batch, MediaBatch
from dougong.nn.block_stack import BlockStack
from dougong.objectives.generation import words_loss

PUBLISHED: Final = Path(__file__).parent / "data" / "published_runs.json"


class Series(NamedTuple):
    """Runs of one table."""

    name: str
    cluster: str
    free: tuple[str, ...]
    fixed: dict[str, float]
    recompute: bool
    sequence: bool


SERIES: Final = (
    Series(
        "megatron_sc21_a100_80g",
        "a100-80g",
        ("matmul_efficiency", "touched_factor", "score_factor"),
        {},
        recompute=True,
        sequence=False,
    ),
    Series(
        "megatron_h100_2024",
        "h100",
        ("matmul_efficiency", "touched_factor"),
        {"data_overlap": 1.0, "tensor_overlap": 0.5},
        recompute=False,
        sequence=True,
    ),
)
ANEW: Final = Activations("nothing")
START: Final = {"matmul_efficiency": 0.65, "touched_factor": 15.0, "score_factor": 13.0}

BOUNDS: Final = {"matmul_efficiency": (0.1, 1.0), "touched_factor": (0.0, 1e3), "score_factor": (0.0, 1e3)}


class Run(NamedTuple):
    """One published run."""

    model: str
    shape: ModelShape
    devices: int
    choice: Choice
    measured: float
    """Teraflops a second and device, as published: of the model and, where they are made anew, of activations."""

    step_flops: float


def published(series: Series) -> list[Run]:
    """The runs of a series."""
    table = json.loads(PUBLISHED.read_text(encoding="utf-8"))[series.name]
    return [_run(row, table, series) for row in table["rows"]]


def _run(row: Mapping[str, Any], table: Mapping[str, Any], series: Series) -> Run:
    tensor, pipeline, records = row["tp"], row["pp"], row.get("mbs", 1)
    chunks = row["layers"] // pipeline // row["vpp_layers"] if row.get("vpp_layers") else 1
    plan = PlanConfig(
        tensor=tensor,
        pipeline=pipeline,
        chunks=chunks,
        schedule="interleaved" if chunks > 1 else "1f1b",
        sequence=series.sequence or tensor == 1,
    )
    shape = transformer_shape(
        width=row["hidden"],
        num_layers=row["layers"],
        num_heads=row["heads"],
        vocabulary=table["vocab"],
        tokens=table["seq"],
        records=records,
    )
    micro_batches = row["gbs"] // (row["gpus"] // (tensor * pipeline) * records)
    # As published (Narayanan et al. 2021, equation 3): 96, or 72 where nothing is made anew.
    width, layers, tokens = row["hidden"], row["layers"], table["seq"]
    passes = 4 if series.recompute else 3
    words = table["vocab"] / ((16 if series.recompute else 12) * layers * width)
    step = 24 * passes * row["gbs"] * tokens * layers * width**2 * (1 + tokens / (6 * width) + words)
    choice = Choice(plan, micro_batches, ANEW if series.recompute else KEEP_ALL)
    return Run(row["model"], shape, row["gpus"], choice, row["tflops_gpu"], step)


def throughput(one: Run, cluster: ClusterConfig) -> float:
    """Predicted, in the units of `measured`."""
    found = predict(one.shape, cluster.model_copy(update={"devices": one.devices}), one.choice, MIXED)
    return one.step_flops / found.seconds / one.devices / 1e12


def cluster_of(series: Series, constants: Mapping[str, float]) -> ClusterConfig:
    """The series' devices with these constants."""
    return KNOWN[series.cluster].model_copy(update={**series.fixed, **constants})


def fitted(series: Series, runs: Sequence[Run], start: Mapping[str, float] | None = None) -> dict[str, float]:
    """The free constants, by least squares of the logarithms of throughput."""

    def errors(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        cluster = cluster_of(series, dict(zip(series.free, values.tolist(), strict=True)))
        return np.array([math.log(throughput(one, cluster) / one.measured) for one in runs])

    first = np.array([(start or START)[name] for name in series.free])
    least, most = zip(*(BOUNDS[name] for name in series.free), strict=True)
    scale = [START[name] for name in series.free]
    found = least_squares(
        errors, np.clip(first, least, most), bounds=(least, most), x_scale=scale, xtol=1e-4, ftol=1e-6
    )
    return dict(zip(series.free, found.x.tolist(), strict=True))


def measure(quick: bool, parts: Sequence[str]) -> Iterator[Figure]:
    if "published" in parts:
        for series in SERIES:
            yield from against_published(series, quick=quick)
    if "naive" in parts:
        yield from planned_against_naive()
    if "memory" in parts:
        yield from said_against_counted(quick=quick)


def against_published(series: Series, *, quick: bool) -> Iterator[Figure]:
    runs = published(series)
    whole = fitted(series, runs)
    for name, value in whole.items():
        yield Figure(name=f"{series.name}: {name}, fitted on all", value=value, unit="")
    ratios, in_sample = [], []
    predicted = []
    for place, one in enumerate(runs):
        constants = whole if quick else fitted(series, [*runs[:place], *runs[place + 1 :]], whole)
        found = throughput(one, cluster_of(series, constants))
        predicted.append(found)
        ratios.append(found / one.measured)
        in_sample.append(throughput(one, cluster_of(series, whole)) / one.measured)
        yield Figure(
            name=f"{series.name}: {one.model}, {describe(one.choice)}",
            value=found,
            unit="TFLOP/s",
            baseline=one.measured,
        )
    errors = [abs(ratio - 1) for ratio in ratios]
    yield Figure(name=f"{series.name}: largest error", value=max(errors), unit="", asked="<= 0.10", seeds=len(runs))
    yield Figure(name=f"{series.name}: mean error", value=float(np.mean(errors)), unit="", seeds=len(runs))
    yield Figure(
        name=f"{series.name}: largest error of a ratio of two runs",
        value=max(ratios) / min(ratios) - 1,
        unit="",
        asked="<= 0.10",
        seeds=len(runs),
    )
    yield Figure(
        name=f"{series.name}: the same, fitted on all",
        value=max(in_sample) / min(in_sample) - 1,
        unit="",
        asked="<= 0.10",
    )
    measured = [one.measured for one in runs]
    pairs = [(a, b) for a, b in itertools.combinations(range(len(runs)), 2) if measured[a] != measured[b]]
    right = sum((predicted[a] < predicted[b]) == (measured[a] < measured[b]) for a, b in pairs)
    yield Figure(name=f"{series.name}: pairs in the right order", value=right / len(pairs), unit="", seeds=len(pairs))
    clear = [(a, b) for a, b in pairs if abs(math.log(measured[a] / measured[b])) > CLEAR]
    right = sum((predicted[a] < predicted[b]) == (measured[a] < measured[b]) for a, b in clear)
    yield Figure(
        name=f"{series.name}: of those that lie 5 % apart or more", value=right / len(clear), unit="", seeds=len(clear)
    )
    ranks = float(spearmanr(predicted, measured).statistic)
    yield Figure(name=f"{series.name}: rank correlation", value=ranks, unit="", seeds=len(runs))


CLEAR: Final = math.log(1.05)


# Naive layouts -------------------------------------------------------------------------------------------------


class Naive(NamedTuple):
    """A layout that one could take without a plan."""

    name: str
    records_per_second: float
    peak_bytes: float


def naive_layouts(one: Run, cluster: ClusterConfig, records: int) -> Iterator[Naive]:
    """Each axis alone, with as many ranks as the memory takes; then Megatron's own sizes, carried out naively."""

    def predicted(plan: PlanConfig, on: ClusterConfig = cluster, shape: ModelShape = one.shape) -> Prediction:
        step = round(one.devices // (plan.tensor * plan.pipeline) * shape.num_records)
        return predict(shape, on, Choice(plan, records // step, ANEW), MIXED)

    # Records do not divide evenly: as if they did, which favours it; one micro-batch, so that it gathers least.
    data = predicted(PlanConfig(shard=one.devices), shape=one.shape.of_records(records / one.devices))
    yield Naive("data alone (zero3), exchange in plain sight", records / data.seconds, data.peak_bytes)
    hidden = max(data.seconds - data.data_seconds, data.data_seconds)
    yield Naive("data alone (zero3), exchange hidden as well as can be", records / hidden, data.peak_bytes)

    def first_that_fits(plans: Sequence[PlanConfig]) -> Prediction:
        each = [predicted(plan) for plan in plans]
        return next((found for found in each if found.peak_bytes <= cluster.memory_bytes), each[-1])

    sizes = [n for n in range(2, one.devices + 1) if one.devices % n == 0]
    tensor = first_that_fits([PlanConfig(tensor=n, sequence=False) for n in sizes if one.shape.num_heads % n == 0])
    name = f"tensor alone, over nodes ({describe(tensor.choice)})"
    yield Naive(name, tensor.records_per_second, tensor.peak_bytes)
    pipeline = first_that_fits([PlanConfig(pipeline=n, schedule="gpipe") for n in sizes if n <= len(one.shape.blocks)])
    name = f"pipeline alone ({describe(pipeline.choice)})"
    yield Naive(name, pipeline.records_per_second, pipeline.peak_bytes)

    own = one.choice.plan.model_copy(update={"chunks": 1, "schedule": "1f1b"})
    mixed = predicted(PlanConfig(tensor=own.tensor, shard=one.devices // own.tensor, sequence=False))
    yield Naive(f"two axes (tensor {own.tensor}, zero3)", mixed.records_per_second, mixed.peak_bytes)
    plain = predicted(own.model_copy(update={"schedule": "gpipe"}))
    yield Naive("Megatron's sizes, gpipe", plain.records_per_second, plain.peak_bytes)
    apart = predicted(own, cluster.model_copy(update={"inside_bandwidth": cluster.across_bandwidth}))
    yield Naive("Megatron's sizes, tensor ranks in different nodes", apart.records_per_second, apart.peak_bytes)
    single = predict(one.shape, cluster, Choice(own, 1, ANEW), MIXED)
    beside = single.data_seconds + single.optimizer_seconds
    batches = predicted(own).choice.micro_batches
    seconds = batches * (single.seconds - beside) + beside
    yield Naive("Megatron's sizes, one micro-batch after the other", records / seconds, single.peak_bytes)


def planned_against_naive() -> Iterator[Figure]:
    series = SERIES[0]
    runs = published(series)
    one = next(each for each in runs if each.model == "145B")
    cluster = cluster_of(series, fitted(series, runs)).model_copy(update={"devices": one.devices})
    data = one.devices // (one.choice.plan.tensor * one.choice.plan.pipeline)
    records = one.choice.micro_batches * data * round(one.shape.num_records)
    best = find_layouts(
        one.shape, cluster, SearchConfig(records=records, activations=(KEEP_ALL, ANEW)), MIXED
    ).predictions[0]
    name = f"145B on {one.devices} devices, best found: {describe(best.choice)}"
    yield Figure(name=name, value=best.records_per_second, unit="records/s")
    own = predict(one.shape, cluster, one.choice, MIXED).records_per_second
    yield Figure(
        name="145B, planned over Megatron's own layout", value=best.records_per_second / own, unit="times", baseline=own
    )
    for naive in naive_layouts(one, cluster, records):
        fits = naive.peak_bytes <= cluster.memory_bytes
        yield Figure(
            name=f"145B, planned over {naive.name}{'' if fits else ', which does not fit the memory'}",
            value=best.records_per_second / naive.records_per_second,
            unit="times",
            asked=">= 2.3" if fits else None,
            baseline=naive.records_per_second,
        )


# Memory --------------------------------------------------------------------------------------------------------

WORDS: Final = 1000
ACCUMULATION: Final = 4
WORLD: Final = 4
LAYOUTS: Final = {
    "copies": PlanConfig(),
    "tensor 2, data 2": PlanConfig(tensor=2),
    "pipeline 2 1f1b, data 2": PlanConfig(pipeline=2),
    "pipeline 2 zbv, data 2": PlanConfig(pipeline=2, chunks=2, schedule="zbv"),
    "zero3 over 4": PlanConfig(shard=4, gathered_bytes=0),
    "zero3 over 4, all gathered together": PlanConfig(shard=4),
}


def build(kind: str) -> BlockStack[Any, Any]:
    inputs: dict[str, Any] = {"words": TextInput(vocabulary_size=WORDS, max_tokens=32)}
    if kind == "sandwich":
        inputs["photo"] = ImageInput(height=32, width=32)
    signature = Signature(inputs=inputs, target=Target(name="named", task="single_label", labels=("a", "b", "c")))
    torch.manual_seed(0)
    if kind == "decoder":
        return DecoderConfig(num_layers=4, experts=ExpertsConfig(num=4, num_chosen=2)).build(signature)
    return SandwichConfig(width=64, bridge=BridgeConfig(num_blocks=2)).build(signature)


def batches(kind: str, share: Share) -> list[Batch]:
    """Micro-batches of unequal size."""
    made = []
    for number in range(ACCUMULATION):
        generator = torch.Generator().manual_seed(number)
        num_records, num_words = 32 + number, 24 + number
        words = torch.randint(4, WORDS, (num_records, num_words), generator=generator)[share.of(num_records)]
        index_B = torch.arange(len(words))
        every_B = torch.ones_like(index_B, dtype=torch.bool)
        mask = torch.ones_like(words, dtype=torch.bool)
        media = {"words": MediaBatch({"ids_UT": words, "mask_UT": mask}, index_B, every_B)}
        if kind == "sandwich":
            pixels = torch.randn(num_records, 3, 32, 32, generator=generator)[share.of(num_records)]
            media["photo"] = MediaBatch({"pixels_UCHW": pixels}, index_B, every_B)
        made.append(Batch(media, index_B % 3))
    return made


def loss_of(output: Any, batch: Batch) -> Tensor:
    if hasattr(output, "loss_BN"):
        return words_loss(output)
    assert batch.target is not None
    return functional.cross_entropy(output.output_BC, batch.target, reduction="sum")


def count(rank: int, store: str, folder: str, pairs: list[tuple[str, str]]) -> None:
    """On a rank: what it holds in a step of each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    found = {}
    for kind, name in pairs:
        model = build(kind)
        layout = prepare_model(model, LAYOUTS[name], Ranks(dist.group.WORLD), accumulation=ACCUMULATION)
        parts = TrainParts(
            model,
            loss_of,
            OptimizerConfig().build(model),
            backward=layout.backward,
            reduce=layout.reduce,
            all_backward=layout.all_backward,
        )
        own = batches(kind, layout.mesh.share)
        account = Account(model, parts.optimizer)
        train_step(parts, own, num_records=134)
        with account:
            train_step(parts, own, num_records=134)
        found[f"{kind}, {name}"] = account.bytes
    write_json(Path(folder) / f"{rank}.json", found)
    dist.destroy_process_group()


def said_against_counted(*, quick: bool) -> Iterator[Figure]:
    pairs = [(kind, name) for kind in ("decoder", "sandwich") for name in LAYOUTS]
    pairs = pairs[1::4] if quick else pairs
    with tempfile.TemporaryDirectory() as folder:
        start_processes(count, (f"{folder}/store", folder, pairs), nprocs=WORLD)  # type: ignore[no-untyped-call]
        counted = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(WORLD)]
    largest = dict.fromkeys(StepBytes._fields, 0.0)
    for kind, name in pairs:
        plan = LAYOUTS[name]
        what = Rehearsal(
            build=functools.partial(build, kind),
            batches=functools.partial(batches, kind),
            loss=loss_of,
            optimizer=OptimizerConfig().build,
        )
        shape = measure_shape(build(kind), batches(kind, Share())[1], loss_of)
        shape = shape.of_records(shape.num_records * plan.tensor * plan.pipeline / WORLD)
        cluster = KNOWN["cpu"].model_copy(update={"devices": WORLD})
        formula = predict(shape, cluster, Choice(plan, ACCUMULATION))
        for stage in range(plan.pipeline):
            rank = stage * WORLD // plan.pipeline  # the first; the others of a stage differ by a record
            said = rehearse(what, plan, WORLD, rank)
            real = StepBytes(*counted[rank][f"{kind}, {name}"])
            for each in StepBytes._fields:
                largest[each] = max(largest[each], abs(getattr(said, each) / getattr(real, each) - 1))
            beside = f", pipeline rank {stage}" if plan.pipeline > 1 else ""
            for each in ("activations", "peak"):
                yield Figure(
                    name=f"{kind}, {name}{beside}: {each}",
                    value=getattr(said, each) / 2**20,
                    unit="MiB",
                    baseline=getattr(real, each) / 2**20,
                )
            error = formula.memory_bytes[stage] / real.peak - 1
            yield Figure(name=f"{kind}, {name}{beside}: error of the peak by formula", value=error, unit="")
    for each, error in largest.items():
        yield Figure(name=f"largest error of {each}, of {len(pairs)} layouts", value=error, unit="", asked="<= 0.05")


if __name__ == "__main__":
    about = "Predicted time and memory against published training runs, naive layouts and counted bytes."
    run("planner", about, measure, parts=("published", "naive", "memory"))
