"""What a decision run minimises, put together from its recipe.

Here        ObjectiveConfig, `check_objective`, `check_ranks`, `compared_by`, `losses_of`, `backward_of`; DecisionLoss,
            all of them in one.
Elsewhere   each loss by itself (objectives/); the run that uses them (recipes/run.py).
Promise     every part is a sum over records; a part that the model or the data cannot feed is refused before training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import field_validator
from torch import Tensor

from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.core.signature import Task
from dougong.engine.step import Backward
from dougong.model.evidence import evidence
from dougong.model.sandwich import Sandwich, SandwichConfig, SandwichOutput
from dougong.nn.batch import Batch, MediaBatch
from dougong.objectives.balance import Losses, ModulatedBackward, ParetoBackward
from dougong.objectives.confidence import ranking_loss
from dougong.objectives.contrastive import contrastive_loss
from dougong.objectives.decision import decision_loss
from dougong.objectives.distillation import distillation_loss
from dougong.objectives.evidence import evidence_loss
from dougong.objectives.gate import gate_loss
from dougong.objectives.gathered import Side, gathered_contrastive_loss
from dougong.objectives.missing import completion_loss

WHOLE = "whole"
"""In `blend`, beside the modalities' names: the decision of all together."""


class ObjectiveConfig(Config):
    """What is learnt besides deciding, and how the modalities are kept in balance."""

    label_smoothing: float = 0.0
    """Probability taken from the true label."""

    align_weight: float = 1.0
    """Of the contrastive loss between the modalities in model.align, in batches that have both."""

    own_weight: float = 1.0
    """Of each modality's own loss, where the model has taught heads of its own (model.own_heads, model.decide)."""

    blend: dict[str, float] = {}
    """Instead of it, a weight by modality, and of the decision together by the name "whole": Gradient-Blending."""

    completion_weight: float = 1.0
    """Of the loss between what model.completion makes and what was withheld. 0: the decision alone teaches it."""

    gate_weight: float = 0.0
    """Of teaching the gate to trust the cleaner modality, in records that data.corrupt has made unlike."""

    doubt_weight: float = 0.1
    """decide=evidence: of the punishment for evidence for wrong classes."""

    rank_weight: float = 1.0
    """decide=confidence: of the punishment for being surer of what is answered worse."""

    balance: Literal["none", "ogm-ge", "mmpareto"] = "none"
    """ogm-ge: the gradients of the modality that knows more are held back. mmpareto: each encoder steps along a mix of
    the whole loss's gradient and its own loss's that harms neither."""

    ogm_alpha: float = 0.5
    """ogm-ge: how strongly."""

    ogm_noise: bool = True
    """ogm-ge: add noise as wide as its gradient to each encoder's, held back or not, as its paper does."""

    teach_weight: float = 0.0
    """Of each modality's own scores learning what all together decide, where the model has taught heads of its own."""

    @field_validator("align_weight", "own_weight", "ogm_alpha")
    @classmethod
    def _above_zero(cls, weight: float) -> float:
        if not weight > 0:
            raise ValueError(f"{weight} must be above 0. To leave this out, leave out the part of the model it is for.")
        return weight

    @field_validator("completion_weight", "gate_weight", "doubt_weight", "rank_weight", "teach_weight")
    @classmethod
    def _not_below_zero(cls, weight: float) -> float:
        if not weight >= 0:
            raise ValueError(f"{weight} must not be below 0. Use 0 for none.")
        return weight

    @field_validator("blend")
    @classmethod
    def _weights(cls, blend: dict[str, float]) -> dict[str, float]:
        if blend and (min(blend.values()) < 0 or WHOLE not in blend):
            raise ValueError(f"{blend} must have no weight below 0, and one for {WHOLE!r}, the decision together.")
        return blend


