"""What a bundle may become: a point of the search, and what carries it out.

Here        Candidate, Point (a candidate with what was measured of it), Budget; Runner and Backend, by which other
            engines and fewer bits are further dimensions of a candidate; Eager, the one that is always there.
Elsewhere   finding the best one (search.py); other back ends (engines/).
Promise     two candidates of one shape share its training: bits and engines are chosen for weights that were learnt
            once.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from pydantic import Field, model_validator

from dougong.bundle.model import Model
from dougong.compress.recover import RecoverConfig
from dougong.compress.student import StudentConfig
from dougong.core.bundle import Manifest
from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.core.sizes import bytes_as_text
from dougong.model.sandwich import Sandwich
from dougong.nn.batch import Batch

EAGER = "eager"
ALL = "all"
"""In place of layers' names: the same bits for every one."""


class Candidate(Config):
    """One way to make a bundle smaller."""

    student: StudentConfig = StudentConfig()
    keep: float = Field(default=1.0, gt=0, le=1)
    """Share of that student's parameters that pruning leaves."""

    engine: str = EAGER
    bits: dict[str, str] = {}
    """By layer, in the words of the engine, or for ALL alike; empty: as trained."""

    recovered: bool = False
    """Whether its weights were taught to live with these bits, and are rounded to the nearest."""

    @property
    def is_teacher(self) -> bool:
        """Whether it has the teacher's own shape, and so its weights."""
        return self.student.is_whole and self.keep == 1

    @property
    def shape_key(self) -> str:
        """The same for candidates that are trained as one."""
        return _key([self.student.model_dump(mode="json"), self.keep])

    @property
    def key(self) -> str:
        return _key(self.model_dump(mode="json"))

    def in_words(self) -> str:
        """For people."""
        parts = []
        student = self.student
        if student.width < 1:
            parts.append(f"width {student.width:g}")
        for name in ("heads", "channels"):
            share = getattr(student, name)
            if share is not None:
                parts.append(f"{name} {share:g}")
        if student.layers < 1:
            parts.append(f"layers {student.layers:g}")
        if student.blocks < 1:
            parts.append(f"bridge blocks {student.blocks:g}")
        parts += [f"{name} pooled by {count}" for name, count in student.pool.items()]
        if student.modalities is not None:
            parts.append(f"reads {', '.join(student.modalities)}")
        if self.keep < 1:
            parts.append(f"pruned to {self.keep:g}")
        if self.engine != EAGER or self.bits:
            counts = Counter(self.bits.values())
            told = [kind if set(self.bits) == {ALL} else f"{counts[kind]} x {kind}" for kind in sorted(counts)]
            parts.append(f"on {self.engine}{' in ' + ' and '.join(told) if told else ''}")
        if self.recovered:
            parts.append("taught to live with them")
        return ", ".join(parts) or "the teacher's shape"


