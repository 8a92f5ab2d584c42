"""A budget for activations, against policies made by hand (claim 5).

Here        eight budgets on three models; what is held, and how long a step takes, beside every policy by hand.
Elsewhere   options and the written result (harness.py).
Promise     bytes are counted on the step that is timed; a policy by hand is beside a budget where it holds no more than
            what the budget's own choice was allowed. No policy is left out: every k-th block, the first n blocks, all
            blocks, each with everything made anew, and with products kept. Times are interleaved, a turn of all, in an
            order drawn anew. Which policy by hand is the fastest is found in some turns, and how much faster it is in
            others: the fastest of many noisy times looks faster than it is. A ratio is the median of the turns', with a
            bootstrapped 95 % interval; none by hand is faster where that interval reaches 1.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from harness import run
from paired import ratio
from resnet import RESNET_152, ResNet, pictures
from torch import Tensor
from torch.nn import functional

from dougong.core.figures import Figure
from dougong.core.signature import ImageInput, Signature, Target, TextInput
from dougong.engine.memory.account import Account
from dougong.engine.memory.blocks import measure_blocks
from dougong.engine.memory.budget import fit_budget, most_bytes
from dougong.engine.memory.recompute import KEEPS, Keep, all_alike, apply_recompute
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.step import TrainParts, train_step
from dougong.model.bridge import BridgeConfig
from dougong.model.decoder import DecoderConfig, ExpertsConfig
from dougong.model.encoders.image import ImageEncoderConfig
from dougong.model.encoders.text import TextEncoderConfig
from dougong.model.sandwich import SandwichConfig
from dougong.nn.batch import Batch, MediaBatch
from dougong.nn.block_stack import BlockStack
from dougong.objectives.generation import words_loss

WORDS: Final = 1000
BUDGETS: Final = 8
TURNS: Final = 4
"""Of all policies, by which the fastest one by hand is found."""

PAIRS: Final = 15
"""Of steps, of it and of the budget's own choice."""


class Subject(NamedTuple):
    """A model with a batch."""

    build: Callable[[], BlockStack[Any, Any]]
    batch: Batch


def measure(quick: bool, parts: Sequence[str]) -> Iterator[Figure]:
    torch.set_num_threads(1)
    for name in parts:
        yield from budgets(name, SUBJECTS[name](), quick=quick)


def budgets(name: str, subject: Subject, *, quick: bool) -> Iterator[Figure]:
    policy = Policies(subject)
    model = subject.build().train()
    profile = measure_blocks(model, loss_of, subject.batch, repeats=5)
    num_blocks = len(model.blocks)
    whole, least = policy.held(all_alike("all", num_blocks)), policy.held(all_alike("nothing", num_blocks))
    yield Figure(name=f"{name}: all kept", value=whole / 2**20, unit="MiB")
    yield Figure(name=f"{name}: all blocks made anew", value=least / 2**20, unit="MiB")
    errors = [
        most_bytes(profile, all_alike(keep, num_blocks)) / policy.held(all_alike(keep, num_blocks)) - 1
        for keep in KEEPS
    ]
    yield Figure(name=f"{name}: largest error of the predicted bytes", value=max(errors, key=abs), unit="")
    chosen: dict[float, tuple[Keep, ...]] = {}
    for place in range(1, BUDGETS + 1)[:: 4 if quick else 1]:
        room = least + (whole - least) * place / (BUDGETS + 1)
        chosen[room] = fit_budget(profile, functools.partial(_as_given, room), policy.held).keep
    hands = by_hand(num_blocks)
    seconds = policy.times({*chosen.values(), *hands.values()}, turns=2 if quick else TURNS)
    ratios = []
    for room, keep in chosen.items():
        share = room / whole
        held = policy.held(keep)
        yield Figure(
            name=f"{name}, budget {share:.2f} of all: held over it", value=held / room, unit="", asked="<= 1.05"
        )
        fitting = {hand: each for hand, each in hands.items() if policy.held(each) <= room}
        best = min(fitting, key=lambda hand: float(np.median(seconds[fitting[hand]])))
        against = f"{name}, budget {share:.2f} of all: step over the best by hand ({best})"
        if fitting[best] == keep:
            yield Figure(name=f"{against}: they are the same", value=1.0, unit="x", asked="<= 1.00")
            ratios.append(1.0)
        else:
            pairs = policy.pairs(keep, fitting[best], 2 if quick else PAIRS)
            found = ratio(against, pairs[keep], pairs[fitting[best]], None)
            yield found
            assert found.low is not None
            yield Figure(name=f"{against}: at least", value=found.low, unit="x", asked="<= 1.00")
            ratios.append(found.value)
        yield ratio(
            f"{name}, budget {share:.2f} of all: step over keeping all",
            seconds[keep],
            seconds[all_alike("all", num_blocks)],
            None,
        )
    middle = float(np.median(ratios))
    yield Figure(name=f"{name}: a step over the best by hand, median of the budgets", value=middle, unit="x")


def _as_given(room: float, whole: int) -> float:
    return room