def check_objective(objective: ObjectiveConfig, model: SandwichConfig) -> None:
    """Refuse what cannot take effect.

    Raises:
        ConfigError: a part has no head, gate or corruption to work on.
    """
    taught = model.own_heads == "taught" or model.decide != "fused"
    idle = {
        "ogm_alpha": objective.balance != "ogm-ge",
        "ogm_noise": objective.balance != "ogm-ge",
        "teach_weight": not taught or model.decide == "evidence",
        "doubt_weight": model.decide != "evidence",
        "rank_weight": model.decide != "confidence",
        "completion_weight": model.completion is None,
        "align_weight": not model.align,
        "own_weight": bool(objective.blend) or (model.decide == "fused" and model.own_heads == "none"),
        "label_smoothing": model.decide == "evidence",
    }
    for name, without_effect in idle.items():
        given = getattr(objective, name)
        if without_effect and given != ObjectiveConfig.model_fields[name].default:
            raise ConfigError(
                f"objective.{name}={given} cannot take effect on this model and objective. Leave {name} out, or set "
                "the part that it is for."
            )
    if objective.balance == "ogm-ge" and model.own_heads == "none" and model.decide == "fused":
        raise ConfigError(
            "objective.balance=ogm-ge reads from heads how much each modality knows, and the model has none. "
            "Set model.own_heads: watching."
        )
    for setting, given in (("balance=mmpareto", objective.balance == "mmpareto"), ("blend", bool(objective.blend))):
        if given and not taught:
            raise ConfigError(f"objective.{setting} weighs each modality's own loss. Set model.own_heads: taught.")
    if objective.gate_weight and model.fusion == "late":
        raise ConfigError("objective.gate_weight teaches the gate, and fusion=late has none. Use model.fusion: bridge.")


def check_blend(objective: ObjectiveConfig, names: tuple[str, ...]) -> None:
    """Raises: ConfigError: a weight is for no modality of the run."""
    strange = [name for name in objective.blend if name not in (WHOLE, *names)]
    if strange:
        known = ", ".join((WHOLE, *names))
        raise ConfigError(f"objective.blend names {strange[0]!r}, which is no modality here. Use some of {known}.")


def check_ranks(objective: ObjectiveConfig, model: SandwichConfig, world: int) -> None:
    """Raises: ConfigError: a rank's records alone would be balanced or compared, not those of the batch."""
    for setting in _of_whole_batches(objective, model):
        if world > 1:
            raise ConfigError(
                f"objective.{setting} works on a whole batch, and {world} ranks share each out. "
                f"Use {'balance: none' if setting.startswith('balance') else f'{setting}: 0'}, or one process."
            )


def compared_by(objective: ObjectiveConfig, model: SandwichConfig) -> str | None:
    """The setting for which the records of a batch belong together: cut into other batches, they teach other things."""
    if model.align:
        return f"model.align={list(model.align)}"
    return next((f"objective.{setting}" for setting in _of_whole_batches(objective, model)), None)


def _of_whole_batches(objective: ObjectiveConfig, model: SandwichConfig) -> list[str]:
    whole = {
        f"balance={objective.balance}": objective.balance != "none",
        "completion_weight": model.completion is not None and objective.completion_weight > 0,
        "rank_weight": model.decide == "confidence" and objective.rank_weight > 0,
    }
    return [setting for setting, given in whole.items() if given]


def losses_of(
    objective: ObjectiveConfig, model: SandwichConfig, task: Task, group: dist.ProcessGroup | None = None
) -> Callable[[SandwichOutput, Batch], Losses]:
    """From a model's output and its batch to its losses, weighted; `group` has the ranks that share out a batch."""

    align = _alignment if group is None else functools.partial(_gathered_alignment, model.align, group)

    def decided(output_BC: Tensor, target: Tensor, *, is_evidence: bool) -> Tensor:
        if is_evidence:  # an own head's scores; what all say together comes as its opinion
            return evidence_loss(evidence(output_BC) + 1.0, target, doubt_weight=objective.doubt_weight)
        return decision_loss(output_BC, target, task, objective.label_smoothing)

    def losses(output: SandwichOutput, batch: Batch) -> Losses:
        assert batch.target is not None
        if output.opinion is not None:
            alpha_BC = output.opinion.alpha_BC
            whole = evidence_loss(alpha_BC, batch.target, doubt_weight=objective.doubt_weight)
        else:
            whole = decision_loss(output.output_BC, batch.target, task, objective.label_smoothing)
        terms = {"decision": whole * objective.blend.get(WHOLE, 1.0)}
        alignment = align(output, batch) if model.align else None
        if alignment is not None:
            terms["alignment"] = objective.align_weight * alignment
        if objective.completion_weight:
            terms["completion"] = objective.completion_weight * completion_losses(output, batch)
        if objective.gate_weight and output.weight_BM is not None:
            terms["gate"] = objective.gate_weight * _gate(output.weight_BM, batch)
        own: dict[str, Tensor] = {}
        for place, (name, media) in enumerate(batch.media.items()):
            if output.own_BMC is None or not bool(media.present_B.any()):
                continue
            own_BC, target = output.own_BMC[media.present_B, place], batch.target[media.present_B]
            weight = objective.blend.get(name, 0.0) if objective.blend else objective.own_weight
            own[name] = weight * decided(own_BC, target, is_evidence=model.decide == "evidence")
            if model.decide == "confidence" and objective.rank_weight:
                own[name] = own[name] + objective.rank_weight * ranking_loss(own_BC, target)
            if objective.teach_weight:
                taught_loss = distillation_loss(own_BC, output.output_BC[media.present_B], task)
                own[name] = own[name] + objective.teach_weight * taught_loss
        return Losses(terms, own)

    return losses


