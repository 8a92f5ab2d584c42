"""A student learns from its teacher, and from labels where there are any.

Here        DistilConfig; Lessons, the losses of one student and its teachers; `distil`, which trains it;
            `teacher_beside`, a further teacher of one modality.
Elsewhere   the losses themselves (objectives/); making a student (student.py); the loop (engine/trainer.py).
Promise     teacher and student may have any shape: what cannot be held against each other is left out, and said.
            Teachers see all that a record has, also what is hidden from the student; nothing of theirs changes. A run
            that was killed goes on to the losses that it would have had.
"""

from __future__ import annotations

import functools
import gc
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import field_validator, model_validator
from torch import Tensor, nn

from dougong.bundle.model import Model
from dougong.compress.structure import BRIDGE
from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.core.events import Announcer, Listener
from dougong.core.signature import Task
from dougong.data.collate import View
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.preparation import Preparation
from dougong.data.table import Table
from dougong.engine.checkpoint import best_weights, load_weights
from dougong.engine.evaluate import Evaluation, evaluate
from dougong.engine.metrics import primary_metric
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.trainer import TrainConfig, TrainResult, Watch, train
from dougong.model.bridge import BottleneckBlock
from dougong.model.encoders.encoder import Tokens, TransformerLayer
from dougong.model.sandwich import BridgeBlock, EncoderBlock, Sandwich, SandwichOutput
from dougong.nn.attention import Attention
from dougong.nn.batch import Batch, only_media
from dougong.nn.block_stack import BlockStack
from dougong.objectives.decision import decision_loss
from dougong.objectives.distillation import distillation_loss
from dougong.objectives.relations import attention_loss, relation_loss, weight_loss

JUDGED_AT_ONCE: Final = 256
ALL_TOGETHER: Final = "(all)"
"""Who asks in a merged bridge."""


class DistilConfig(Config):
    """What a student learns, and for how long."""

    temperature: float = 2.0
    """Of the teacher's and the student's answers: above 1, what the teacher holds for nearly possible counts more."""

    answer_weight: float = 1.0
    """Of the teacher's answers. Where a modality has a teacher of its own, of that one's too."""

    label_weight: float = 0.5
    """Of the true answers, where they are known."""

    own_weight: float = 0.5
    """Of what each modality decides by itself, where both have such heads."""

    relation_weight: float = 0.1
    """Of how tokens stand to each other in each encoder's last layer (queries, keys and values)."""

    attention_weight: float = 0.1
    """Of where the bridge's tokens look, in its last block; where they are others than the teacher's, of how much each
    modality's look at each other one together."""

    gate_weight: float = 0.1
    """Of how much each modality counts."""

    withhold: float = 0.0
    """The chance of each modality to be left out of a training record, for the teacher too."""

    views: tuple[View, ...] = ()
    """Instead: how training records are seen. What a view has `beside`, teachers see and the student does not."""

    one_view_a_batch: bool = False
    loader: LoaderConfig = LoaderConfig()
    seed: int = 0
    train: TrainConfig = TrainConfig(
        steps=400, precision="fp32", optimizer=OptimizerConfig(learning_rate=7e-4, warmup_ratio=0.1)
    )

    @field_validator("temperature")
    @classmethod
    def _above_zero(cls, temperature: float) -> float:
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"{temperature} must be above 0: it divides the scores. Use 1.0, or 2.0.")
        return temperature

    @field_validator(
        "answer_weight", "label_weight", "own_weight", "relation_weight", "attention_weight", "gate_weight"
    )
    @classmethod
    def _not_below_zero(cls, weight: float) -> float:
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"{weight} must not be below 0. Use 0 to leave it out.")
        return weight

    @model_validator(mode="after")
    def _learns_something(self) -> DistilConfig:
        if not self.answer_weight and not self.label_weight:
            raise ValueError("answer_weight and label_weight are both 0: nothing says what is right. Give one of them.")
        if self.views and self.withhold:
            raise ValueError("views and withhold both say what is left out. Give one of them.")
        return self


class Teacher(NamedTuple):
    """Who teaches what."""

    network: Sandwich
    names: tuple[str, ...]
    """Modalities that it is shown."""


