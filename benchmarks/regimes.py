"""Number formats under gradients that are tiny, huge, drift, leap, or differ between modalities (claim 4).

Here        the regimes; fp16 with GradScaler's rule, bf16, and ours, beside fp32.
Elsewhere   options and the written result (harness.py).
Promise     a regime multiplies gradients on their way back and divides them again, in fp32, before the optimizer: what
            is to be learnt is the same in each, and what a format loses is all that differs. All see the same records
            in the same order from the same weights; none is tuned to a regime. A step whose gradients are not finite is
            skipped by all alike.

The task is made: a picture and three words, each of one of three noisy classes; asked is their sum modulo three, which
neither tells alone. Learning rates are the engine's own, with its warm-up: without one, steps that are skipped at
the start pass for a slow start, and a format that skips ten gains by it. A contender that has not stepped at all in the
last tenth of its steps, or whose loss there is above that of guessing, has diverged. How far ours is behind the better
fixed format is a mean over seeds, of pairs, with its 95 % interval (Student's): it is no worse where that interval
reaches zero, and the other end says how much worse it could be.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from harness import Kept, run
from scipy import stats
from torch import Tensor
from torch.nn import functional

from dougong.core.figures import Figure
from dougong.core.seeds import derive_seed
from dougong.core.signature import ImageInput, Signature, Target, TextInput
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.precision.adaptive import apply_adaptive
from dougong.engine.precision.scaling import OverflowScaling
from dougong.engine.step import TrainParts, train_step
from dougong.model.bridge import BridgeConfig
from dougong.model.encoders.image import ImageEncoderConfig
from dougong.model.encoders.text import TextEncoderConfig
from dougong.model.sandwich import SandwichConfig
from dougong.nn.batch import Batch, MediaBatch

STEPS: Final = 400
RECORDS: Final = 48
SEEDS: Final = 8
WAYS: Final = ("fp32", "fp16, GradScaler's rule", "bf16", "ours")
OPTIMIZER: Final = OptimizerConfig(learning_rate=3e-3, weight_decay=0.0)
GUESSING: Final = math.log(3)


class Regime(NamedTuple):
    """By what gradients are multiplied, step by step."""

    name: str
    of_all: Callable[[int], float]
    of_photo: float = 1.0
    """Those of the picture's encoder besides."""


def _spike(step: int) -> float:
    """In 3 of 100 steps, drawn once for all."""
    return 2.0**18 if np.random.default_rng(derive_seed(0, "spike", step)).random() < 0.03 else 1.0


REGIMES: Final = (
    Regime("as they are", lambda step: 1.0),
    Regime("tiny, 1e-9", lambda step: 2.0**-30),
    Regime("huge, 1e9", lambda step: 2.0**30),
    Regime("drifting by 2^20 in 200 steps", lambda step: 2.0 ** (0.1 * min(step, 200))),
    Regime("spikes of 2^18", _spike),
    Regime("the picture's 1e4 times the words'", lambda step: 1.0, 2.0**13),
)


