"""Trainings of a second each, into which faults are put.

Here        Job, SUBJECTS: sandwich (picture, words and a tone), decoder, a convolutional network, a recurrent network
            that reads words and numbers, and a dilated one that hears waves; each by a seed, half (training or test)
            and settings drawn at random.
Elsewhere   the faults (fault_operators.py); carrying jobs out and judging findings (diagnose.py).
Promise     the two halves have other data and other seeds. The recurrent and the dilated network are of the test half
            alone: no rule was made on them. Everything is made up, and learnt in some 64 steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from dougong.core.seeds import derive_seed
from dougong.core.signature import ImageInput, SignalInput, Signature, Target, TextInput
from dougong.model.bridge import BridgeConfig
from dougong.model.decoder import DecoderConfig
from dougong.model.encoders.image import ImageEncoderConfig
from dougong.model.encoders.signal import SignalEncoderConfig
from dougong.model.encoders.text import TextEncoderConfig
from dougong.model.sandwich import SandwichConfig
from dougong.nn.batch import Batch, MediaBatch

STEPS: Final = 64
JUDGED: Final = 256


class Settings(NamedTuple):
    """What healthy people vary."""

    learning_rate: float
    batch_size: int
    weight_decay: float
    dropout: float
    clip: float | None
    optimizer: str
    schedule: str
    smoothing: float

    @classmethod
    def drawn(cls, random: np.random.Generator) -> Settings:
        optimizer = str(random.choice(["adamw", "adamw", "adamw", "sgd"]))
        return cls(
            learning_rate=float(random.choice([1.0, 2.0, 4.0])) * 1e-3,
            batch_size=int(random.choice([16, 24, 32])),
            weight_decay=float(random.choice([0.0, 0.01, 0.1])) if optimizer == "adamw" else 0.0,
            dropout=float(random.choice([0.0, 0.0, 0.1, 0.2])),
            clip=[None, 1.0][int(random.integers(2))],
            optimizer=optimizer,
            schedule=str(random.choice(["constant", "cosine", "warm-up"])),
            smoothing=float(random.choice([0.0, 0.0, 0.1])),
        )


Example = tuple[Any, Tensor]
"""Inputs, and targets."""

Spoil = Callable[[Any, Tensor, Generator], Example]


@dataclass
class Job:
    """A training that can be spoilt before it begins."""

    subject: str
    model: nn.Module
    settings: Settings
    seed: int
    make: Callable[[int, Generator], Example]
    scores: Callable[[nn.Module, Any], Tensor]
    """(N, C), a row for each target."""

    num_classes: int
    hidden: list[str]
    """Modules in the middle, whose weights are matrices."""

    head: str
    encoders: dict[str, list[str]]
    """Of each input that has modules of its own, their paths."""

    spoil: list[Spoil] = field(default_factory=list)
    """What is done to batches in training."""

    spoil_judging: list[Spoil] = field(default_factory=list)
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the optimizer's settings."""

    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    rate_at: Callable[[int], float] | None = None
    """The schedule, a factor."""

    clears: bool = True
    judges_in_eval: bool = True
    held: Callable[[nn.Module], list[nn.Parameter]] | None = None
    """The parameters that the optimizer is given."""

    slow: set[int] = field(default_factory=set)
    """Parameters, by identity, whose rate is multiplied by `slow_factor`."""

    slow_factor: float = 1.0
    after_backward: Callable[[nn.Module], None] | None = None
    after_step: Callable[[nn.Module], None] | None = None

    def batch(self, step: int) -> Example:
        generator = Generator().manual_seed(derive_seed(self.seed, "batch", step))
        inputs, target = self.make(self.settings.batch_size, generator)
        for spoil in self.spoil:
            inputs, target = spoil(inputs, target, generator)
        return inputs, target

    def held_out(self) -> Example:
        generator = Generator().manual_seed(derive_seed(self.seed, "held out"))
        inputs, target = self.make(JUDGED, generator)
        for spoil in self.spoil_judging:
            inputs, target = spoil(inputs, target, generator)
        return inputs, target

    def factor(self, step: int) -> float:
        if self.rate_at is not None:
            return self.rate_at(step)
        if self.settings.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * step / STEPS)) * 0.95 + 0.05
        if self.settings.schedule == "warm-up":
            return min(1.0, (step + 1) / 16)
        return 1.0

    def loss_of(self, scores: Tensor, target: Tensor) -> Tensor:
        if self.loss is not None:
            return self.loss(scores, target)
        return functional.cross_entropy(scores, target, label_smoothing=self.settings.smoothing)