@dataclass
class Lessons:
    """The losses of one student; a `Loss` of the engine, given the student's output."""

    student: Sandwich
    teacher: Teacher
    beside: tuple[Teacher, ...]
    """Teachers of some modalities alone: of the student's answer with just these."""

    config: DistilConfig
    task: Task
    left_out: list[str] = field(default_factory=list)
    """What could not be held against each other, in words."""

    def __post_init__(self) -> None:
        for teacher in (self.teacher, *self.beside):
            teacher.network.eval().requires_grad_(False)
        self._own, self._taught = _Heard(self.student), _Heard(self.teacher.network)
        for name in self._own.relations.keys() | self._taught.relations.keys():
            if name not in self._own.relations or name not in self._taught.relations:
                self.left_out.append(f"relations of {name}: one of the two has no attention there")
        if (self._own.attention is None) != (self._taught.attention is None):
            self.left_out.append("attention of the bridge: one of the two has none")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, what both models compute is heard."""
        with self._own.listening(), self._taught.listening():
            yield

    def __call__(self, output: SandwichOutput, batch: Batch) -> Tensor:
        """The sum over the batch's records."""
        config, temperature = self.config, self.config.temperature
        with torch.no_grad():
            taught: SandwichOutput = self.teacher.network(shown_to(self.teacher, batch))
        total = output.output_BC.new_zeros((), dtype=torch.float32)
        if config.answer_weight:
            total = total + config.answer_weight * self._answers(output.output_BC, taught.output_BC)
        if config.label_weight and batch.target is not None:
            total = total + config.label_weight * decision_loss(output.output_BC, batch.target, self.task)
        if config.own_weight and output.own_BMC is not None and taught.own_BMC is not None:
            for place, name in enumerate(self.student.names):
                other = self.teacher.network.names.index(name)
                there_B = batch.media[name].present_B
                own_BC, taught_BC = output.own_BMC[there_B, place], taught.own_BMC[there_B, other]
                total = total + config.own_weight * distillation_loss(
                    own_BC / temperature, taught_BC / temperature, self.task
                )
        gates = (output.weight_BM, taught.weight_BM)
        if config.gate_weight and self.student.names == self.teacher.network.names and None not in gates:
            # Of records whose modalities both see: else the gates speak of different things.
            same_B = _same_sight(batch, self.student.names)
            own_BM, taught_BM = (weight_BM[same_B] for weight_BM in gates if weight_BM is not None)
            total = total + config.gate_weight * weight_loss(own_BM, taught_BM)
        if config.relation_weight:
            total = total + config.relation_weight * self._own.relation_losses(self._taught)
        if config.attention_weight:
            total = total + config.attention_weight * self._own.attention_losses(self._taught)
        self._own.forget()
        self._taught.forget()
        for teacher in self.beside:
            total = total + self._beside(teacher, batch)
        return total

    def _answers(self, own_BC: Tensor, taught_BC: Tensor) -> Tensor:
        """At a temperature; its square keeps the gradient's size (Hinton et al. 2015, arXiv:1503.02531)."""
        if self.task == "regression":
            return distillation_loss(own_BC, taught_BC, self.task)
        temperature = self.config.temperature
        return temperature**2 * distillation_loss(own_BC / temperature, taught_BC / temperature, self.task)

    def _beside(self, teacher: Teacher, batch: Batch) -> Tensor:
        shown = shown_to(teacher, batch)
        present = [shown.media[name].present_B for name in teacher.names if name in shown.media]
        if not present or not bool(torch.stack(present).any()):
            return next(self.student.parameters()).new_zeros(())
        some_B = torch.stack(present).any(dim=0)
        with torch.no_grad():
            taught_BC = teacher.network(shown).output_BC
        # The student answers once more, from these modalities alone.
        media = {
            name: one._replace(present_B=one.present_B & (name in teacher.names)) for name, one in batch.media.items()
        }
        narrowed = Batch({name: only_media(_hidden(one)) for name, one in media.items()}, batch.target)
        own_BC = self.student(narrowed).output_BC
        self._own.forget()
        return self.config.answer_weight * self._answers(own_BC[some_B], taught_BC[some_B])


def shown_to(teacher: Teacher, batch: Batch) -> Batch:
    """What a teacher sees of a batch: its modalities, with all that is there."""
    media = {}
    for name in teacher.network.names:
        one = batch.media[name]
        there_B = one.present_B if one.there_B is None else one.there_B
        if name not in teacher.names:
            there_B = torch.zeros_like(there_B)
        media[name] = one._replace(present_B=there_B, there_B=None)
    return Batch(media, batch.target)


def _hidden(one: Any) -> Any:
    return one._replace(there_B=None)