def _key(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


class Point(Config):
    """A candidate, and what was measured of it so far."""

    candidate: Candidate
    num_parameters: int
    size_bytes: int
    latency_seconds: float
    """Median of the network's answer to one batch, on this machine."""

    speedup: float
    """The teacher's time over it, taken in turns."""

    divergence: float | None = None
    """The proxy: of its answers from the teacher's after a few steps, in nats a record; of numbers, squared."""

    metric: float | None = None
    """The task's figure on the records that choose, after learning."""

    loss: float | None = None
    """How much worse that is than the teacher's; below 0 where it is better."""

    steps: int = 0
    """That it has learnt for."""

    drafted_within: bool | None = None
    """Whether it kept to the budget when it was drafted: what is ranked goes by that, however it is measured again, so
    that a search that goes on ranks the same. None: it is no draft."""

    step_seconds: float | None = None
    """Of a step of learning, where it was ranked."""

    @property
    def in_words(self) -> str:
        """One line for people."""
        judged = "" if self.loss is None else f", loss {self.loss:+.4f}"
        return (
            f"{self.candidate.in_words()}: {self.num_parameters:,} parameters, {bytes_as_text(self.size_bytes)}, "
            f"{self.latency_seconds * 1000:.2f} ms, {self.speedup:.2f} times as fast{judged}"
        )


class Budget(Config):
    """What a compressed bundle must keep to. All that is given."""

    size_bytes: float | None = Field(default=None, gt=0)
    """Of its weights."""

    latency_seconds: float | None = Field(default=None, gt=0)
    """Of the network's answer to one batch, on this machine."""

    speedup: float | None = Field(default=None, gt=0)
    """Over the teacher in eager fp32, on this machine."""

    max_loss: float = Field(default=0.01, ge=0)
    """Of the task's figure; of a number's error, as a share of the teacher's."""

    @model_validator(mode="after")
    def _something_to_meet(self) -> Self:
        if self.size_bytes is None and self.latency_seconds is None and self.speedup is None:
            raise ValueError("no budget is given. Use --size 8MB, --latency 5ms or --speedup 10x.")
        return self

    def binds(self, point: Point) -> list[str]:
        """Which parts of it the point does not keep to, in words; accuracy aside."""
        found = []
        if self.size_bytes is not None and point.size_bytes > self.size_bytes:
            found.append(f"size: {bytes_as_text(point.size_bytes)} against {bytes_as_text(self.size_bytes)}")
        if self.latency_seconds is not None and point.latency_seconds > self.latency_seconds:
            found.append(f"latency: {point.latency_seconds * 1000:.3g} ms against {self.latency_seconds * 1000:.3g} ms")
        if self.speedup is not None and point.speedup < self.speedup:
            found.append(f"speedup: {point.speedup:.3g} against {self.speedup:.3g}")
        return found

    def excess(self, point: Point) -> float:
        """The farthest that it is beyond any part of the budget, as a ratio; 1 or less where it keeps to all."""
        ratios = [0.0]
        if self.size_bytes is not None:
            ratios.append(point.size_bytes / self.size_bytes)
        if self.latency_seconds is not None:
            ratios.append(point.latency_seconds / self.latency_seconds)
        if self.speedup is not None:
            ratios.append(self.speedup / point.speedup)
        return max(ratios)


class Runner(Protocol):
    """A model that can be asked."""

    @property
    def num_bytes(self) -> int:
        """What its weights take on the disk."""
        ...

    @property
    def network(self) -> Any:
        """The same where a network is expected (bundle/model.py)."""
        ...

    def __call__(self, batch: Batch) -> Any:
        """An output with `output_BC`."""
        ...

    def ship(self, folder: Path, manifest: Manifest) -> None:
        """Write the bundle that is delivered, of which the manifest tells; an older one there is replaced."""
        ...


class Backend(Protocol):
    """Something that carries models out."""

    @property
    def name(self) -> str: ...

    def options(self) -> Sequence[Mapping[str, str]]:
        """Bits that are worth trying, those that lose least first; an empty mapping for as trained."""
        ...

    def carry_out(
        self,
        model: Model,
        bits: Mapping[str, str],
        calibration: Sequence[Batch],
        folder: Path,
        *,
        nearest: bool = False,
    ) -> Runner:
        """Make it ready to be asked; `folder` is not there yet, and its to use. `nearest`: its weights were recovered
        for these bits, and their errors are not to be made up for once more."""
        ...

    def recover(
        self, model: Model, bits: Mapping[str, str], calibration: Sequence[Batch], config: RecoverConfig
    ) -> Model:
        """The same with weights that answer as it does once they are rounded; what is given stays as it is.

        Raises:
            ConfigError: this engine cannot; the message says which can.
        """
        ...

    def fill(
        self,
        model: Model,
        calibration: Sequence[Batch],
        timed: Batch,
        most_bytes: float | None,
        most_seconds: float | None,
    ) -> Mapping[str, str]:
        """Bits by layer that lose least within this room, of a model that has learnt.

        Raises:
            ConfigError: there are none.
        """
        ...


class EagerRunner:
    """The network itself."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.network = model.network.eval()

    @property
    def num_bytes(self) -> int:
        return weights_bytes(self.network)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Any:
        return self.network(batch)

    def ship(self, folder: Path, manifest: Manifest) -> None:
        Model(self.network, self._model.preparation, manifest).save(folder)


class Eager:
    """torch, in fp32."""

    name = EAGER

    def options(self) -> Sequence[Mapping[str, str]]:
        return [{}]

    def carry_out(
        self,
        model: Model,
        bits: Mapping[str, str],
        calibration: Sequence[Batch],
        folder: Path,
        *,
        nearest: bool = False,
    ) -> Runner:
        return EagerRunner(model)

    def recover(
        self, model: Model, bits: Mapping[str, str], calibration: Sequence[Batch], config: RecoverConfig
    ) -> Model:
        raise ConfigError("torch computes all layers in fp32: there is nothing to recover from.")

    def fill(
        self,
        model: Model,
        calibration: Sequence[Batch],
        timed: Batch,
        most_bytes: float | None,
        most_seconds: float | None,
    ) -> Mapping[str, str]:
        raise ConfigError("torch computes all layers in fp32. Use --engine openvino for fewer bits.")


def weights_bytes(network: Sandwich) -> int:
    """What a bundle's weights take, its header aside."""
    return sum(weight.nbytes for weight in network.state_dict().values())