# Sandwich ------------------------------------------------------------------------------------------------------------

WORDS: Final = 24
LONGEST: Final = 9
SAMPLES: Final = 64


def sandwich(seed: int, half: str, settings: Settings) -> Job:
    """Two colours, two orders of words, two tones: eight classes."""
    test = half == "test"
    width = 40 if test else 32
    signature = Signature(
        inputs={
            "photo": ImageInput(height=16, width=16),
            "words": TextInput(vocabulary_size=WORDS, max_tokens=LONGEST),
            "tone": SignalInput(num_channels=1, max_samples=SAMPLES),
        },
        target=Target(name="kind", task="single_label", labels=tuple("abcdefgh")),
    )
    torch.manual_seed(seed)
    drop = settings.dropout
    model = SandwichConfig(
        width=width,
        bridge=BridgeConfig(num_blocks=1, num_heads=4, dropout=drop),
        head_dropout=drop,
        encoders={
            "photo": ImageEncoderConfig(
                width=width, num_layers=1, num_heads=4, patch_size=4, feedforward_ratio=2.0, dropout=drop
            ),
            "words": TextEncoderConfig(width=width, num_layers=1, num_heads=4, feedforward_ratio=2.0, dropout=drop),
            "tone": SignalEncoderConfig(width=width, num_layers=1, num_heads=4, window=16, dropout=drop),
        },
    ).build(signature)
    colours = torch.randn(2, 3, generator=Generator().manual_seed(seed % 7 + (70 if test else 0)))
    colours = colours / colours.norm(dim=1, keepdim=True) * 1.6
    first_word = 6 if test else 4

    def make(number: int, generator: Generator) -> Example:
        def draw(high: int) -> Tensor:
            return torch.randint(high, (number,), generator=generator)

        colour, order, tone = draw(2), draw(2), draw(2)
        noise = torch.randn(number, 3, 16, 16, generator=generator)
        pixels = 0.8 * noise
        pixels[:, :, 4:12, 4:12] += colours[colour][:, :, None, None]
        ids = torch.randint(first_word + 2, WORDS, (number, LONGEST), generator=generator)
        ids[:, 0] = 1
        ids[:, 1] = first_word + order
        ids[:, 2] = first_word + 1 - order
        length = torch.randint(5, LONGEST + 1, (number,), generator=generator)
        length[0] = LONGEST
        mask = torch.arange(LONGEST) < length[:, None]
        ids = ids.masked_fill(~mask, 0)
        time = torch.arange(SAMPLES) / SAMPLES
        cycles = torch.where(tone == 0, 3.0, 9.0)[:, None]
        phase = torch.rand(number, 1, generator=generator) * 2 * math.pi
        samples = 1.3 * torch.sin(2 * math.pi * cycles * time + phase)
        samples = samples + 0.3 * torch.randn(number, SAMPLES, generator=generator)
        every, there = torch.arange(number), torch.ones(number).bool()
        media = {
            "photo": MediaBatch({"pixels_UCHW": pixels}, every, there),
            "words": MediaBatch({"ids_UT": ids, "mask_UT": mask}, every, there),
            "tone": MediaBatch(
                {"samples_UCT": samples[:, None], "mask_UT": torch.ones(number, SAMPLES).bool()}, every, there
            ),
        }
        return Batch(media, None), colour * 4 + order * 2 + tone

    def scores(model: nn.Module, inputs: Any) -> Tensor:
        found: Tensor = model(inputs).output_BC
        return found

    named = dict(model.named_modules())
    owned = {name: {id(p) for p in parameters} for name, parameters in model.parts().items()}
    encoders = {
        name: [
            path
            for path, module in named.items()
            if list(module.parameters(recurse=False)) and all(id(p) in own for p in module.parameters())
        ]
        for name, own in owned.items()
    }
    matrices = [path for path, m in named.items() if isinstance(m, nn.Linear) and min(m.weight.shape) >= 16]
    hidden = [path for path in matrices if path.startswith("blocks")]
    head = next(
        path for path in reversed(list(named)) if path.startswith("decision") and isinstance(named[path], nn.Linear)
    )
    return Job("sandwich", model, settings, seed, make, scores, 8, hidden, head, encoders)