def _same_sight(batch: Batch, names: Sequence[str]) -> Tensor:
    """Records of which nothing is hidden from the student."""
    media = [batch.media[name] for name in names]
    same = [one.present_B == (one.present_B if one.there_B is None else one.there_B) for one in media]
    return torch.stack(same).all(dim=0)


class _Relations(NamedTuple):
    """What one attention layer made of its tokens. Shapes: U media, T tokens, D channels."""

    made: tuple[Tensor, ...]
    """Queries, keys and values."""

    mask_UT: Tensor


class _Looked(NamedTuple):
    """Where one modality's tokens looked. Shapes: B records, T queries, S keys."""

    weight_BTS: Tensor
    mask_BT: Tensor
    counts: tuple[int, ...]
    """Keys of each modality that was looked at, in order."""

    def by_modality(self) -> Tensor:
        """How much the tokens together look at each of them, (B, 1, M)."""
        ends = itertools.accumulate(self.counts)
        parts = [
            self.weight_BTS[..., end - count : end].sum(dim=-1) for count, end in zip(self.counts, ends, strict=True)
        ]
        weight_BTM = torch.stack(parts, dim=-1).masked_fill(~self.mask_BT[..., None], 0.0)
        return weight_BTM.sum(dim=1, keepdim=True) / self.mask_BT.sum(dim=1).clamp(min=1)[:, None, None]


class _Heard:
    """What is heard of a model's layers while it answers: each encoder's last, and the bridge's last."""

    def __init__(self, model: Sandwich) -> None:
        self._relations: dict[str, _Relations] = {}
        self._attention: dict[str, _Looked] = {}
        last: dict[str, nn.Module] = {}
        for block in model.blocks:
            if isinstance(block, EncoderBlock):
                last[block.name] = block.layer
            elif isinstance(block, BridgeBlock):
                last[BRIDGE] = block.block
        self.attention = last.pop(BRIDGE, None)
        self._asks_itself = isinstance(self.attention, BottleneckBlock)
        self.relations = {
            name: layer for name, layer in last.items() if isinstance(layer, TransformerLayer) or _own_attention(layer)
        }
        self._model = model
        self._tokens: dict[str, Tensor] = {}
        self._masks: dict[str, Tensor] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.callback(self._model.register_forward_pre_hook(lambda *_: self.forget()).remove)
            for name, layer in self.relations.items():
                stack.callback(layer.register_forward_pre_hook(functools.partial(self._enter, name)).remove)
                for place, part in enumerate(_projections(layer)):
                    hook = functools.partial(self._made, name, place)
                    stack.callback(part.register_forward_hook(hook).remove)
            if self.attention is not None:
                stack.callback(self.attention.register_forward_pre_hook(self._enter_bridge).remove)
                for name, attention in _asking(self.attention, self._model.names):
                    hook = functools.partial(self._looked, name)
                    stack.callback(attention.register_forward_pre_hook(hook).remove)
            yield

    def forget(self) -> None:
        self._relations.clear()
        self._attention.clear()

    def _enter(self, name: str, layer: nn.Module, given: tuple[Any, ...]) -> None:
        if torch.is_inference_mode_enabled():
            return  # it is being judged, not taught
        tokens: Tokens = given[0]
        self._relations[name] = _Relations((), tokens.mask_UT)

    def _made(self, name: str, place: int, linear: nn.Module, given: tuple[Any, ...], made: Tensor) -> None:
        if name not in self._relations:
            return
        heard, parts = self._relations[name], (made,)
        own = _own_attention(self.relations[name])
        if own is not None and place == 1:
            # Ours makes each head's key and value side by side.
            both = made.view(*made.shape[:-1], own.num_heads, 2, -1)
            parts = (both[..., 0, :].flatten(-2), both[..., 1, :].flatten(-2))  # type: ignore[assignment]
        self._relations[name] = heard._replace(made=(*heard.made, *parts))

    def _enter_bridge(self, block: nn.Module, given: tuple[Any, ...]) -> None:
        self._tokens, self._masks = given[:2]

    def _looked(self, name: str, attention: nn.Module, given: tuple[Any, ...]) -> None:
        if torch.is_inference_mode_enabled():
            return
        assert isinstance(attention, Attention)
        x_BTD, context_BSD, mask_BS = given
        q_BHTK = attention.query(x_BTD).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        both = attention.key_value(context_BSD).unflatten(-1, (attention.num_heads, 2, -1))
        k_BHSK = both[..., 0, :].transpose(1, 2)
        score_BHTS = q_BHTK @ k_BHSK.transpose(-1, -2) * q_BHTK.shape[-1] ** -0.5
        if mask_BS is not None:
            score_BHTS = score_BHTS.masked_fill(~mask_BS[:, None, None], torch.finfo(score_BHTS.dtype).min)
        weight_BTS = score_BHTS.softmax(dim=-1).mean(dim=1)
        if mask_BS is not None:
            weight_BTS = weight_BTS * mask_BS.any(dim=-1)[:, None, None]
        mask_BT = mask_BS if name == ALL_TOGETHER else self._masks[name]
        counts = [x.shape[1] for other, x in self._tokens.items() if (other == name) is self._asks_itself]
        left = context_BSD.shape[1] - sum(counts)  # of a bottleneck, the tokens between
        self._attention[name] = _Looked(weight_BTS, mask_BT, (*counts, *([left] if left else [])))

    def relation_losses(self, taught: _Heard) -> Tensor:
        """Summed over encoders, the mean of queries, keys and values of each."""
        total = next(self._model.parameters()).new_zeros((), dtype=torch.float32)
        for name, own in self._relations.items():
            other = taught._relations.get(name)
            # Media that only one of the two was shown make other rows.
            if other is None or own.mask_UT.shape != other.mask_UT.shape or len(own.made) != len(other.made):
                continue
            for x, y in zip(own.made, other.made, strict=True):
                heads = math.gcd(x.shape[-1], y.shape[-1], _heads_of(taught.relations[name]) * 4)
                total = total + relation_loss(x, y, own.mask_UT, num_heads=heads) / len(own.made)
        return total

    def attention_losses(self, taught: _Heard) -> Tensor:
        """Summed over modalities that ask."""
        total = next(self._model.parameters()).new_zeros((), dtype=torch.float32)
        for name, own in self._attention.items():
            other = taught._attention.get(name)
            if other is None or len(own.counts) != len(other.counts):
                continue
            if own.weight_BTS.shape == other.weight_BTS.shape:
                total = total + attention_loss(own.weight_BTS, other.weight_BTS, own.mask_BT & other.mask_BT)
            else:  # other tokens: what they look at together is left to compare
                some_B1 = (own.mask_BT.any(dim=1) & other.mask_BT.any(dim=1))[:, None]
                total = total + attention_loss(own.by_modality(), other.by_modality(), some_B1)
        return total


