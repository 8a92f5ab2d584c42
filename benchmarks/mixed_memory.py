"""What 16-bit weights and few-bit state save on ResNet-152, and what accuracy they cost (claim 3).

Here        the bytes of a step, by what they are for, in every way; the accuracy of a small ResNet and of the sandwich.
Elsewhere   options and the written result (harness.py); counting (engine/memory/account.py).
Promise     bytes are those of every tensor that a whole step of the engine makes, by size and without numbers; the part
            `check` holds such a count to one of a real step, and counts the convolutions that a step carries out. The
            sum is of weights, gradients, optimizer state and activations, each at its most; the peak is of all at one
            time. Accuracy is of test records, of the fp32 network that a run leaves; all ways see the same records in
            the same order from the same weights, with fp32's settings. None is tuned.

Without recomputing convolutions: what they make is kept, in 16 bits, and all between them is made anew, from the inputs
of a few layers at a time. Norm and activation made anew are after Rota Bulo et al. 2018 (arXiv:1712.02616), who invert
them in place.
"""

from __future__ import annotations

import functools
import gc
import importlib
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from harness import Kept, run
from resnet import RESNET_152, ResNet, pictures
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from dougong.core.config import parse
from dougong.core.figures import Figure
from dougong.core.seeds import derive_seed
from dougong.engine.memory.account import StepBytes
from dougong.engine.memory.recompute import Keep, all_alike, apply_recompute
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.planner.rehearse import Rehearsal, rehearse
from dougong.engine.precision.adamw import NarrowAdamW
from dougong.engine.precision.choice import Chosen
from dougong.engine.precision.states import States
from dougong.engine.precision.weights import Narrowed, Weights, apply_weights, widen_weights
from dougong.engine.step import TrainParts, train_step
from dougong.nn.batch import Batch, MediaBatch
from dougong.recipes.recipe import Recipe
from dougong.recipes.run import train_recipe

MIB: Final = 2**20
RECORDS: Final = 32
PIXELS: Final = 224
SEEDS: Final = 3


class Way(NamedTuple):
    """How a ResNet-152 is trained."""

    precision: Chosen = "bf16"
    weights: Weights = "bf16-stochastic"
    states: States | None = "8bit"
    """None: SGD with momentum, in fp32."""

    keep: Keep = "all"
    together: tuple[int, ...] | None = None
    """Layers that are made anew at a time, by stage. None: each by itself."""

    asked: str | None = None


PRODUCTS: Final = (3, 4, 4, 3)
BLOCKS: Final = (1, 2, 4, 1)
WAYS: Final[dict[str, Way]] = {
    "fp32, SGD with momentum": Way("fp32", "fp32", None),
    "bf16 products, SGD with momentum": Way("bf16", "fp32", None),
    "fp32, AdamW": Way("fp32", "fp32", "fp32"),
    "16-bit weights, masters, AdamW": Way(weights="bf16-masters", states="fp32"),
    "16-bit weights, 8-bit state": Way(),
    "16-bit weights, 4-bit state": Way(states="4bit"),
    "norms and ReLU of each layer anew": Way(keep="products"),
    "norms and ReLU anew": Way(keep="products", together=PRODUCTS, asked=">= 0.6"),
    "norms and ReLU anew, Kahan": Way(weights="bf16-kahan", keep="products", together=PRODUCTS, asked=">= 0.6"),
    "norms and ReLU anew, masters": Way(weights="bf16-masters", keep="products", together=PRODUCTS, asked=">= 0.6"),
    "norms and ReLU anew, 4-bit state": Way(states="4bit", keep="products", together=PRODUCTS, asked=">= 0.6"),
    "each layer anew": Way(keep="nothing"),
    "layers anew": Way(keep="nothing", together=BLOCKS, asked=">= 0.8"),
    "layers anew, Kahan": Way(weights="bf16-kahan", keep="nothing", together=BLOCKS, asked=">= 0.8"),
    "layers anew, 4-bit state": Way(states="4bit", keep="nothing", together=BLOCKS, asked=">= 0.8"),
}
SHALLOW: Final = (3, 2, 2, 1)
"""Layers of what `check` carries out for real."""

BASELINE: Final = "fp32, SGD with momentum"
OF_QUICK: Final = (BASELINE, "16-bit weights, 8-bit state", "norms and ReLU anew", "layers anew")

STEPPED: Final[dict[str, tuple[Weights, States]]] = {
    "stochastic": ("bf16-stochastic", "fp32"),
    "stochastic, 8-bit state": ("bf16-stochastic", "8bit"),
    "Kahan": ("bf16-kahan", "fp32"),
    "Kahan, 8-bit state": ("bf16-kahan", "8bit"),
    "Kahan, 4-bit state": ("bf16-kahan", "4bit"),
    "masters": ("bf16-masters", "fp32"),
}
"""Whose accuracy is measured, beside fp32's."""

