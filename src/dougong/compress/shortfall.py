"""Why no candidate keeps to a budget, and what came closest.

Here        Shortfall.
Elsewhere   what a search came to where one does (outcome.py).
Promise     it says what binds, by how much, which modality or part that is, and what to change.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

import torch

from dougong.compress.candidate import Budget, Candidate, Point
from dougong.compress.clock import interleaved
from dougong.compress.outcome import BudgetError, Outcome, loss_of
from dougong.compress.search_config import SearchConfig
from dougong.compress.structure import structure_of
from dougong.compress.workshop import Workshop
from dougong.nn.batch import Batch, only_media

TOLD: Final = 3
"""Points that are told."""


class Shortfall:
    """Of one search that found none."""

    def __init__(
        self, workshop: Workshop, points: Sequence[Point], budget: Budget, teacher: Point, config: SearchConfig
    ) -> None:
        self._workshop, self._points, self._budget = workshop, points, budget
        self._teacher, self._config = teacher, config

    def of_cost(self) -> BudgetError:
        """None is as small and as fast as it must be."""
        closest = sorted(self._points, key=self._budget.excess)[:TOLD]
        binds = self._budget.binds(closest[0]) if closest else ["nothing could be drafted"]
        for place, bind in enumerate(binds if closest else []):
            part = self._heaviest if bind.startswith("size") else self._slowest
            binds[place] = f"{bind}, of which {part(closest[0].candidate)}"
        return self._error(closest, binds, "Allow more, or search other shapes by --set widths, layers or keeps.")

    def of_loss(self) -> BudgetError:
        """Those that are lose more than they may."""
        closest = sorted((point for point in self._points if point.loss is not None), key=loss_of)[:TOLD]
        binds = [f"max-loss: {loss_of(closest[0]):.4f} against {self._budget.max_loss:g}"]
        if loss_of(closest[0]) <= self._budget.max_loss:
            # Each lost little enough, and was found too slow when it was measured again.
            binds = self._budget.binds(closest[0]) or ["time: what was fast enough when drafted was not at the end"]
        advice = "Allow a larger --max-loss, a wider budget, or more --set distil.train.steps."
        return self._error(closest, binds, advice)

    def _error(self, closest: Sequence[Point], binds: Sequence[str], advice: str) -> BudgetError:
        said = f"; the closest is {closest[0].in_words}" if closest else ""
        outcome = Outcome(self._teacher, tuple(self._points), None, tuple(closest), tuple(binds))
        return BudgetError(f"the budget cannot be met: {'; '.join(binds)}{said}. {advice}", outcome)

    def _slowest(self, candidate: Candidate) -> str:
        """The modality without which an answer takes least, in words."""
        model = self._workshop.built(candidate)
        runner, probe = (
            self._workshop.carried_out(candidate, model),
            self._workshop.seen_by(model, self._workshop.probe),
        )
        calls = {"": functools.partial(runner, probe)}
        for name, media in probe.media.items() if len(probe.media) > 1 else ():
            absent = only_media(media._replace(present_B=torch.zeros_like(media.present_B), there_B=None))
            calls[name] = functools.partial(runner, Batch({**probe.media, name: absent}, None))
        timed = interleaved(calls, turns=self._config.turns, seed=self._config.seed)
        name = min(timed, key=lambda each: timed[each].median)
        return f"{max(0.0, 1 - timed[name].median / timed[''].median):.0%} is {name or 'all'}'s"

    def _heaviest(self, candidate: Candidate) -> str:
        """The part with most parameters, in words."""
        network = self._workshop.built(candidate).network
        counts: dict[str, int] = {}
        for name, weight in structure_of(network).weights(network).items():
            part = next((each for each in network.names if name.startswith(f"{each}.")), name.partition(".")[0])
            counts[part] = counts.get(part, 0) + weight.numel()
        part, most = max(counts.items(), key=lambda each: each[1])
        return f"{most / sum(counts.values()):.0%} is {part.strip('()')}'s"