# Decoder -------------------------------------------------------------------------------------------------------------


def decoder(seed: int, half: str, settings: Settings) -> Job:
    """Two numbers of no meaning, then some that go on by a step that their first two show."""
    test = half == "test"
    vocabulary, length = (17, 12) if test else (13, 10)
    signature = Signature(
        inputs={"words": TextInput(vocabulary_size=vocabulary + 1, max_tokens=length)},
        target=Target(name="none", task="single_label", labels=("a", "b")),
    )
    torch.manual_seed(seed)
    width = 48 if test else 32
    model = DecoderConfig(width=width, num_layers=2, num_heads=4, hidden=2 * width, experts=None).build(signature)

    def make(number: int, generator: Generator) -> Example:
        start = torch.randint(vocabulary, (number, 1), generator=generator)
        pace = torch.randint(1, 4, (number, 1), generator=generator)
        ids = (start + pace * torch.arange(length)) % vocabulary + 1
        ids[:, :2] = torch.randint(1, vocabulary + 1, (number, 2), generator=generator)
        every, there = torch.arange(number), torch.ones(number).bool()
        mask = torch.ones_like(ids, dtype=torch.bool)
        return Batch({"words": MediaBatch({"ids_UT": ids, "mask_UT": mask}, every, there)}, None), ids[:, 1:].flatten()

    def scores(model: nn.Module, inputs: Any) -> Tensor:
        found: Tensor = model(inputs).score_BNV
        return found[:, :-1].flatten(0, 1)

    named = dict(model.named_modules())
    hidden = [
        p for p, m in named.items() if isinstance(m, nn.Linear) and p.startswith("blocks") and min(m.weight.shape) >= 16
    ]
    outer = [p for p, m in named.items() if isinstance(m, nn.Linear) and not p.startswith("blocks")]
    head = outer[-1] if outer else hidden[-1]
    return Job("decoder", model, settings, seed, make, scores, vocabulary + 1, hidden, head, {})


# Convolutions --------------------------------------------------------------------------------------------------------