def _own_attention(layer: nn.Module) -> Attention | None:
    found = getattr(layer, "attention", None)
    return found if isinstance(found, Attention) else None


def _projections(layer: nn.Module) -> list[nn.Module]:
    """What makes queries, keys and values."""
    own = _own_attention(layer)
    if own is not None:
        return [own.query, own.key_value]
    assert isinstance(layer, TransformerLayer)
    return [layer.get_submodule(name) for name in layer.split().columns if ".attention." in name]


def _heads_of(layer: nn.Module) -> int:
    own = _own_attention(layer)
    if own is not None:
        return own.num_heads
    assert isinstance(layer, TransformerLayer)
    *path, last = layer.split().counts[0].split(".")
    return int(getattr(layer.get_submodule(".".join(path)), last))


def _asking(block: nn.Module, names: Sequence[str]) -> list[tuple[str, Attention]]:
    """The attention of each asking modality; of a merged block that of all together."""
    attention: Any = getattr(block, "attention", None)
    if isinstance(attention, Attention):
        return [(ALL_TOGETHER, attention)]
    if attention is None or len(names) < 2:
        return []
    return [(name, attention[name]) for name in names]


def distil(
    student: Sandwich,
    preparation: Preparation,
    teacher: Model,
    records: Table,
    judged: Table,
    config: DistilConfig,
    folder: Path,
    *,
    beside: Mapping[str, Model] | None = None,
    listeners: Sequence[Listener] = (),
    resume: bool = False,
    after_step: Callable[[], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> TrainResult:
    """Train the student, in place; it ends with its best weights. `preparation` has the modalities that it reads.

    Records are prepared as the teacher's are; those without a target column are learnt from by the teacher's answers
    alone. `judged` chooses the best weights: by the task's figure where it has the target, else by agreement.
    `beside` are teachers of one modality each, by its name. `folder` keeps checkpoints; `after_step` is called after
    each step; `say` is told what the two cannot be held against each other in.

    Raises:
        ConfigError: a teacher reads other inputs, or nothing is there to learn from.
    """
    target = teacher.preparation.target
    if not config.answer_weight and target.name not in records.schema.names:
        raise ConfigError(
            f"answer_weight is 0, and {records.path.name} has no column {target.name!r}: nothing says what is right. "
            "Give it a weight, or a table with the target."
        )
    teachers = tuple(teacher_beside(name, model, teacher) for name, model in (beside or {}).items())
    everything = Teacher(teacher.network, tuple(teacher.preparation.modalities))
    lessons = Lessons(student, everything, teachers, config, target.task)
    for line in lessons.left_out:
        say(f"not taught: {line}")
    loader = Loader(
        records,
        teacher.preparation,
        config.loader,
        seed=config.seed,
        train=True,
        views=config.views,
        one_view_a_batch=config.one_view_a_batch,
        withhold=config.withhold,
    )
    metric = primary_metric(target.task)
    labelled = target.name in judged.schema.names

    def judge() -> Mapping[str, Evaluation]:
        found = judge_on(student, judged, preparation)
        if labelled:
            return {"all": found}
        agreed = agreement(found, told)
        return {"all": _with_metric(found, "agreement", agreed)}

    told = None if labelled else judge_on(teacher.network, judged, teacher.preparation)
    watch = Watch(
        judge, metric.name if labelled else "agreement", higher_is_better=metric.higher_is_better or not labelled
    )
    for parameter in student.parameters():
        parameter.requires_grad_(True)
    if after_step is not None:
        student.after_step = after_step  # type: ignore[method-assign]  # BlockStack's own place for it
    try:
        with lessons.listening():
            result = train(
                student,
                lessons,
                loader,
                config.train,
                folder=folder,
                watch=watch,
                announce=Announcer(*listeners),
                seed=config.seed,
                resume=resume,
            )
    finally:
        student.__dict__.pop("after_step", None)
        gc.collect()  # what trained refers to itself in circles; a search would hold the means of several trainings
    load_weights(student, best_weights(folder))
    student.eval()
    return result


def judge_on(network: BlockStack[Any, Any], table: Table, preparation: Preparation) -> Evaluation:
    """The figures of a network on all records of a table, as they are."""
    views = (View(keep=tuple(preparation.modalities)),)
    loader = Loader(table, preparation, LoaderConfig(batch_size=JUDGED_AT_ONCE), views=views)
    return evaluate(network, loader, preparation.target)


def agreement(found: Evaluation, told: Evaluation | None) -> float:
    """The share of records that both answer alike; of numbers, 1 less the mean distance in the teacher's spread."""
    assert told is not None
    found_B, told_B = of_both(found, told)
    answers, wanted = found.prediction_B[found_B], told.prediction_B[told_B]
    if found.probability_BC is None:
        spread = float(told.prediction_B.std()) or 1.0
        return 1.0 - float(abs(answers - wanted).mean()) / spread
    return float((answers == wanted).mean())


def of_both(one: Evaluation, other: Evaluation) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Places of the records that both answered: who is shown fewer media finds fewer records with one that cannot be
    read."""
    _, one_B, other_B = np.intersect1d(one.row_B, other.row_B, assume_unique=True, return_indices=True)
    return one_B, other_B


def _with_metric(found: Evaluation, name: str, value: float) -> Evaluation:
    found.metrics[name] = value
    return found


def teacher_beside(name: str, model: Model, teacher: Model) -> Teacher:
    """A teacher of one modality, which must read it as the main one does.

    Raises:
        ConfigError: it reads something else, or answers another question.
    """
    own, main = model.preparation.signature(), teacher.preparation.signature()
    if name not in main.inputs or own.inputs.get(name) != main.inputs[name]:
        raise ConfigError(
            f"the teacher of {name!r} reads it otherwise than the main teacher does, or not at all. Train it on the "
            "same table, with data.modalities set to that one."
        )
    if own.target != main.target:
        raise ConfigError(
            f"the teacher of {name!r} predicts {own.target.name}, with other labels. Train it on the same."
        )
    strange = [other for other in own.inputs if own.inputs[other] != main.inputs.get(other)]
    if strange:
        raise ConfigError(
            f"the teacher of {name!r} also reads {strange[0]!r}, which the main one does not. Leave it out."
        )
    return Teacher(model.network, (name,))
