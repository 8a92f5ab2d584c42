"""Which modalities a record is trained with, at rates that follow how much is lost without each one.

Here        SamplingConfig, ModalitySampler, SamplingState.
Elsewhere   measuring what is lost (engine/contribution.py); when rates are moved (engine/trainer.py); rates that never
            move, before decoding (data/collate.py, withhold).
Promise     a record never loses its last modality; what a step leaves out follows from the seed, its number and the
            rates alone, and the rates are kept with a checkpoint: a resumed run goes on to the same losses. Every
            change of a rate is told, with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.core.seeds import derive_seed
from dougong.data.quality import WORSE
from dougong.engine.contribution import Removals
from dougong.nn.batch import Batch, only_media


class SamplingConfig(Config):
    """Modality dropout whose rates move.

    After an evaluation, each modality m has the wanted rate

        wanted_m = rate + (highest - rate) * reliance_m

    where reliance_m, from 0 to 1, is the part of what the model has learnt that is lost without m: (score with all -
    score with all but m) / (score with all - score with none), on held-out records, averaged over evaluations with
    `smoothing`. The rate goes towards what is wanted by at most `largest_step`, and not at all where the way is
    shorter than `smallest_step`. A single medium that is as good as q, where that is known, is left out with the chance

        min(rate_m + quality * (1 - q), highest)

    where q is the mean of its figures of quality, those of which more is worse taken from 1, and those without that may
    be unusual either way (data/quality.py).

    What a model leans on is left out more often, so that the others learn to stand in for it, and less often again once
    they do: the idea of OGM-GE (Peng et al. 2022, arXiv:2203.15332), which weakens the gradients of the modality that
    is ahead, done to the data as in ModDrop (Neverova et al. 2014, arXiv:1501.00102), whose rates are fixed; and
    measured by what is lost, not by how sure each encoder's own answer is. Where two modalities say something only
    together, both are relied on to the full whatever the rates: give a low `highest` there.
    """

    rate: float = Field(default=0.3, ge=0, le=0.9)
    """Each modality's chance to be left out of a record, before the first update, and where nothing is lost without."""

    highest: float = Field(default=0.7, ge=0, le=0.9)
    """Where everything is lost without it. Equal to `rate`: the rates never move, and nothing is measured."""

    quality: float = Field(default=0.0, ge=0, le=1)
    """Added to the chance of the worst medium, less for better ones. 0: quality changes nothing."""

    smallest_step: float = Field(default=0.02, ge=0, le=1)
    """A rate that is this near to what is wanted stays, so that chance in few records does not move it."""

    largest_step: float = Field(default=0.15, gt=0, le=1)
    """At one time, so that a bad measurement early in training does little."""

    smoothing: float = Field(default=0.5, ge=0, lt=1)
    """Weight of what was measured earlier against what is measured now."""

    num_records: int = Field(default=256, gt=0)
    """Validation records that it is measured on, after each evaluation, two more times than there are modalities."""

    beside: bool = False
    """What is left out is encoded all the same, for a loss alone: contrast, or what completes it."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.rate > self.highest:
            raise ValueError(
                f"rate {self.rate} must not be above highest {self.highest}. Lower the one, or raise the other."
            )
        if self.quality and self.rate == self.highest:
            raise ValueError(
                f"quality {self.quality} cannot take effect: rate {self.rate} is the highest already. Raise highest."
            )
        return self

    @property
    def moves(self) -> bool:
        """Whether there is anything to measure for."""
        return self.rate < self.highest


class SamplingState(Config):
    """What a resumed run needs of it."""

    rate: dict[str, float] = {}
    reliance: dict[str, float] = {}
    """Averaged; empty before the first update."""


class Change(NamedTuple):
    """What an update did."""

    before: dict[str, float]
    after: dict[str, float]
    reason: dict[str, str]
    """Of each modality, whether its rate moved or not."""


class ModalitySampler:
    """Leaves modalities out of batches. Shapes: B records, M modalities, U media, Q figures of quality."""

    def __init__(
        self,
        config: SamplingConfig,
        seed: int,
        state: SamplingState | None = None,
        *,
        figures: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """`figures` names those of quality, by modality.

        Raises:
            ConfigError: quality is to count, and nobody says what its figures are.
        """
        if config.quality and not figures:
            raise ConfigError(
                f"train.sampling.quality={config.quality} reads figures of quality, and nobody says which these are. "
                "Measure on a Probe.on(...) of a preparation, or use 0."
            )
        self.config = config
        self.figures = figures or {}
        self.state = state if state is not None else SamplingState()
        self._seed = seed

    def __call__(self, batch: Batch, *, step: int, part: int = 0) -> Batch:
        """The batch with fewer modalities present; `part` is its number among the batches of a step."""
        present_BM = torch.stack([media.present_B for media in batch.media.values()], dim=1)
        rate_BM = torch.stack([self._rates(name, batch) for name in batch.media], dim=1)
        generator = torch.Generator().manual_seed(derive_seed(self._seed, "sampling", step, part))
        # Drawn on the CPU, so that every device leaves out the same.
        chance_BM = torch.rand(present_BM.shape, generator=generator).to(present_BM.device)
        # Of a record that would lose all, the one with most luck stays.
        luck_BM = (chance_BM - rate_BM).masked_fill(~present_BM, -torch.inf)
        kept_BM = present_BM & (luck_BM >= 0)
        emptied_B = present_BM.any(dim=1) & ~kept_BM.any(dim=1)
        kept_BM[emptied_B, luck_BM[emptied_B].argmax(dim=1)] = True

        media = {}
        for place, (name, old) in enumerate(batch.media.items()):
            kept_B = kept_BM[:, place]
            there_B = old.present_B if old.there_B is None else old.there_B
            if not self.config.beside:
                there_B = there_B & (kept_B | ~old.present_B)
            media[name] = only_media(old._replace(present_B=kept_B, there_B=there_B))
        return batch._replace(media=media)

    def _rates(self, name: str, batch: Batch) -> Tensor:
        """Of each record (B,)."""
        media = batch.media[name]
        rate_B = torch.full(media.present_B.shape, self.rate(name), device=media.present_B.device)
        if self.config.quality and media.quality_UQ is not None and len(media.quality_UQ):
            lacking_U = 1 - merit(media.quality_UQ, self.figures[name])
            rate_B = (rate_B + self.config.quality * lacking_U[media.index_B]).clamp(max=self.config.highest)
        return rate_B

    def merits(self, batch: Batch) -> dict[str, float]:
        """How good each modality's media are on average, where their figures are known."""
        return {
            name: float(merit(media.quality_UQ, self.figures[name]).mean())
            for name, media in batch.media.items()
            if media.quality_UQ is not None and len(media.quality_UQ) and name in self.figures
        }

    def rate(self, name: str) -> float:
        """The chance of a modality to be left out, whatever its quality."""
        return self.state.rate.get(name, self.config.rate)

    def update(self, found: Removals, merits: Mapping[str, float] | None = None) -> Change:
        """Move the rates by what was measured; `merits` says how good the media are on average (`merits`)."""
        config = self.config
        weight = config.smoothing if self.state.reliance else 0.0
        rate, reliance, reason = {}, {}, {}
        before = {name: self.rate(name) for name in found.reliance}
        for name, new in found.reliance.items():
            reliance[name] = weight * self.state.reliance.get(name, 0.0) + (1 - weight) * new
            wanted = config.rate + (config.highest - config.rate) * reliance[name]
            way = wanted - before[name]
            moved = 0.0 if abs(way) < config.smallest_step else min(max(way, -config.largest_step), config.largest_step)
            rate[name] = before[name] + moved
            does = f"from {before[name]:.3f} to {rate[name]:.3f}" if moved else f"stays at {before[name]:.3f}"
            reason[name] = f"{does}: without it {reliance[name]:.0%} is lost, so {wanted:.3f} is wanted"
            if config.quality and merits and name in merits:
                more = config.quality * (1 - merits[name])
                reason[name] += f"; its media are {merits[name]:.2f} good on average, for which {more:.3f} is added"
        self.state = SamplingState(rate=rate, reliance=reliance)
        return Change(before, rate, reason)


def merit(quality_UQ: Tensor, figures: Sequence[str]) -> Tensor:
    """How good each medium is (U,), from 0 to 1. Where no figure has a worse side, nothing is known against any."""
    sided = [place for place, name in enumerate(figures) if WORSE[name] != "either"]
    if not sided:
        return quality_UQ.new_ones(len(quality_UQ))
    worse_Q = torch.tensor([WORSE[figures[place]] == "high" for place in sided], device=quality_UQ.device)
    figure_UQ = quality_UQ[:, sided].clamp(0, 1)
    return torch.where(worse_Q, 1 - figure_UQ, figure_UQ).mean(dim=1)