def measure(quick: bool) -> Iterator[Figure]:
    found: dict[str, dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for (name, way, _), one in sorted(_all_trained(quick).items()):
        found[name][way].append(one)
    for regime in REGIMES[:: 2 if quick else 1]:
        yield from _figures(regime, found[regime.name])


def _all_trained(quick: bool) -> dict[tuple[str, str, int], dict[str, float]]:
    """By regime, way and seed; one process a core."""
    kept = Kept("regimes")
    regimes = {regime.name: regime for regime in REGIMES[:: 2 if quick else 1]}
    found, waiting = {}, []
    for job in ((name, way, seed) for name in regimes for seed in range(2 if quick else SEEDS) for way in WAYS):
        known = kept.get(repr(job))
        if known is None:
            waiting.append(job)
        else:
            found[job] = known
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        running = {pool.submit(_and_kept, job): job for job in waiting}
        for done, future in enumerate(as_completed(running), start=1):
            job = running[future]
            found[job] = future.result()
            print(f"{done} of {len(waiting)}: {', '.join(map(str, job))}: {found[job]}", file=sys.stderr)
    return found


def _and_kept(job: tuple[str, str, int]) -> dict[str, float]:
    """In the process that has loaded what ran."""
    torch.set_num_threads(1)
    name, way, seed = job
    one = trained(next(regime for regime in REGIMES if regime.name == name), way, seed)
    Kept("regimes").put(repr(job), one)
    return one


def _figures(regime: Regime, found: dict[str, list[dict[str, float]]]) -> Iterator[Figure]:
    losses = {way: np.array([each["loss"] for each in runs]) for way, runs in found.items()}
    for way, runs in found.items():
        yield Figure(
            name=f"{regime.name}: loss, {way}",
            value=float(losses[way].mean()),
            unit="nats",
            low=float(losses[way].min()),
            high=float(losses[way].max()),
            seeds=len(runs),
        )
        yield Figure(
            name=f"{regime.name}: skipped steps, {way}", value=_mean(runs, "skipped"), unit="", seeds=len(runs)
        )
    fixed = min(("fp16, GradScaler's rule", "bf16"), key=lambda way: float(losses[way].mean()))
    gain = losses["ours"] - losses[fixed]
    half = float(stats.t.ppf(0.975, len(gain) - 1) * gain.std(ddof=1) / len(gain) ** 0.5)
    yield Figure(
        name=f"{regime.name}: ours less the better fixed one ({fixed})",
        value=float(gain.mean()),
        unit="nats",
        low=float(gain.mean()) - half,
        high=float(gain.mean()) + half,
        seeds=len(gain),
    )
    yield Figure(
        name=f"{regime.name}: ours is behind it by at least (0 or less: no worse)",
        value=float(gain.mean()) - half,
        unit="nats",
        asked="<= 0",
        seeds=len(gain),
    )
    skipped = _mean(found["fp16, GradScaler's rule"], "skipped")
    yield Figure(
        name=f"{regime.name}: ours skips, of what GradScaler's rule does",
        value=_mean(found["ours"], "skipped") / skipped if skipped else _mean(found["ours"], "skipped"),
        unit="",
        asked="<= 0.333",
        baseline=skipped,
    )
    yield Figure(
        name=f"{regime.name}: ours diverged in runs",
        value=sum(each["diverged"] for each in found["ours"]),
        unit="",
        asked="<= 0",
    )
    yield Figure(
        name=f"{regime.name}: ours, share of weights in fp16 at the end", value=_mean(found["ours"], "fp16"), unit=""
    )


def _mean(runs: Sequence[dict[str, float]], name: str) -> float:
    return float(np.mean([each[name] for each in runs]))


def trained(regime: Regime, way: str, seed: int) -> dict[str, float]:
    """The mean loss on records that were not trained on, and how often a step was skipped."""
    torch.manual_seed(seed)
    model = SandwichConfig(
        width=32,
        bridge=BridgeConfig(num_blocks=1, num_heads=4),
        encoders={
            "photo": ImageEncoderConfig(width=32, num_layers=1, num_heads=4, patch_size=4),
            "words": TextEncoderConfig(width=32, num_layers=1, num_heads=4),
        },
    ).build(SIGNATURE)
    model.train()
    step, factor = 0, regime.of_photo
    photo = set(model.parts()["photo"])
    *_, last = (block for block in model.blocks if (own := set(block.parameters())) and own <= photo)
    last.forward = _louder(last.forward, factor)
    optimizer = OPTIMIZER.build(model)

    def soften(*_: Any) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= regime.of_all(step) * (factor if parameter in photo else 1.0)

    optimizer.register_step_pre_hook(soften)

    def loss(output: Any, batch: Batch) -> Tensor:
        assert batch.target is not None
        return functional.cross_entropy(output.output_BC, batch.target, reduction="sum") * regime.of_all(step)

    adaptive = apply_adaptive(model) if way == "ours" else None
    scaling = OverflowScaling() if way.startswith("fp16") else adaptive
    precision: Any = "adaptive" if way == "ours" else way.split(",")[0]
    parts = TrainParts(model, loss, optimizer, None, precision, scaling=scaling)
    skipped = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = OPTIMIZER.learning_rate_at(step, STEPS)
        report = train_step(parts, [records(derive_seed(seed, "records", step), RECORDS)], num_records=RECORDS)
        skipped.append(report.skipped)
    if adaptive is not None:
        adaptive.remove()
    model.eval()
    with torch.no_grad():
        batch = records(derive_seed(seed, "unseen"), 2000)
        assert batch.target is not None
        found = functional.cross_entropy(model(batch).output_BC, batch.target).item()
    late = skipped[-STEPS // 10 :]
    fp16 = [] if adaptive is None else [g.num_weights for g in adaptive.groups if g.format == "fp16"]
    return {
        "loss": found,
        "skipped": float(sum(skipped)),
        "diverged": float(all(late) or not found < GUESSING),
        "fp16": sum(fp16) / sum(p.numel() for p in model.parameters()),
    }


def _louder(forward: Callable[..., Any], factor: float) -> Callable[..., Any]:
    def louder(state: Any) -> Any:
        made = forward(state)
        tokens = {**made.tokens, "photo": _Louder.apply(made.tokens["photo"], factor)}  # type: ignore[no-untyped-call]
        return made._replace(tokens=tokens)

    return louder


class _Louder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.factor, None


SIGNATURE: Final = Signature(
    inputs={"words": TextInput(vocabulary_size=40, max_tokens=8), "photo": ImageInput(height=16, width=16)},
    target=Target(name="sum", task="single_label", labels=("0", "1", "2")),
)


def records(seed: int, count: int) -> Batch:
    """Shapes: B records, T tokens."""
    generator = torch.Generator().manual_seed(seed)
    seen_B = torch.randint(3, (count,), generator=generator)
    said_B = torch.randint(3, (count,), generator=generator)
    shapes = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    pixels = shapes[seen_B] + 1.5 * torch.randn(count, 3, 16, 16, generator=generator)
    words_BT = 4 + 12 * said_B[:, None] + torch.randint(12, (count, 3), generator=generator)
    other = torch.rand(count, 3, generator=generator) < 0.2
    words_BT = torch.where(other, torch.randint(4, 40, (count, 3), generator=generator), words_BT)
    every_B = torch.arange(count)
    there_B = torch.ones_like(every_B).bool()
    media = {
        "words": MediaBatch({"ids_UT": words_BT, "mask_UT": torch.ones_like(words_BT).bool()}, every_B, there_B),
        "photo": MediaBatch({"pixels_UCHW": pixels}, every_B, there_B),
    }
    return Batch(media, (seen_B + said_B) % 3)


if __name__ == "__main__":
    run("regimes", "Number formats under six regimes of gradients.", measure)