OF_SANDWICH: Final = ("stochastic, 8-bit state", "Kahan, 8-bit state", "masters")
"""A step in bf16 takes a CPU without bf16 units several times as long."""


def measure(quick: bool, parts: Sequence[str]) -> Iterator[Figure]:
    torch.set_num_threads(1)
    for part in parts:
        yield from PARTS[part](quick)


# Bytes -------------------------------------------------------------------------------------------------------


def in_bytes(quick: bool) -> Iterator[Figure]:
    kept = Kept("mixed_memory")
    whole: StepBytes | None = None
    for name, way in WAYS.items():
        if quick and name not in OF_QUICK:
            continue
        known = kept.get(f"bytes of {name}")
        found = counted(way, RECORDS, PIXELS) if known is None else StepBytes(*known)
        kept.put(f"bytes of {name}", list(found))
        print(f"{name}: {found}", file=sys.stderr)
        whole = whole or found
        for what, size in found._asdict().items():
            yield Figure(name=f"{name}: {what}", value=size / MIB, unit="MiB")
        yield Figure(name=f"{name}: sum", value=total(found) / MIB, unit="MiB", baseline=total(whole) / MIB)
        yield Figure(name=f"{name}: less in sum", value=1 - total(found) / total(whole), unit="", asked=way.asked)
        yield Figure(name=f"{name}: less at the peak", value=1 - found.peak / whole.peak, unit="", asked=way.asked)


def total(found: StepBytes) -> int:
    return found.weights + found.gradients + found.optimizer + found.activations


def counted(
    way: Way, records: int, pixels: int, *, depths: Sequence[int] = RESNET_152, real: bool = False
) -> StepBytes:
    """A step's bytes."""
    gc.collect()
    rehearsal = Rehearsal(
        build=lambda: ResNet(depths, together=way.together),
        batches=lambda share: [pictures(records, pixels)],
        loss=loss_of,
        optimizer=functools.partial(optimizer_of, way),
        precision=way.precision,
        keep=all_alike(way.keep, len(ResNet(depths, together=way.together).blocks)),
        unreal=not real,
        weights=way.weights,
    )
    return rehearse(rehearsal, PlanConfig(), world=1, rank=0)


def optimizer_of(way: Way, model: nn.Module, narrowed: Narrowed) -> Optimizer:
    if way.states is None:
        return SGD(model.parameters(), lr=0.1, momentum=0.9)
    return OptimizerConfig(states=way.states).build(model, narrowed)


def loss_of(output: Any, batch: Batch) -> Tensor:
    assert batch.target is not None
    return functional.cross_entropy(output.output_BC, batch.target, reduction="sum")


def check(quick: bool) -> Iterator[Figure]:
    """Counts without numbers beside counts of real steps: of a network of fewer layers, as wide, and small pictures."""
    for name in OF_QUICK[1:] if quick else (*OF_QUICK, "norms and ReLU anew, Kahan"):
        way = WAYS[name]
        unreal, real = (counted(way, 4, 64, depths=SHALLOW, real=real) for real in (False, True))
        yield Figure(
            name=f"{name}: counted without numbers over a real step", value=total(unreal) / total(real), unit=""
        )
        layers = sum(isinstance(module, nn.Conv2d) for module in ResNet(SHALLOW).modules())
        yield Figure(
            name=f"{name}: convolutions carried out, of what the network has",
            value=convolutions(way) / layers,
            unit="",
            asked="<= 1" if way.keep != "nothing" else None,
        )


