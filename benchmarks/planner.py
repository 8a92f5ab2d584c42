"""The planner's predictions against published training runs, each left out when the constants were fitted.

Here        the runs, the fit, and what is made of it (claim 2 of docs/claims.md).
Elsewhere   the formulas (engine/planner/predict.py); options and the written result (harness.py).
Promise     a run is predicted by constants that were fitted on the others of its series. Peaks, bandwidths and layouts
            are as published; what is not published is said here.

Series      Megatron-LM on A100 (Narayanan et al. 2021, table 1): activations made anew, no sharing of tokens, attention
            scores written out. Megatron-LM on H100 (README, 2024): nothing made anew, tokens shared out, flash
            attention, gradients' exchange hidden; its micro-batch is not published and taken as 1.
Fitted      the share of a peak that matrix products reach, bytes between them, and on A100 those of attention scores:
            two or three numbers for nine or ten runs.

"planned against naive" is the predicted throughput of the best layout found for Megatron's 145 B run on its 1536 GPUs,
over that of the layout one would take first: see NAIVE.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from harness import run
from scipy.optimize import least_squares
from scipy.stats import spearmanr

from dougong.core.figures import Figure
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.planner.cluster import KNOWN, ClusterConfig
from dougong.engine.planner.predict import BytesConfig, Choice, predict
from dougong.engine.planner.search import SearchConfig, describe, find_layouts
from dougong.engine.planner.shape import ModelShape, transformer_shape

PUBLISHED: Final = Path(__file__).parents[2] / "shared" / "data" / "published_runs.json"
MIXED: Final = BytesConfig(weight=2, gradient=4, optimizer=12)
"""Weights in 16 bits, gradients added up in 32, AdamW with weights in 32."""


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
START: Final = {"matmul_efficiency": 0.65, "touched_factor": 15.0, "score_factor": 13.0}


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
    choice = Choice(plan, micro_batches, series.recompute)
    return Run(row["model"], shape, row["gpus"], choice, row["tflops_gpu"], step)


def throughput(one: Run, cluster: ClusterConfig) -> float:
    """Predicted, in the units of `measured`."""
    found = predict(one.shape, cluster.model_copy(update={"devices": one.devices}), one.choice, MIXED)
    return one.step_flops / found.seconds / one.devices / 1e12


def cluster_of(series: Series, constants: Mapping[str, float]) -> ClusterConfig:
    """The series' devices with these constants."""
    return KNOWN[series.cluster].model_copy(update={**series.fixed, **constants})


def fitted(series: Series, runs: Sequence[Run]) -> dict[str, float]:
    """The free constants, by least squares of the logarithms."""

    def errors(logarithms: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        cluster = cluster_of(series, dict(zip(series.free, np.exp(logarithms), strict=True)))
        return np.array([math.log(throughput(one, cluster) / one.measured) for one in runs])

    start = np.log([START[name] for name in series.free])
    found = least_squares(errors, start, diff_step=0.02, xtol=1e-4, ftol=1e-5)
    return dict(zip(series.free, np.exp(found.x).tolist(), strict=True))


def measure(quick: bool) -> Iterator[Figure]:
    for series in SERIES:
        runs = published(series)
        whole = fitted(series, runs)
        for name, value in whole.items():
            yield Figure(name=f"{series.name}: {name}, fitted on all", value=value, unit="")
        errors, predicted = [], []
        for place, one in enumerate(runs):
            constants = whole if quick else fitted(series, [*runs[:place], *runs[place + 1 :]])
            found = throughput(one, cluster_of(series, constants))
            predicted.append(found)
            errors.append(abs(found / one.measured - 1))
            yield Figure(
                name=f"{series.name}: {one.model}, {describe(one.choice)}",
                value=found,
                unit="TFLOP/s",
                baseline=one.measured,
            )
        yield Figure(name=f"{series.name}: largest error", value=max(errors), unit="", asked="<= 0.10", seeds=len(runs))
        yield Figure(name=f"{series.name}: mean error", value=float(np.mean(errors)), unit="", seeds=len(runs))
        ranks = float(spearmanr(predicted, [one.measured for one in runs]).statistic)
        yield Figure(name=f"{series.name}: rank correlation", value=ranks, unit="", seeds=len(runs))
    yield from planned_against_naive()


NAIVE: Final = {
    "tensor 8, the rest copies with spread weights (zero3)": PlanConfig(tensor=8, shard=192, sequence=False),
    "Megatron's own sizes, all forwards before all backwards": PlanConfig(
        tensor=8, pipeline=8, schedule="gpipe", sequence=False
    ),
    "as many pipeline ranks as fit, no tensor ranks": PlanConfig(pipeline=64, schedule="gpipe"),
}
"""Layouts that one could take without a plan."""


def planned_against_naive() -> Iterator[Figure]:
    series = SERIES[0]
    runs = published(series)
    one = next(each for each in runs if each.model == "145B")
    cluster = cluster_of(series, fitted(series, runs)).model_copy(update={"devices": one.devices})
    data = one.devices // (one.choice.plan.tensor * one.choice.plan.pipeline)
    records = one.choice.micro_batches * data * round(one.shape.num_records)
    best = find_layouts(one.shape, cluster, SearchConfig(records=records, recompute=True), MIXED).predictions[0]
    name = f"145B on {one.devices} devices, best found: {describe(best.choice)}"
    yield Figure(name=name, value=best.records_per_second, unit="records/s")
    for what, plan in NAIVE.items():
        step = one.devices // (plan.tensor * plan.pipeline) * round(one.shape.num_records)
        naive = predict(one.shape, cluster, Choice(plan, records // step, True), MIXED)
        fits = naive.peak_bytes <= cluster.memory_bytes
        yield Figure(
            name=f"145B, planned over: {what}{'' if fits else ' (does not fit the memory)'}",
            value=best.records_per_second / naive.records_per_second,
            unit="times",
            baseline=naive.records_per_second,
        )


if __name__ == "__main__":
    run("planner", "Predicted against published training runs.", measure)
