"""What each candidate costs, before any of them learns.

Here        Drafting: the shapes that are combined, with engines and bits, each made and timed once; TimeLimit.
Elsewhere   making them (workshop.py); what is known of them (known.py); which are worth learning (search.py).
Promise     times are this machine's, beside the teacher's, taken in turns. Engines are tried on the largest shapes
            first, until so many keep to the budget as are ranked; what is foretold to be far beyond it is passed over.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Final

from dougong.bundle.model import Model
from dougong.compress.candidate import EAGER, Backend, Budget, Candidate, EagerRunner, Point
from dougong.compress.clock import interleaved
from dougong.compress.known import Known
from dougong.compress.search_config import SearchConfig
from dougong.compress.structure import BRIDGE
from dougong.compress.student import StudentConfig
from dougong.compress.workshop import Workshop
from dougong.core.errors import ConfigError
from dougong.model.encoders.audio import AudioEncoderConfig
from dougong.model.encoders.image import ImageEncoderConfig

DRAFTING: Final = 0.3
"""Share of a time limit after which drafting makes do with what it has."""

FORETOLD: Final = 1.2
"""How far beyond the budget a candidate may be foretold to be, and is measured all the same."""

AS_MANY: Final = 1.05
"""Bytes within which two engines' files are as large."""

CLOSEST: Final = 3
"""Points that are told where the budget cannot be met."""

Say = Callable[[str], None]


class TimeLimit:
    """Seconds from now, or none."""

    def __init__(self, seconds: float | None) -> None:
        self._started, self._seconds = time.perf_counter(), seconds

    def is_late(self, share: float) -> bool:
        """Whether so much of it has gone."""
        return self._seconds is not None and time.perf_counter() - self._started > self._seconds * share

    def seconds_left(self, share: float) -> float | None:
        """Until so much of it has gone; None: there is no limit."""
        return None if self._seconds is None else self._seconds * share - (time.perf_counter() - self._started)

    def left(self, done: int, total: int) -> str:
        """How long the rest of a part will take, in words, by what was done since the beginning."""
        spent = time.perf_counter() - self._started
        return f"about {spent / done * (total - done):.0f} s left of this part"