class ConvolutionNet(nn.Module):
    """Three convolutions with batch normalisation, written as anyone would."""

    def __init__(self, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for place in range(3):
            layers += [nn.Conv2d(inputs, width, 3, padding=1, stride=1 + (place > 0)), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(width, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.classify(self.dropout(self.features(pixels).mean(dim=(2, 3))))
        return found


def convolutions(seed: int, half: str, settings: Settings) -> Job:
    """Three colours of a shape that is large or small."""
    torch.manual_seed(seed)
    model = ConvolutionNet(24, 6, settings.dropout)
    colours = 1.8 * torch.tensor([[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]])

    def make(number: int, generator: Generator) -> Example:
        colour = torch.randint(3, (number,), generator=generator)
        large = torch.randint(2, (number,), generator=generator)
        pixels = 0.7 * torch.randn(number, 3, 16, 16, generator=generator)
        place = torch.randint(0, 6, (number, 2), generator=generator)
        for row in range(number):
            size = 10 if large[row] else 5
            top, left = int(place[row, 0]), int(place[row, 1])
            pixels[row, :, top : top + size, left : left + size] += colours[colour[row]][:, None, None]
        return pixels, colour * 2 + large

    def scores(model: nn.Module, inputs: Any) -> Tensor:
        found: Tensor = model(inputs)
        return found

    return Job("convolutions", model, settings, seed, make, scores, 6, ["features.3", "features.6"], "classify", {})


# Words and numbers ---------------------------------------------------------------------------------------------------


class TwoTowers(nn.Module):
    """A recurrent network over words, layers over numbers, side by side; written as anyone would."""

    def __init__(self, words: int, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.reader = nn.GRU(width, width, batch_first=True)
        self.numbers = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width))
        self.join = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(width, classes)

    def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
        read = self.reader(self.embedding(ids))[0]
        both = torch.cat([read[:, -1], self.numbers(numbers)], dim=1)
        found: Tensor = self.classify(self.dropout(functional.relu(self.join(both))))
        return found


def two_towers(seed: int, half: str, settings: Settings) -> Job:
    """Which of two words comes last, and which of three numbers is the largest."""
    torch.manual_seed(seed)
    model = TwoTowers(20, 32, 6, settings.dropout)

    def make(number: int, generator: Generator) -> Example:
        ids = torch.randint(4, 20, (number, 7), generator=generator)
        word = torch.randint(2, (number,), generator=generator)
        ids[:, 5], ids[:, 4] = 2 + word, 3 - word
        numbers = torch.randn(number, 8, generator=generator)
        largest = numbers[:, :3].argmax(dim=1)
        numbers[torch.arange(number), largest] += 0.7
        return {"ids": ids, "numbers": numbers}, word * 3 + largest

    def scores(model: nn.Module, inputs: Any) -> Tensor:
        found: Tensor = model(**inputs)
        return found

    encoders = {"ids": ["embedding", "reader"], "numbers": ["numbers.0", "numbers.2"]}
    return Job("two towers", model, settings, seed, make, scores, 6, ["numbers.2", "join"], "classify", encoders)


# Waves ---------------------------------------------------------------------------------------------------------------


class DilatedBlock(nn.Module):
    """What it hears further apart is added to what it was given."""

    def __init__(self, width: int, dilation: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.hear = nn.Conv1d(width, width, 3, padding=dilation, dilation=dilation)
        self.bend = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.bend(self.hear(self.norm(x)))
        return found


class DilatedNet(nn.Module):
    """Residual blocks over samples of two channels, written as anyone would."""

    def __init__(self, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.enter = nn.Conv1d(2, width, 5, padding=2)
        self.blocks = nn.Sequential(*[DilatedBlock(width, dilation) for dilation in (1, 2, 4)])
        self.last = nn.Conv1d(width, width, 1)
        self.bend = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(width, classes)

    def forward(self, samples: Tensor) -> Tensor:
        heard = self.bend(self.last(self.blocks(self.enter(samples)))).mean(dim=2)
        found: Tensor = self.classify(self.dropout(heard))
        return found


def waves(seed: int, half: str, settings: Settings) -> Job:
    """One of three tones, louder in one of two channels."""
    torch.manual_seed(seed)
    model = DilatedNet(24, 6, settings.dropout)
    time = torch.arange(48) / 48

    def make(number: int, generator: Generator) -> Example:
        tone = torch.randint(3, (number,), generator=generator)
        louder = torch.randint(2, (number,), generator=generator)
        cycles = torch.tensor([2.0, 6.0, 14.0])[tone][:, None, None]
        phase = 2 * math.pi * torch.rand(number, 2, 1, generator=generator)
        size = torch.where(torch.arange(2) == louder[:, None], 1.6, 0.5)[:, :, None]
        samples = size * torch.sin(2 * math.pi * cycles * time + phase)
        return samples + 0.3 * torch.randn(number, 2, 48, generator=generator), tone * 2 + louder

    def scores(model: nn.Module, inputs: Any) -> Tensor:
        found: Tensor = model(inputs)
        return found

    return Job("waves", model, settings, seed, make, scores, 6, ["blocks.1.hear", "last"], "classify", {})


SUBJECTS: Final[dict[str, Callable[[int, str, Settings], Job]]] = {
    "sandwich": sandwich,
    "decoder": decoder,
    "convolutions": convolutions,
    "two towers": two_towers,
    "waves": waves,
}
OF_TRAINING: Final = ("sandwich", "decoder", "convolutions")
"""The test half has all of them."""

RATES: Final = {
    "sandwich": {"adamw": 1.0, "sgd": 30.0},
    "decoder": {"adamw": 1.5, "sgd": 100.0},
    "convolutions": {"adamw": 1.5, "sgd": 30.0},
    "two towers": {"adamw": 2.0, "sgd": 60.0},
    "waves": {"adamw": 2.0, "sgd": 60.0},
}
"""What a learning rate is multiplied by: each subject learns with all settings that are drawn."""
