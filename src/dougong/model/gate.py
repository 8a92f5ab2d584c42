"""Decides how much each modality counts in the fused vector.

Here        ModalityGate, its config, GateOutput.
Elsewhere   aligning widths (model/bridge.py); measuring quality (data/quality.py); teaching the gate from corruption
            that is known (objectives/gate.py).
Promise     what sits in an absent modality's slot never reaches the output or a gradient, not even NaN.
            For two modalities this is exactly alpha = sigmoid(W [h_a, h_b]), fused = alpha h_a + (1 - alpha) h_b.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional

from dougong.core.config import Config
from dougong.nn.start import keep_variance

QUALITY_WIDTH = 16
MIDDLE = 0.3
STRETCH = 5.0
"""Figures of quality lie between 0 and 1, many of them low, and differ by a fifth or less within one set of media."""


class GateConfig(Config):
    """How the modalities of one record share the fused vector."""

    width: int = Field(gt=0)
    """Channels of every modality vector (D). The bridge has made them equal."""

    num_modalities: int = Field(gt=0)
    """How many vectors a record has (M), absent ones included."""

    num_quality: tuple[int, ...] = ()
    """Figures of quality of each modality (Q); 0 for one whose quality is not measured. Empty: of none."""

    temperature: float = 1.0
    """Below 1 the gate chooses, above 1 it averages."""

    @field_validator("temperature")
    @classmethod
    def _above_zero(cls, temperature: float) -> float:
        if temperature <= 0:
            raise ValueError(
                f"{temperature} must be above 0: it divides the scores. "
                "Use 1.0 for a plain softmax, 0.1 for a nearly hard choice."
            )
        return temperature

    def build(self) -> ModalityGate:
        return ModalityGate(self)


class GateOutput(NamedTuple):
    """Shapes: B records, M modalities, D channels."""

    fused_BD: Tensor
    weight_BM: Tensor
    """How much each modality counted; a row sums to 1, or to 0 where the record has nothing."""


class ModalityGate(nn.Module):
    """Scores the modalities from all their vectors together and mixes them by those scores.

    After the gated multimodal unit of Arevalo et al. 2017 (arXiv:1702.01992), with one softmax over the modalities in
    place of their pairwise sigmoids, so that any number of them fits, and without its tanh layers. Where quality is
    measured, each modality's own figures add to its score through a small network of their own: how blurred a picture
    is says how far to trust it, whatever the picture shows.
    """

    def __init__(self, config: GateConfig) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.score = nn.Linear(config.num_modalities * config.width, config.num_modalities)
        self.quality = nn.ModuleList([QualityScore(count) for count in config.num_quality if count])
        self.places = [place for place, count in enumerate(config.num_quality) if count]

    def forward(
        self,
        x_BMD: Tensor,
        present_BM: Tensor,
        quality: tuple[Tensor | None, ...] = (),
        measured_BM: Tensor | None = None,
    ) -> GateOutput:
        """`quality` has each modality's figures, (B, Q), or None where this batch has none of them. `measured_BM` says
        which records' figures are real; None: those of all that is present."""
        measured_BM = present_BM if measured_BM is None else measured_BM
        x_BMD = x_BMD.masked_fill(~present_BM[..., None], 0.0)  # 0 * NaN would still be NaN

        score_BM = self.score(x_BMD.flatten(1))
        for place, scorer in zip(self.places, self.quality, strict=True):
            figures_BQ = quality[place] if quality else None
            if figures_BQ is not None:
                lacking_B1 = ~measured_BM[:, place, None]
                # Nothing is added for what was not measured, or an answer would hang on who else is in the batch.
                more_B1 = scorer(figures_BQ.masked_fill(lacking_B1, 0.0)).masked_fill(lacking_B1, 0.0)
                score_BM = score_BM + functional.pad(more_B1, (place, score_BM.shape[1] - place - 1))
        score_BM = score_BM / self.temperature
        # A finite floor, not -inf: a record with no modality at all would get NaN gradients.
        score_BM = score_BM.masked_fill(~present_BM, torch.finfo(score_BM.dtype).min)
        weight_BM = score_BM.softmax(dim=-1) * present_BM

        fused_BD = (weight_BM[:, None, :].to(x_BMD.dtype) @ x_BMD)[:, 0]
        return GateOutput(fused_BD, weight_BM)


class QualityScore(nn.Module):
    """What a modality's figures of quality add to its score; nothing at the start. (B, Q) to (B, 1)."""

    def __init__(self, num_quality: int) -> None:
        super().__init__()
        self.widen = keep_variance(nn.Linear(num_quality, QUALITY_WIDTH))
        self.narrow = nn.Linear(QUALITY_WIDTH, 1)
        nn.init.zeros_(self.narrow.weight)
        nn.init.zeros_(self.narrow.bias)

    def forward(self, quality_BQ: Tensor) -> Tensor:
        score_B1: Tensor = self.narrow(functional.gelu(self.widen((quality_BQ - MIDDLE) * STRETCH)))
        return score_B1