class Drafting:
    """One search's drafts."""

    def __init__(
        self, workshop: Workshop, known: Known, budget: Budget, config: SearchConfig, limit: TimeLimit, say: Say
    ) -> None:
        self._workshop, self._known, self._budget, self._config = workshop, known, budget, config
        self._limit, self._say = limit, say

    def candidates(self) -> Iterator[Candidate]:
        """All shapes that are combined, the largest first; engines and bits are added to them by `_draft_on`."""
        config, stacks = self._config, self._workshop.structure.stacks
        layers = config.layers if any(s.num_layers > 1 for name, s in stacks.items() if name != BRIDGE) else (1.0,)
        blocks = config.blocks if stacks[BRIDGE].num_layers > 1 else (1.0,)
        pools: list[dict[str, int]] = [{}]
        if config.pool and (more := self._more_pooling()):
            pools.append(more)
        for width, depth, block, pool, keep in itertools.product(config.widths, layers, blocks, pools, config.keeps):
            shares = {"width": width, "layers": depth, "blocks": block}
            yield Candidate(student=StudentConfig(**shares, pool=pool, modalities=config.modalities), keep=keep)

    def _more_pooling(self) -> dict[str, int]:
        """Each modality whose tokens may be put together, twice as many as now."""
        found: dict[str, int] = {}
        for name, encoder in self._workshop.teacher.network.config.encoders.items():
            if self._config.modalities is not None and name not in self._config.modalities:
                continue
            if isinstance(encoder, ImageEncoderConfig):
                rows, columns = self._workshop.teacher.network.grids[name]
                if rows % 2 == 0 and columns % 2 == 0:
                    found[name] = 2 * encoder.pool
            elif isinstance(encoder, AudioEncoderConfig):
                found[name] = 2 * encoder.pool
        return found

    def run(self) -> list[Point]:
        """Measure what candidates cost; those that keep to the budget."""
        wanted = list(self.candidates())
        others = [backend for backend in self._workshop.backends.values() if backend.name != EAGER]
        late = DRAFTING / 2 if others else DRAFTING
        done = 0
        for place, shape in enumerate(wanted):
            if self._limit.is_late(late) and done:
                self._say(f"time is short: {len(wanted) - place} shapes are not drafted")
                break
            if shape in self._known:
                done += 1
                continue
            try:
                model = self._workshop.built(shape)
            except ConfigError as error:
                self._say(f"{shape.in_words()} cannot be: {error}")
                continue
            self.measure(shape, model, draft=True)
            done += 1
            if done % 6 == 0 or place + 1 == len(wanted):
                self._say(f"{place + 1} of {len(wanted)} shapes drafted, {self._limit.left(place + 1, len(wanted))}")
        for backend in others:
            self._draft_on(backend)
        return self._known.drafted()

    def _draft_on(self, backend: Backend) -> None:
        """Measure an engine, the largest shapes first, until so many keep to the budget as are ranked.

        Shapes and bits that are foretold to be beyond it are passed over. Where none keeps to it, those are measured
        that are foretold to come closest.
        """
        shapes = [point for point in self._known if point.candidate.engine == EAGER]
        shapes.sort(key=lambda point: (-point.num_parameters, point.latency_seconds, point.candidate.key))
        found = 0
        passed: list[tuple[float, Candidate]] = []
        self._say(f"drafting on {backend.name}, the largest of {len(shapes)} shapes first")
        for place, eager in enumerate(shapes):
            if found == self._config.ranked:
                break
            if self._limit.is_late(DRAFTING) and place:
                self._say(f"time is short: {len(shapes) - place} shapes are not drafted on {backend.name}")
                break
            model: Model | None = None
            for bits in backend.options():
                candidate = eager.candidate.model_copy(update={"engine": backend.name, "bits": dict(bits)})
                if candidate not in self._known:
                    foretold = self._foretold(eager, candidate)
                    if foretold is not None and self._budget.excess(foretold) > FORETOLD:
                        passed.append((self._budget.excess(foretold), candidate))
                        continue
                    model = model or self._workshop.built(eager.candidate)  # bits share what is converted of it
                    try:
                        self.measure(candidate, model, draft=True)
                    except ConfigError as error:
                        self._say(f"{backend.name} is left out: {error}")
                        return
                if self._known.of(candidate).drafted_within:
                    found += 1
                    self._say(f"{found} of {self._config.ranked} found: {self._known.of(candidate).in_words}")
                    break  # what comes after loses more
            if place == 0 and self._is_beaten(backend, eager.candidate):
                self._say(f"{backend.name} is left out: another engine is as small and faster on the largest shape")
                return
        if not found:
            for _, candidate in sorted(passed, key=lambda each: each[0])[:CLOSEST]:
                self.measure(candidate, self._workshop.built(candidate), draft=True)

    def _is_beaten(self, backend: Backend, shape: Candidate) -> bool:
        """Whether each of its points of this shape has another engine's that takes no more time, and as many bytes."""
        alike = [point for point in self._known if point.candidate.shape_key == shape.shape_key]
        others = [point for point in alike if point.candidate.engine not in (EAGER, backend.name)]
        return all(
            any(o.latency_seconds <= p.latency_seconds and o.size_bytes <= AS_MANY * p.size_bytes for o in others)
            for p in alike
            if p.candidate.engine == backend.name
        )

    def _foretold(self, eager: Point, candidate: Candidate) -> Point | None:
        """What it would cost, by what the shape nearest in time costs on that engine at those bits, against torch."""
        known: list[tuple[float, Point, Point]] = []
        for point in self._known:
            own = point.candidate
            if (own.engine, own.bits, own.recovered) == (candidate.engine, candidate.bits, False):
                other = self._known.of(own.model_copy(update={"engine": EAGER, "bits": {}}))
                known.append((abs(math.log(other.latency_seconds / eager.latency_seconds)), point, other))
        if not known:
            return None
        _, point, other = min(known, key=lambda each: each[0])
        faster = other.latency_seconds / point.latency_seconds
        return eager.model_copy(
            update={
                "candidate": candidate,
                "size_bytes": round(eager.size_bytes * point.size_bytes / other.size_bytes),
                "latency_seconds": eager.latency_seconds / faster,
                "speedup": eager.speedup * faster,
            }
        )

    def measure(self, candidate: Candidate, model: Model, turns: int | None = None, *, draft: bool = False) -> None:
        """Size and time; what else is known of it stays. `draft`: before it has learnt."""
        runner = self._workshop.carried_out(candidate, model)
        asked, probe = EagerRunner(self._workshop.teacher), self._workshop.seen_by(model, self._workshop.probe)
        timed = interleaved(
            {"teacher": lambda: asked(self._workshop.probe), "student": lambda: runner(probe)},
            turns=turns or self._config.turns,
            seed=self._config.seed,
        )
        self._known.put_cost(
            Point(
                candidate=candidate,
                num_parameters=sum(parameter.numel() for parameter in model.network.parameters()),
                size_bytes=runner.num_bytes,
                latency_seconds=timed["student"].median,
                speedup=timed["student"].times_as_fast_as(timed["teacher"]),
            ),
            draft=draft,
        )