def by_hand(num_blocks: int) -> dict[str, tuple[Keep, ...]]:
    """What people write into a configuration."""
    found: dict[str, tuple[Keep, ...]] = {"all kept": all_alike("all", num_blocks)}
    less: Keep
    for less in ("nothing", "products"):
        for every in (1, 2, 3, 4):
            found[f"{less} kept of every {every}. block"] = tuple(
                less if place % every == 0 else "all" for place in range(num_blocks)
            )
        for first in sorted({round(num_blocks * share / 8) for share in range(1, 8)} - {0, num_blocks}):
            found[f"{less} kept of the first {first}"] = tuple(
                less if place < first else "all" for place in range(num_blocks)
            )
    return found


class Policies:
    """One model under any of them."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._held: dict[tuple[Keep, ...], int] = {}

    def parts(self, keep: Sequence[Keep]) -> TrainParts:
        model = self.subject.build().train()
        apply_recompute(model, keep)
        return TrainParts(model, loss_of, OptimizerConfig().build(model))

    def held(self, keep: Sequence[Keep]) -> int:
        """Bytes of activations, at their most, counted in a step."""
        key = tuple(keep)
        if key not in self._held:
            parts = self.parts(key)
            self.step(parts)
            account = Account(parts.model, parts.optimizer)
            gc.collect()
            with account:
                self.step(parts)
            self._held[key] = account.bytes.activations
        return self._held[key]

    def step(self, parts: TrainParts) -> None:
        train_step(parts, [self.subject.batch], num_records=self.subject.batch.num_records)

    def times(self, keeps: set[tuple[Keep, ...]], turns: int) -> dict[tuple[Keep, ...], list[float]]:
        """Seconds of a step, by turn. All share one model's weights: what is made anew changes none of its numbers."""
        order = sorted(keeps)
        found: dict[tuple[Keep, ...], list[float]] = {keep: [] for keep in order}
        for turn in range(turns + 1):
            for place in np.random.default_rng(turn).permutation(len(order)):
                keep = order[place]
                parts = self.parts(keep)
                gc.collect()
                self.step(parts)
                started = time.perf_counter()
                self.step(parts)
                if turn:
                    found[keep].append(time.perf_counter() - started)
        return found

    def pairs(self, one: Sequence[Keep], other: Sequence[Keep], count: int) -> dict[tuple[Keep, ...], list[float]]:
        """Seconds of steps of two, by turns."""
        ways = {tuple(keep): self.parts(keep) for keep in (one, other)}
        found: dict[tuple[Keep, ...], list[float]] = {keep: [] for keep in ways}
        for turn in range(count + 1):
            for keep in list(ways)[:: 1 if turn % 2 else -1]:
                gc.collect()
                started = time.perf_counter()
                self.step(ways[keep])
                if turn:  # the first ones are slower
                    found[keep].append(time.perf_counter() - started)
        return found


def loss_of(output: Any, batch: Batch) -> Tensor:
    if hasattr(output, "loss_BN"):
        return words_loss(output)
    assert batch.target is not None
    return functional.cross_entropy(output.output_BC, batch.target, reduction="sum")


def decoder() -> Subject:
    signature = Signature(
        inputs={"words": TextInput(vocabulary_size=WORDS, max_tokens=64)},
        target=Target(name="named", task="single_label", labels=("a", "b", "c")),
    )
    config = DecoderConfig(width=128, num_layers=10, experts=ExpertsConfig(num=4, num_chosen=2, hidden=128))

    def build() -> BlockStack[Any, Any]:
        torch.manual_seed(0)
        return config.build(signature)

    return Subject(build, Batch({"words": words(16, 64)}, torch.arange(16) % 3))


def sandwich() -> Subject:
    signature = Signature(
        inputs={
            "words": TextInput(vocabulary_size=WORDS, max_tokens=32),
            "photo": ImageInput(height=64, width=64),
        },
        target=Target(name="named", task="single_label", labels=("a", "b", "c")),
    )
    config = SandwichConfig(
        width=128,
        bridge=BridgeConfig(num_blocks=4),
        encoders={
            "photo": ImageEncoderConfig(width=192, num_layers=6, num_heads=6),
            "words": TextEncoderConfig(width=128, num_layers=4, num_heads=4),
        },
    )

    def build() -> BlockStack[Any, Any]:
        torch.manual_seed(0)
        return config.build(signature)

    every_B = torch.arange(16)
    pixels = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    photo = MediaBatch({"pixels_UCHW": pixels}, every_B, torch.ones_like(every_B).bool())
    return Subject(build, Batch({"words": words(16, 32), "photo": photo}, every_B % 3))


def words(records: int, tokens: int) -> MediaBatch:
    ids = torch.randint(4, WORDS, (records, tokens), generator=torch.Generator().manual_seed(0))
    every_B = torch.arange(records)
    return MediaBatch({"ids_UT": ids, "mask_UT": torch.ones_like(ids).bool()}, every_B, torch.ones_like(every_B).bool())


def resnet() -> Subject:
    return Subject(lambda: ResNet(RESNET_152), pictures(4, 64))


SUBJECTS: Final[dict[str, Callable[[], Subject]]] = {"decoder": decoder, "sandwich": sandwich, "resnet-152": resnet}


if __name__ == "__main__":
    about = "What a budget for activations costs, on three models, beside policies made by hand."
    run("activations", about, measure, parts=tuple(SUBJECTS))