@dataclass(frozen=True)
class DecisionLoss:
    """All losses in one, which can be asked for its terms (engine/step.py's SummedLoss)."""

    losses: Callable[[SandwichOutput, Batch], Losses]

    def __call__(self, output: Any, batch: Batch) -> Tensor:
        found = self.losses(output, batch)
        return torch.stack([found.whole, *found.own.values()]).sum()

    def terms(self, output: Any, batch: Batch) -> dict[str, Tensor]:
        """Of the whole by name, and each modality's own decision."""
        found = self.losses(output, batch)
        return {**found.terms, **{f"{name} alone": loss for name, loss in found.own.items()}}


def backward_of(
    objective: ObjectiveConfig, model: Sandwich, losses: Callable[[SandwichOutput, Batch], Losses]
) -> Backward | None:
    """How gradients are taken; None: plainly."""
    if objective.balance == "ogm-ge":
        if model.task != "single_label":
            raise ConfigError(
                f"objective.balance=ogm-ge reads how sure the right class is, and the target is {model.task}. "
                "Use balance: mmpareto, or none."
            )
        return ModulatedBackward(model.parts(), objective.ogm_alpha, objective.ogm_noise)
    if objective.balance == "mmpareto":
        return ParetoBackward(model.parts(), losses)
    return None


def completion_losses(output: SandwichOutput, batch: Batch) -> Tensor:
    """Of each modality that was withheld from some records and encoded beside them, summed."""
    total = output.output_BC.new_zeros((), dtype=torch.float32)
    for place, (name, media) in enumerate(batch.media.items()):
        if name in output.completed and name in output.truth and media.there_B is not None:
            hidden_B = output.completed_BM[:, place] & media.there_B
            total = total + completion_loss(
                output.completed[name][hidden_B], output.truth[name], media.index_B[hidden_B]
            )
    return total


def _gate(weight_BM: Tensor, batch: Batch) -> Tensor:
    levels = [_level(media) for media in batch.media.values()]
    present = [media.present_B for media in batch.media.values()]
    return gate_loss(weight_BM, torch.stack(levels, dim=1), torch.stack(present, dim=1))


def _level(media: MediaBatch) -> Tensor:
    """Of each record's medium; 0 where it has none, or none was corrupted."""
    if media.level_U is None or not media.level_U.shape[0]:
        return media.present_B.new_zeros(media.present_B.shape).float()
    return media.level_U.index_select(0, media.index_B)


def _alignment(output: SandwichOutput, batch: Batch) -> Tensor | None:
    """The contrastive loss over the records that have both; None where the batch lacks one of the two, and for a
    model that is not in training."""
    if len(output.aligned) < 2:
        return None
    (left, left_UD), (right, right_VD) = output.aligned.items()
    both_B = _both(batch, left, right)
    return contrastive_loss(left_UD, right_VD, batch.media[left].index_B[both_B], batch.media[right].index_B[both_B])


def _gathered_alignment(
    names: tuple[str, ...], group: dist.ProcessGroup, output: SandwichOutput, batch: Batch
) -> Tensor | None:
    """The same over the batch of all ranks; None where all of them lack one of the two."""
    both_B = _both(batch, *names)
    sides = []
    for name in names:
        media = batch.media[name]
        assert media.id_U is not None, "a batch that is shared out numbers its media"
        nothing_UD = output.fused_BD.new_zeros(0, output.vector_BMD.shape[-1])
        sides.append(Side(output.aligned.get(name, nothing_UD), media.id_U, media.index_B[both_B]))
    left, right = sides
    return gathered_contrastive_loss(left, right, group)


def _both(batch: Batch, *names: str) -> Tensor:
    """Which records have all of these, for the answer or beside it."""
    media = [batch.media[name] for name in names]
    return torch.stack([one.present_B if one.there_B is None else one.there_B for one in media]).all(dim=0)
