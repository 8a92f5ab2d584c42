"""Blocks compiled together, beside blocks made anew one by one (claim 6).

Here        two models in two formats; which segments are chosen, and how long a step then takes.
Elsewhere   options and the written result (harness.py).
Promise     both make all activations anew, and segments count only where they take no more memory, as torch's allocator
            tells for both. What is chosen is measured again by other steps, optimizer and all, interleaved; a ratio is
            the median of the pairs' ratios. Compiling is not in a step's time and is told beside it. Where nothing
            pays, segments are off, and the ratio that is told is that of the best that was tried.

The processor matters: with units for bf16, casts are much of a step and compiling saves them. Without, torch's products
of bf16 are slow in themselves, and most of what a segment gains is that it carries them out in fp32
(engine/precision/widened.py); so the same blocks one by one in fp32 are timed beside it, which have no such products.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from activations import Subject, loss_of, words
from harness import run
from paired import ratio

from dougong.core.figures import Figure
from dougong.core.signature import ImageInput, Signature, Target, TextInput
from dougong.engine.memory.allocated import most_allocated
from dougong.engine.memory.recompute import all_alike, apply_recompute
from dougong.engine.memory.segments import apply_segments, choose_segments
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.precision.choice import Chosen
from dougong.engine.step import TrainParts, train_step
from dougong.model.bridge import BridgeConfig
from dougong.model.decoder import DecoderConfig
from dougong.model.encoders.image import ImageEncoderConfig
from dougong.model.encoders.text import TextEncoderConfig
from dougong.model.sandwich import SandwichConfig
from dougong.nn.batch import Batch, MediaBatch
from dougong.nn.block_stack import BlockStack

WORDS: Final = 1000
PAIRS: Final = 15
FORMATS: Final[tuple[Chosen, ...]] = ("bf16", "fp32")


def measure(quick: bool, parts: Sequence[str]) -> Iterator[Figure]:
    torch.set_num_threads(1)
    for part in parts:
        kind, precision = part.split("-")
        yield from beside_blocks(part, SUBJECTS[kind](), "bf16" if precision == "bf16" else "fp32", quick=quick)


def beside_blocks(name: str, subject: Subject, precision: Chosen, *, quick: bool) -> Iterator[Figure]:
    model = subject.build().train()
    choice = choose_segments(
        model,
        loss_of,
        subject.batch,
        precision=precision,
        sizes=(1, 2) if quick else None,
        pairs=3 if quick else 7,
    )
    on = choice.size is not None
    yield Figure(name=f"{name}: blocks in a segment (0: off)", value=float(choice.size or 0), unit="")
    for each in choice.tried:
        yield Figure(
            name=f"{name}, segments of {each.size}: bytes over blocks one by one",
            value=each.bytes / choice.bytes,
            unit="",
        )
        yield Figure(name=f"{name}, segments of {each.size}: compiling", value=each.compile_seconds, unit="s")
        if each.ratio is not None:
            yield Figure(name=f"{name}, segments of {each.size}: times as fast", value=each.ratio, unit="x")
    timed = [each for each in choice.tried if each.ratio is not None]
    if not timed:
        return  # all take more memory
    size = choice.size or max(timed, key=lambda each: each.ratio or 0.0).size
    steps = [step_of(subject, precision, None), step_of(subject, precision, size), step_of(subject, "fp32", None)]
    held = []
    for step in steps:
        step()
        step()
        held.append(most_allocated(step))
    seconds: list[list[float]] = [[], [], []]
    for _ in range(3 if quick else PAIRS):
        for step, found in zip(steps, seconds, strict=True):
            gc.collect()
            started = time.perf_counter()
            step()
            found.append(time.perf_counter() - started)
    yield Figure(
        name=f"{name}, segments of {size} ({'on' if on else 'off'}): bytes of a step over blocks one by one",
        value=held[1] / held[0],
        unit="",
        asked="<= 1.00" if on else None,
    )
    blocks, segments, exact = seconds
    told = f"{name}, segments of {size} ({'on' if on else 'off'})"
    yield ratio(f"{told}: times as fast a step", blocks, segments, ">= 1.20" if precision == "bf16" and on else None)
    if precision == "bf16":
        yield ratio(f"{told}: times as fast as blocks one by one in fp32", exact, segments, None)


def step_of(subject: Subject, precision: Chosen, size: int | None) -> Callable[[], Any]:
    """A training step with segments, or without any."""
    model: BlockStack[Any, Any] = subject.build().train()
    if size is None:
        apply_recompute(model, all_alike("nothing", len(model.blocks)))
    else:
        apply_segments(model, size)
    parts = TrainParts(model, loss_of, OptimizerConfig().build(model), precision=precision)
    return lambda: train_step(parts, [subject.batch], num_records=subject.batch.num_records)


def decoder() -> Subject:
    signature = Signature(
        inputs={"words": TextInput(vocabulary_size=WORDS, max_tokens=32)},
        target=Target(name="named", task="single_label", labels=("a", "b", "c")),
    )
    config = DecoderConfig(width=64, num_layers=8, experts=None)

    def build() -> BlockStack[Any, Any]:
        torch.manual_seed(0)
        return config.build(signature)

    return Subject(build, Batch({"words": words(8, 32)}, torch.arange(8) % 3))


def sandwich() -> Subject:
    signature = Signature(
        inputs={
            "words": TextInput(vocabulary_size=WORDS, max_tokens=32),
            "photo": ImageInput(height=32, width=32),
        },
        target=Target(name="named", task="single_label", labels=("a", "b", "c")),
    )
    config = SandwichConfig(
        width=64,
        bridge=BridgeConfig(num_blocks=2),
        encoders={
            "photo": ImageEncoderConfig(width=64, num_layers=4, num_heads=4),
            "words": TextEncoderConfig(width=64, num_layers=4, num_heads=4),
        },
    )

    def build() -> BlockStack[Any, Any]:
        torch.manual_seed(0)
        return config.build(signature)

    every_B = torch.arange(8)
    pixels = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    photo = MediaBatch({"pixels_UCHW": pixels}, every_B, torch.ones_like(every_B).bool())
    return Subject(build, Batch({"words": words(8, 32), "photo": photo}, every_B % 3))


SUBJECTS: Final[dict[str, Callable[[], Subject]]] = {"decoder": decoder, "sandwich": sandwich}


if __name__ == "__main__":
    about = "Blocks compiled and made anew together, beside blocks made anew one by one."
    run("segments", about, measure, parts=tuple(f"{kind}-{precision}" for kind in SUBJECTS for precision in FORMATS))