class _Convolutions(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch ships it without types
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += int(func is torch.ops.aten.convolution.default)
        return func(*args, **(kwargs or {}))


def convolutions(way: Way) -> int:
    """Forward ones, in a step."""
    model = ResNet(SHALLOW, together=way.together).train()
    narrowed = apply_weights(model, way.weights)
    apply_recompute(model, all_alike(way.keep, len(model.blocks)))
    parts = TrainParts(model, loss_of, optimizer_of(way, model, narrowed), precision=way.precision)
    with _Convolutions() as counting:
        train_step(parts, [pictures(4, 64)], num_records=4)
    return int(counting.count)


# Accuracy ----------------------------------------------------------------------------------------------------


def digits(quick: bool) -> Iterator[Figure]:
    """A ResNet of basic layers on scikit-learn's 1,797 digits, of which a third is for judging."""
    yield from _accuracy("digits", quick, trained_on_digits, 20 if quick else 240, tuple(STEPPED))


def trained_on_digits(weights: Weights, states: States, seed: int, steps: int) -> float:
    found = importlib.import_module("sklearn.datasets").load_digits()
    pixels = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    pixels = functional.interpolate(pixels, scale_factor=4)  # the stem divides sides by four
    target = torch.tensor(found.target)
    order = torch.from_numpy(np.random.default_rng(derive_seed(seed, "split")).permutation(len(target)))
    test, train = order[: len(order) // 3], order[len(order) // 3 :]

    model = ResNet((1, 1, 1), classes=10, widths=(16, 32, 64), basic=True, channels=1, seed=seed).train()
    config = OptimizerConfig(learning_rate=2e-3, states=states)
    narrowed = apply_weights(model, weights)
    optimizer = config.build(model, narrowed, seed=seed)
    parts = TrainParts(model, loss_of, optimizer, precision="fp32" if weights == "fp32" else "bf16")
    random = np.random.default_rng(derive_seed(seed, "order"))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate_at(step, steps)
        chosen = train[torch.from_numpy(random.choice(len(train), 32, replace=False))]
        train_step(parts, [images(pixels[chosen], target[chosen])], num_records=32)
    if isinstance(optimizer, NarrowAdamW):
        widen_weights(optimizer.exact_weights())
    model.eval()
    with torch.no_grad():
        answer = model(images(pixels[test], target[test])).output_BC.argmax(dim=1)
    return float((answer == target[test]).double().mean())


def images(pixels: Tensor, target: Tensor) -> Batch:
    every_B = torch.arange(len(target))
    return Batch({"image": MediaBatch({"pixels_UCHW": pixels}, every_B, torch.ones_like(every_B).bool())}, target)


def easy_vqa(quick: bool) -> Iterator[Figure]:
    """The sandwich on pictures and written questions, official test pictures."""
    yield from _accuracy("easy-VQA", quick, trained_on_easy_vqa, 20 if quick else 600, OF_SANDWICH)


def trained_on_easy_vqa(weights: Weights, states: States, seed: int, steps: int) -> float:
    encoder = {"width": 64, "num_layers": 1, "num_heads": 4, "feedforward_ratio": 2.0}
    values = {
        "name": "mixed-memory",
        "seed": seed,
        "data": {
            "source": "easy-vqa",
            "target": "answer",
            "modalities": ["image", "question"],
            "columns": {"voice": "ignore", "image_id": "ignore", "speech": "ignore"},
            "validation_share": 0.03,
            "preparation": {"image_size": 32, "image_augment": {"flip": True, "shift_pixels": 2}},
            "loader": {"batch_size": 64, "group_by": "image", "records_per_medium": 4},
        },
        "model": {
            "width": 64,
            "bridge": {"num_heads": 4},
            "encoders": {
                "image": {"kind": "image", **encoder, "patch_size": 4, "stem": "convolution", "pool": 2},
                "question": {"kind": "text", **encoder},
            },
        },
        "train": {
            "precision": "fp32" if weights == "fp32" else "bf16",
            "weights": weights,
            "steps": steps,
            "evaluate_every": steps,
            "checkpoint_seconds": None,
            "keep": 1,
            "optimizer": {
                "learning_rate": 1.5e-3,
                "betas": [0.9, 0.95],
                "weight_decay": 0.05,
                "warmup_ratio": 0.1,
                "states": states,
            },
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        result = train_recipe(parse(Recipe, values, where="mixed_memory"), Path(folder) / "run", quiet=True)
    return float(result.evaluations["all"].metrics["accuracy"])


def _accuracy(of: str, quick: bool, trained: Any, steps: int, names: Sequence[str]) -> Iterator[Figure]:
    kept = Kept("mixed_memory")
    ways: dict[str, tuple[Weights, States]] = {"fp32": ("fp32", "fp32"), **{name: STEPPED[name] for name in names}}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for seed in range(1 if quick else SEEDS):
        for name, (weights, states) in ways.items():
            key = f"{of}, {name}, {seed}, {steps} steps"
            accuracy = kept.get(key)
            if accuracy is None:
                accuracy = trained(weights, states, seed, steps)
                kept.put(key, accuracy)
            found[name].append(accuracy)
            print(f"{key}: {accuracy:.4f}", file=sys.stderr)
    for name, values in found.items():
        yield _spread(f"{of}: accuracy, {name}", values)
    for name in names:
        ratios = [mine / whole for mine, whole in zip(found[name], found["fp32"], strict=True)]
        yield _spread(f"{of}: accuracy over fp32's, {name}", ratios, asked=">= 0.995")


def _spread(name: str, values: Sequence[float], asked: str | None = None) -> Figure:
    """Their mean, between the lowest and the highest of the seeds."""
    mean = math.fsum(values) / len(values)
    return Figure(name=name, value=mean, unit="", asked=asked, low=min(values), high=max(values), seeds=len(values))


PARTS: Final = {"bytes": in_bytes, "check": check, "digits": digits, "easy-vqa": easy_vqa}


if __name__ == "__main__":
    about = "Memory of ResNet-152 in 16 bits and fewer, of 32 pictures of 224 pixels, and what accuracy that costs."
    run("mixed_memory", about, measure, parts=tuple(PARTS))
