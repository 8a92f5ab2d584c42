"""Faults, each put into a training before it begins.

Here        Operator, OPERATORS: what each does, its cause by the diagnoser's catalogue, and which trainings it fits.
Elsewhere   the trainings (fault_subjects.py); whether a fault did harm, and what was found (diagnose.py).
Promise     an operator changes one thing, and says where. None tells the diagnoser anything: it sees the training
            alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from fault_subjects import STEPS, Example, Job
from torch import Generator, Tensor, nn
from torch.nn import functional

from dougong.model.bridge import CrossBlock
from dougong.model.gate import GateOutput
from dougong.nn.attention import Attention
from dougong.nn.batch import Batch
from dougong.nn.latent_attention import LatentAttention

ALL: Final = ("sandwich", "decoder", "convolutions", "two towers", "waves")
SEVERAL: Final = ("sandwich", "two towers")
OF_NUMBERS: Final = ("sandwich", "convolutions", "two towers", "waves")
ATTENTION: Final = ("sandwich", "decoder")


class Operator(NamedTuple):
    """One way to spoil a training."""

    name: str
    cause: str
    subjects: tuple[str, ...]
    put: Callable[[Job, np.random.Generator], str]
    """Changes the job, and returns the place."""

    multimodal: bool = False
    unseen: bool = False
    """Of the test half alone."""


_found: list[Operator] = []


Put = Callable[[Job, np.random.Generator], str]


def _operator(
    name: str, cause: str, subjects: tuple[str, ...] = ALL, *, multimodal: bool = False, unseen: bool = False
) -> Callable[[Put], Put]:
    def keep(put: Put) -> Put:
        _found.append(Operator(name, cause, subjects, put, multimodal, unseen))
        return put

    return keep


def _module(job: Job, path: str) -> Any:
    return job.model.get_submodule(path)


def _one(paths: list[str], random: np.random.Generator) -> str:
    return paths[int(random.integers(len(paths)))]


def _wrapped(module: nn.Module, around: Callable[[Any, Any], Any]) -> None:
    """`around(found, args)` in place of what its forward makes."""
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return around(inner(*args, **kwargs), args)

    module.forward = forward


# The optimizer -------------------------------------------------------------------------------------------------------


@_operator("learning rate x 300", "learning rate too high")
def _rate_300(job: Job, _: np.random.Generator) -> str:
    job.settings = job.settings._replace(learning_rate=300 * job.settings.learning_rate, clip=None)
    return "optimizer"


@_operator("learning rate x 2000", "learning rate too high")
def _rate_2000(job: Job, _: np.random.Generator) -> str:
    job.settings = job.settings._replace(learning_rate=2000 * job.settings.learning_rate, clip=None)
    return "optimizer"


@_operator("learning rate / 1000", "learning rate too low")
def _rate_low(job: Job, _: np.random.Generator) -> str:
    job.settings = job.settings._replace(learning_rate=job.settings.learning_rate / 1000)
    return "optimizer"


@_operator("learning rate / 30000", "learning rate too low")
def _rate_lower(job: Job, _: np.random.Generator) -> str:
    job.settings = job.settings._replace(learning_rate=job.settings.learning_rate / 30000)
    return "optimizer"


@_operator("schedule steps once a record", "schedule")
def _schedule_records(job: Job, _: np.random.Generator) -> str:
    job.rate_at = lambda step: 0.97 ** (step * job.settings.batch_size)
    return "optimizer"


@_operator("schedule of a tenth of the run", "schedule")
def _schedule_short(job: Job, _: np.random.Generator) -> str:
    job.rate_at = lambda step: max(0.001, 1 - step / (0.06 * STEPS))
    return "optimizer"


@_operator("gradients never cleared", "gradients not cleared")
def _not_cleared(job: Job, _: np.random.Generator) -> str:
    job.clears = False
    return "optimizer"


@_operator("maximize", "goes uphill")
def _maximize(job: Job, _: np.random.Generator) -> str:
    job.changes["maximize"] = True
    return "optimizer"


@_operator("gradient with the wrong sign", "goes uphill")
def _wrong_sign(job: Job, _: np.random.Generator) -> str:
    def turn(model: nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.neg_()

    job.after_backward = turn
    return "optimizer"


@_operator("weight decay 60", "weight decay too high")
def _decay(job: Job, _: np.random.Generator) -> str:
    job.changes["weight_decay"] = 60.0 if job.settings.optimizer == "adamw" else 3.0
    return "optimizer"


@_operator("epsilon 1", "optimizer memory")
def _epsilon(job: Job, _: np.random.Generator) -> str:
    job.settings = job.settings._replace(optimizer="adamw", learning_rate=min(job.settings.learning_rate, 2e-3))
    job.changes["eps"] = 1.0
    return "optimizer"


@_operator("momentum .999", "optimizer memory")
def _momentum(job: Job, _: np.random.Generator) -> str:
    if job.settings.optimizer == "adamw":
        job.changes["betas"] = (0.999, 0.9995)
    else:
        job.changes["momentum"] = 0.999
    return "optimizer"


# What is trained -----------------------------------------------------------------------------------------------------


def _freeze(job: Job, paths: list[str]) -> None:
    for path in paths:
        for parameter in _module(job, path).parameters():
            parameter.requires_grad_(False)


@_operator("all but the head frozen", "frozen")
def _frozen_all(job: Job, _: np.random.Generator) -> str:
    head = _module(job, job.head)
    kept = {id(p) for p in head.parameters()}
    for parameter in job.model.parameters():
        parameter.requires_grad_(id(parameter) in kept)
    return ""


@_operator("an encoder frozen", "frozen", SEVERAL, multimodal=True)
def _frozen_encoder(job: Job, random: np.random.Generator) -> str:
    name = _one(list(job.encoders), random)
    _freeze(job, job.encoders[name])
    return name


def _without(job: Job, left_out: set[int]) -> None:
    job.held = lambda model: [p for p in model.parameters() if id(p) not in left_out]


@_operator("the head not in the optimizer", "not in the optimizer")
def _head_left_out(job: Job, _: np.random.Generator) -> str:
    _without(job, {id(p) for p in _module(job, job.head).parameters()})
    return job.head


@_operator("an encoder not in the optimizer", "not in the optimizer", SEVERAL, multimodal=True)
def _encoder_left_out(job: Job, random: np.random.Generator) -> str:
    name = _one(list(job.encoders), random)
    _without(job, {id(p) for path in job.encoders[name] for p in _module(job, path).parameters()})
    return name


@_operator("the optimizer holds a copy of the model", "not in the optimizer")
def _of_a_copy(job: Job, _: np.random.Generator) -> str:
    job.held = lambda model: [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    return "(all)"


class _Adapted(nn.Module):
    """A frozen layer with a low-rank adapter."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.lora_down = nn.Linear(inner.in_features, 4, bias=False)
        self.lora_up = nn.Linear(4, inner.out_features, bias=False)
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x) + self.lora_up(self.lora_down(x))
        return found


@_operator("adapters not in the optimizer", "adapter not in the optimizer")
def _adapters(job: Job, _: np.random.Generator) -> str:
    held = list(job.model.parameters())
    for parameter in held:
        parameter.requires_grad_(False)
    changed = 0
    for module in list(job.model.modules()):
        for name, child in list(module.named_children()):
            # A layer whose weight is read by others, not called, stays as it is.
            if isinstance(child, nn.Linear) and min(child.weight.shape) >= 6 and name != "key_value":
                setattr(module, name, _Adapted(child))
                changed += 1
    assert changed, job.subject
    job.held = lambda model: held
    return ""


@_operator("detached in the middle", "gradient cut", OF_NUMBERS)
def _detached(job: Job, random: np.random.Generator) -> str:
    if job.subject == "sandwich":
        name = _one(list(job.encoders), random)
        last = _finish(job, name)
        _wrapped(_module(job, last).project, lambda found, _: found.detach())
        return name
    path = {"convolutions": job.hidden[0], "waves": "blocks.2"}.get(job.subject, "numbers.2")
    _wrapped(_module(job, path), lambda found, _: found.detach())
    return path.partition(".")[0]


def _finish(job: Job, name: str) -> str:
    for path, module in job.model.named_modules():
        if type(module).__name__ == "FinishBlock" and module.name == name:
            return str(path)
    raise AssertionError(name)


# Initialisation ------------------------------------------------------------------------------------------------------


@_operator("a matrix begins constant", "initialisation constant")
def _constant(job: Job, random: np.random.Generator) -> str:
    for path in job.hidden:
        module = _module(job, path)
        with torch.no_grad():
            module.weight.fill_(0.05)
    return ""


@_operator("all matrices begin at zero", "initialisation constant")
def _zero(job: Job, _: np.random.Generator) -> str:
    with torch.no_grad():
        for parameter in job.model.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
    return ""


@_operator("a matrix begins 60 times too large", "initialisation too large")
def _large(job: Job, random: np.random.Generator) -> str:
    path = job.head
    with torch.no_grad():
        _module(job, path).weight.mul_(60)
    return path


@_operator("all matrices begin 25 times too large", "initialisation too large")
def _all_large(job: Job, _: np.random.Generator) -> str:
    with torch.no_grad():
        for module in job.model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d):
                module.weight.mul_(25)
    return ""


@_operator("all matrices begin 1000 times too small", "initialisation too small")
def _small(job: Job, _: np.random.Generator) -> str:
    with torch.no_grad():
        for module in job.model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d):
                module.weight.mul_(0.001)
    return ""


# Activations, norms, residuals ---------------------------------------------------------------------------------------


@_operator("ReLUs with biases of -8", "dead units", OF_NUMBERS)
def _dead(job: Job, _: np.random.Generator) -> str:
    path = {"convolutions": "features.7", "two towers": "join", "waves": "last"}.get(job.subject, job.head)
    module = _module(job, path)
    with torch.no_grad():
        if job.subject == "sandwich":
            _wrapped(module, lambda found, _: functional.relu(found - 8.0))
        else:
            module.bias.fill_(-8.0)
    return {"convolutions": "features.8", "two towers": "", "waves": "bend"}.get(job.subject, path)


def _in_the_middle(job: Job) -> str:
    """A module whose numbers all that follows hangs on."""
    return {"convolutions": "features", "two towers": "join", "waves": "last"}.get(job.subject, job.head)


@_operator("saturated sigmoids", "saturated units", OF_NUMBERS)
def _saturated(job: Job, _: np.random.Generator) -> str:
    path = _in_the_middle(job)
    _wrapped(_module(job, path), lambda found, _: torch.sigmoid(60 * found))
    return path if job.subject != "sandwich" else ""


@_operator("saturated tanhs", "saturated units", OF_NUMBERS)
def _saturated_tanh(job: Job, _: np.random.Generator) -> str:
    path = _in_the_middle(job)
    _wrapped(_module(job, path), lambda found, _: torch.tanh(100 * found))
    return path if job.subject != "sandwich" else ""


@_operator("a layer multiplied by 3000", "exploding")
def _exploding(job: Job, random: np.random.Generator) -> str:
    path = job.hidden[-1] if job.subject != "sandwich" else job.head
    # Under the weights, so that their beginning is as usual.
    _wrapped(_module(job, path), lambda found, _: 3000.0 * found)
    return path


@_operator("norms with an epsilon of 1e4", "norm", ("sandwich", "decoder", "convolutions", "waves"))
def _epsilon_of_norms(job: Job, _: np.random.Generator) -> str:
    for module in job.model.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.BatchNorm2d | nn.GroupNorm):
            module.eps = 1e4
    return ""


@_operator("norms with a gain of 0", "norm", ("sandwich", "decoder", "convolutions", "waves"))
def _gain_of_norms(job: Job, _: np.random.Generator) -> str:
    for module in job.model.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.BatchNorm2d | nn.GroupNorm):
            with torch.no_grad():
                module.weight.fill_(1e-3)
    return ""


@_operator("dropout .95", "dropout too high", OF_NUMBERS)
def _dropout(job: Job, _: np.random.Generator) -> str:
    for module in job.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.95
    return ""


# Attention, masks, positions -----------------------------------------------------------------------------------------


def _attentions(job: Job) -> list[Any]:
    return [m for m in job.model.modules() if isinstance(m, Attention | LatentAttention)]


def _scaled(job: Job, factor: float) -> None:
    fused = functional.scaled_dot_product_attention

    for module in job.model.modules():
        if isinstance(module, LatentAttention):
            module.scale *= factor
        elif isinstance(module, Attention):
            inner = module.forward

            def forward(*args: Any, _inner: Any = inner, **kwargs: Any) -> Any:
                def other(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
                    return fused(query, key, value, **{**named, "scale": factor * query.shape[-1] ** -0.5})

                functional.scaled_dot_product_attention = other  # type: ignore[assignment]  # as a fault would
                try:
                    return _inner(*args, **kwargs)
                finally:
                    functional.scaled_dot_product_attention = fused

            module.forward = forward  # type: ignore[method-assign]


@_operator("scores not divided by sqrt(width), 40 times over", "attention scale", ATTENTION)
def _not_divided(job: Job, _: np.random.Generator) -> str:
    _scaled(job, 40.0)
    return ""


@_operator("scores divided 1000 times too often", "attention scale", ATTENTION)
def _divided_twice(job: Job, _: np.random.Generator) -> str:
    _scaled(job, 0.001)
    return ""


@_operator("softmax over the queries", "attention axis", ATTENTION)
def _over_queries(job: Job, _: np.random.Generator) -> str:
    fused = functional.scaled_dot_product_attention
    for module in _attentions(job):
        inner = module.forward

        def forward(*args: Any, _inner: Any = inner, **kwargs: Any) -> Any:
            def other(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
                score = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
                return torch.softmax(score, dim=-2) @ value

            functional.scaled_dot_product_attention = other  # type: ignore[assignment]  # as a fault would
            try:
                return _inner(*args, **kwargs)
            finally:
                functional.scaled_dot_product_attention = fused

        module.forward = forward
    return ""


@_operator("no causal mask", "causal mask", ("decoder",))
def _not_causal(job: Job, _: np.random.Generator) -> str:
    fused = functional.scaled_dot_product_attention
    for module in _attentions(job):
        inner = module.forward

        def forward(*args: Any, _inner: Any = inner, **kwargs: Any) -> Any:
            def other(query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
                # In training alone, as where a flag is passed in one of two paths.
                causal = named.get("is_causal", False) and not job.model.training
                return fused(query, key, value, **{**named, "is_causal": causal})

            functional.scaled_dot_product_attention = other  # type: ignore[assignment]  # as a fault would
            try:
                return _inner(*args, **kwargs)
            finally:
                functional.scaled_dot_product_attention = fused

        module.forward = forward
    return ""


@_operator("no positions of words", "positions", ("sandwich",))
def _no_positions(job: Job, _: np.random.Generator) -> str:
    for path, module in job.model.named_modules():
        if path.endswith("position_embeddings"):
            with torch.no_grad():
                module.weight.zero_()
            module.weight.requires_grad_(True)
            _wrapped(module, lambda found, _: 0.0 * found)
    return "words"


@_operator("words in any order", "positions", ("two towers",))
def _any_order(job: Job, _: np.random.Generator) -> str:
    class Bag(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x.mean(dim=1, keepdim=True).expand_as(x), None

    job.model.reader = Bag()
    job.encoders["ids"] = ["embedding"]
    return "ids"


def _changed(inputs: Any, name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Any:
    """Inputs with one modality's values changed."""
    if isinstance(inputs, Batch):
        media = inputs.media[name]
        return inputs._replace(media={**inputs.media, name: media._replace(values=change(dict(media.values)))})
    if isinstance(inputs, dict):
        (value,) = change({"value": inputs[name]}).values()
        return {**inputs, name: value}
    (value,) = change({"value": inputs}).values()
    return value


def _of_floats(job: Job, random: np.random.Generator) -> str:
    known = {"sandwich": ["photo", "tone"], "two towers": ["numbers"], "waves": ["samples"]}
    return _one(known.get(job.subject, ["pixels"]), random)


def _spoil_both(job: Job, spoil: Callable[[Any, Tensor, Generator], Example]) -> None:
    job.spoil.append(spoil)
    job.spoil_judging.append(spoil)


@_operator("padding is attended to", "padding leak", ("sandwich",), multimodal=True)
def _padding(job: Job, _: np.random.Generator) -> str:
    """Its embeddings are those of words, and nobody is told; where it is judged, other padding."""

    def garbage(inputs: Any, target: Tensor, generator: Generator) -> Example:
        def change(values: dict[str, Tensor]) -> dict[str, Tensor]:
            ids, mask = values["ids_UT"], values["mask_UT"]
            other = torch.randint(4, 10, ids.shape, generator=generator)
            return {**values, "ids_UT": torch.where(mask, ids, other)}

        return _changed(inputs, "words", change), target

    _spoil_both(job, garbage)
    fused = functional.scaled_dot_product_attention
    for module in job.model.modules():
        if type(module).__name__ == "EncoderBlock" and module.name == "words":
            inner = module.forward

            def forward(*args: Any, _inner: Any = inner, **kwargs: Any) -> Any:
                def other(query: Tensor, key: Tensor, value: Tensor, *more: Any, **named: Any) -> Tensor:
                    return fused(query, key, value, **{**named, "attn_mask": None})

                functional.scaled_dot_product_attention = other
                try:
                    return _inner(*args, **kwargs)
                finally:
                    functional.scaled_dot_product_attention = fused

            module.forward = forward
    return "words"


@_operator("mask inverted", "mask hides", ("sandwich",), multimodal=True)
def _inverted(job: Job, _: np.random.Generator) -> str:
    def invert(inputs: Any, target: Tensor, __: Generator) -> Example:
        return _changed(inputs, "words", lambda v: {**v, "mask_UT": ~v["mask_UT"]}), target

    _spoil_both(job, invert)
    return "words"


@_operator("mask of nothing", "mask hides", ("sandwich",), multimodal=True)
def _nothing(job: Job, random: np.random.Generator) -> str:
    name = ["words", "tone"][int(random.integers(2))]

    def hide(inputs: Any, target: Tensor, __: Generator) -> Example:
        return _changed(inputs, name, lambda v: {**v, "mask_UT": v["mask_UT"] & False}), target

    _spoil_both(job, hide)
    return name


# Loss and labels -----------------------------------------------------------------------------------------------------


@_operator("softmax before cross entropy", "softmax twice")
def _softmax(job: Job, _: np.random.Generator) -> str:
    job.loss = lambda scores, target: functional.cross_entropy(scores.softmax(dim=-1), target)
    return "loss"


@_operator("negative loss", "loss sign")
def _negative(job: Job, _: np.random.Generator) -> str:
    job.loss = lambda scores, target: -functional.cross_entropy(scores, target)
    return "loss"


@_operator("label smoothing .97", "loss terms")
def _smoothing(job: Job, _: np.random.Generator) -> str:
    # The true label's share is below every other's.
    job.loss = lambda scores, target: functional.cross_entropy(scores, target, label_smoothing=0.9999)
    return "loss"


@_operator("half of the classes weigh nothing", "loss terms")
def _weightless(job: Job, _: np.random.Generator) -> str:
    weight = torch.ones(job.num_classes)
    weight[: job.num_classes // 2] = 0.0
    job.loss = lambda scores, target: functional.cross_entropy(scores, target, weight=weight)
    return "loss"


@_operator("all targets ignored but few", "loss terms")
def _ignored(job: Job, _: np.random.Generator) -> str:
    def loss(scores: Tensor, target: Tensor) -> Tensor:
        kept = target.clone()
        kept[1:] = -100
        return functional.cross_entropy(scores, kept)

    job.loss = loss
    return "loss"


@_operator("labels drawn at random", "labels")
def _random_labels(job: Job, _: np.random.Generator) -> str:
    def shuffle(inputs: Any, target: Tensor, generator: Generator) -> Example:
        return inputs, target[torch.randperm(len(target), generator=generator)]

    job.spoil.append(shuffle)
    return "targets"


@_operator("labels of the record before", "labels", OF_NUMBERS)
def _rolled_labels(job: Job, _: np.random.Generator) -> str:
    job.spoil.append(lambda inputs, target, _: (inputs, target.roll(1)))
    return "targets"


@_operator("other numbers of classes in training", "judging differs")
def _renamed(job: Job, _: np.random.Generator) -> str:
    job.spoil.append(lambda inputs, target, _: (inputs, (target + 1) % job.num_classes))
    return "targets"


@_operator("sorted by class", "not shuffled", OF_NUMBERS)
def _sorted(job: Job, _: np.random.Generator) -> str:
    steps = iter(range(10**9))
    batches = job.make

    def make(number: int, generator: Generator) -> Example:
        if number != job.settings.batch_size:
            return batches(number, generator)
        wanted = next(steps) * job.num_classes // STEPS % job.num_classes
        inputs, target = batches(number * job.num_classes * 3, generator)
        rows = (target == wanted).nonzero()[:number, 0]
        return _rows(inputs, rows), target[rows]

    job.make = make
    return "data"


def _rows(inputs: Any, rows: Tensor) -> Any:
    if isinstance(inputs, Batch):
        media = {}
        for name, one in inputs.media.items():
            every = torch.arange(len(rows))
            values = {key: value[rows] for key, value in one.values.items()}
            media[name] = one._replace(values=values, index_B=every, present_B=one.present_B[rows])
        return Batch(media, None)
    if isinstance(inputs, dict):
        return {key: value[rows] for key, value in inputs.items()}
    return inputs[rows]


@_operator("one batch again and again", "duplicates", OF_NUMBERS)
def _again(job: Job, _: np.random.Generator) -> str:
    first: list[Example] = []
    batches = job.make

    def make(number: int, generator: Generator) -> Example:
        if number != job.settings.batch_size:
            return batches(number, generator)
        if not first:
            first.append(batches(number, generator))
        return first[0]

    job.make = make
    return "data"


@_operator("few records, many times in a batch", "duplicates", OF_NUMBERS)
def _few(job: Job, _: np.random.Generator) -> str:
    batches = job.make

    def make(number: int, generator: Generator) -> Example:
        if number != job.settings.batch_size:
            return batches(number, generator)
        inputs, target = batches(4, Generator().manual_seed(job.seed))
        rows = torch.randint(4, (number,), generator=generator)
        return _rows(inputs, rows), target[rows]

    job.make = make
    return "data"


@_operator("the target is the input", "target leak", ("decoder",))
def _same(job: Job, _: np.random.Generator) -> str:
    def same(inputs: Any, target: Tensor, __: Generator) -> Example:
        return inputs, inputs.media["words"].values["ids_UT"][:, :-1].flatten()

    job.spoil.append(same)
    return "targets"


@_operator("judged in training mode", "judged in training mode", OF_NUMBERS)
def _mode(job: Job, _: np.random.Generator) -> str:
    job.judges_in_eval = False
    for module in job.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = max(module.p, 0.6)
    return "judging"


# Inputs --------------------------------------------------------------------------------------------------------------


@_operator("an input 255 times too large", "normalisation", OF_NUMBERS, multimodal=True)
def _not_normalised(job: Job, random: np.random.Generator) -> str:
    name = _of_floats(job, random)

    def grow(inputs: Any, target: Tensor, _: Generator) -> Example:
        return _changed(
            inputs, name, lambda v: {k: x * 255 if x.is_floating_point() else x for k, x in v.items()}
        ), target

    _spoil_both(job, grow)
    return name


@_operator("an input far from a mean of 0", "normalisation", OF_NUMBERS, multimodal=True)
def _not_centred(job: Job, random: np.random.Generator) -> str:
    name = _of_floats(job, random)

    def move(inputs: Any, target: Tensor, _: Generator) -> Example:
        return _changed(
            inputs, name, lambda v: {k: x + 70 if x.is_floating_point() else x for k, x in v.items()}
        ), target

    _spoil_both(job, move)
    return name


@_operator("an input of zeros", "constant input", OF_NUMBERS, multimodal=True)
def _zeros(job: Job, random: np.random.Generator) -> str:
    name = _of_floats(job, random)

    def clear(inputs: Any, target: Tensor, _: Generator) -> Example:
        return _changed(
            inputs, name, lambda v: {k: x * 0 if x.is_floating_point() else x for k, x in v.items()}
        ), target

    _spoil_both(job, clear)
    return name


@_operator("words all alike", "constant input", SEVERAL, multimodal=True)
def _alike(job: Job, _: np.random.Generator) -> str:
    name, key = ("words", "ids_UT") if job.subject == "sandwich" else ("ids", "value")

    def same(inputs: Any, target: Tensor, _: Generator) -> Example:
        return _changed(inputs, name, lambda v: {**v, key: v[key][:1].expand_as(v[key]).clone()}), target

    _spoil_both(job, same)
    return name


@_operator("training hears another rate", "input mismatch", ("sandwich",), multimodal=True)
def _rate(job: Job, _: np.random.Generator) -> str:
    def faster(inputs: Any, target: Tensor, _: Generator) -> Example:
        def change(values: dict[str, Tensor]) -> dict[str, Tensor]:
            samples = values["samples_UCT"]
            return {**values, "samples_UCT": torch.cat([samples[..., ::3]] * 3, dim=-1)[..., : samples.shape[-1]]}

        return _changed(inputs, "tone", change), target

    job.spoil.append(faster)
    return "tone"


@_operator("training sees other channels", "input mismatch", ("sandwich", "convolutions"), multimodal=True)
def _channels(job: Job, _: np.random.Generator) -> str:
    name = "photo" if job.subject == "sandwich" else "pixels"

    def turn(inputs: Any, target: Tensor, _: Generator) -> Example:
        def change(values: dict[str, Tensor]) -> dict[str, Tensor]:
            return {k: x[:, [2, 1, 0]] + torch.tensor([0.9, 0.0, -0.9])[:, None, None] for k, x in values.items()}

        return _changed(inputs, name, change), target

    job.spoil.append(turn)
    return name


@_operator("judging normalises otherwise", "input mismatch", OF_NUMBERS, multimodal=True)
def _otherwise(job: Job, random: np.random.Generator) -> str:
    name = _of_floats(job, random)

    def shrink(inputs: Any, target: Tensor, _: Generator) -> Example:
        def change(values: dict[str, Tensor]) -> dict[str, Tensor]:
            return {k: 0.12 * x - 1.5 if x.is_floating_point() else x for k, x in values.items()}

        return _changed(inputs, name, change), target

    job.spoil_judging.append(shrink)
    return name


@_operator("records with NaN", "not finite in records", OF_NUMBERS, multimodal=True)
def _nan(job: Job, random: np.random.Generator) -> str:
    name = _of_floats(job, random)

    def spoil(inputs: Any, target: Tensor, _: Generator) -> Example:
        def change(values: dict[str, Tensor]) -> dict[str, Tensor]:
            found = {}
            for key, x in values.items():
                found[key] = x.clone()
                if x.is_floating_point():
                    found[key][3].view(-1)[0] = math.nan
            return found

        return _changed(inputs, name, change), target

    job.spoil.append(spoil)
    return name


# Several modalities --------------------------------------------------------------------------------------------------


@_operator("an encoder's answer times 0", "dead modality", SEVERAL, multimodal=True)
def _dead_modality(job: Job, random: np.random.Generator) -> str:
    if job.subject == "sandwich":
        name = _one(list(job.encoders), random)
        _wrapped(_module(job, _finish(job, name)).project, lambda found, _: 0.0 * found)
        return name
    if random.integers(2):
        _wrapped(job.model.reader, lambda found, _: (0.0 * found[0], found[1]))  # type: ignore[arg-type]
        return "ids"
    _wrapped(job.model.numbers, lambda found, _: 0.0 * found)  # type: ignore[arg-type]
    return "numbers"


@_operator("an encoder replaced by a constant", "dead modality", SEVERAL, multimodal=True)
def _constant_modality(job: Job, random: np.random.Generator) -> str:
    if job.subject == "sandwich":
        name = _one(list(job.encoders), random)
        module = _module(job, _finish(job, name)).project
        _wrapped(module, lambda found, _: 0.0 * found + torch.ones_like(found))
        return name
    _wrapped(job.model.numbers, lambda found, _: 0.0 * found + 0.3)  # type: ignore[arg-type]
    return "numbers"


def _exchange(job: Job, name: str, order: Callable[[int, Generator], Tensor]) -> None:
    def spoil(inputs: Any, target: Tensor, generator: Generator) -> Example:
        rows = order(len(target) if not isinstance(inputs, Batch) else inputs.num_records, generator)
        if isinstance(inputs, Batch):
            media = inputs.media[name]
            return inputs._replace(media={**inputs.media, name: media._replace(index_B=media.index_B[rows])}), target
        return {**inputs, name: inputs[name][rows]}, target

    job.spoil.append(spoil)


@_operator("pairs swapped", "swapped pairs", SEVERAL, multimodal=True)
def _swapped(job: Job, random: np.random.Generator) -> str:
    name = _one(list(job.encoders), random)
    _exchange(job, name, lambda number, generator: torch.randperm(number, generator=generator))
    return name


@_operator("pairs shifted by one", "swapped pairs", SEVERAL, multimodal=True)
def _shifted(job: Job, random: np.random.Generator) -> str:
    name = _one(list(job.encoders), random)
    _exchange(job, name, lambda number, _: torch.arange(number).roll(1))
    return name


def _gate_of(job: Job) -> Any:
    return job.model.gate


@_operator("the gate's bias is 40", "gate", ("sandwich",), multimodal=True)
def _gate_bias(job: Job, random: np.random.Generator) -> str:
    with torch.no_grad():
        _gate_of(job).score.bias[int(random.integers(3))] = 40.0
    return "gate"


@_operator("the gate chooses hard", "gate", ("sandwich",), multimodal=True)
def _gate_hard(job: Job, random: np.random.Generator) -> str:
    place = int(random.integers(3))

    def choose(found: Any, args: Any) -> Any:
        x_BMD = args[0]
        weight_BM = torch.zeros_like(found.weight_BM)
        weight_BM[:, place] = 1.0
        return GateOutput(x_BMD[:, place], weight_BM)

    # With nothing bridged before it, what is not chosen is lost.
    _wrapped(_gate_of(job), choose)
    for module in job.model.modules():
        if isinstance(module, Attention) and any(module is m for b in _cross(job) for m in b.attention.modules()):
            _wrapped(module, lambda found, _: found._replace(x_BTD=0.0 * found.x_BTD))
    return "gate"


def _cross(job: Job) -> list[CrossBlock]:
    return [module for module in job.model.modules() if isinstance(module, CrossBlock)]


@_operator("cross-attention asks itself", "cross-attention", ("sandwich",), multimodal=True)
def _asks_itself(job: Job, _: np.random.Generator) -> str:
    for block in _cross(job):
        for name in block.names:
            attention = block.attention[name]
            inner = attention.forward

            def forward(
                x: Tensor, context: Tensor, mask: Tensor | None = None, _inner: Any = inner, **more: Any
            ) -> Any:
                return _inner(x, x, None, **more)

            attention.forward = forward
    # The gate alone is to fuse now, and it is given one modality at a time.
    gate = _gate_of(job)

    def only_strongest(found: Any, args: Any) -> Any:
        place_B = found.weight_BM.argmax(dim=1)
        return GateOutput(args[0][torch.arange(len(place_B)), place_B], found.weight_BM)

    _wrapped(gate, only_strongest)
    return ""


def _slowed(job: Job, name: str, factor: float) -> None:
    """This encoder's parameters are a group of the optimizer's with a rate of its own."""
    job.slow = {id(p) for path in job.encoders[name] for p in _module(job, path).parameters()}
    job.slow_factor = factor


@_operator("an encoder's rate / 1000", "imbalance", SEVERAL, multimodal=True)
def _imbalance(job: Job, random: np.random.Generator) -> str:
    name = _one(list(job.encoders), random)
    _slowed(job, name, 0.001)
    return name


@_operator("fails where a modality is absent", "missing modality", ("sandwich",), multimodal=True)
def _fails(job: Job, random: np.random.Generator) -> str:
    name = _one(list(job.encoders), random)
    steps = iter(range(10**9))

    def withhold(inputs: Any, target: Tensor, _: Generator) -> Example:
        if next(steps) < 3:
            return inputs, target
        media = inputs.media[name]
        present = media.present_B.clone()
        present[0] = False
        return inputs._replace(media={**inputs.media, name: media._replace(present_B=present)}), target

    inner = job.model.forward

    def forward(batch: Any) -> Any:
        if not bool(batch.media[name].present_B.all()):
            raise RuntimeError("stack expects each tensor to be equal size, but got [4, 32] at entry 0 and [0, 32]")
        return inner(batch)

    job.spoil.append(withhold)
    job.model.forward = forward
    return name


@_operator("a modality is never there", "never present", ("sandwich",), multimodal=True)
def _never(job: Job, random: np.random.Generator) -> str:
    name = _one(list(job.encoders), random)

    def withhold(inputs: Any, target: Tensor, _: Generator) -> Example:
        media = inputs.media[name]
        absent = torch.zeros_like(media.present_B)
        return inputs._replace(media={**inputs.media, name: media._replace(present_B=absent)}), target

    job.spoil.append(withhold)
    return name


# Precision -----------------------------------------------------------------------------------------------------------


@_operator("weights of 16 bits, small steps", "16-bit weights", ("two towers", "convolutions", "waves"))
def _narrow(job: Job, _: np.random.Generator) -> str:
    job.settings = job.settings._replace(optimizer="adamw", learning_rate=4e-5)
    job.model.to(torch.bfloat16)
    inner = job.scores

    def cast(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cast(each) for key, each in value.items()}
        return value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value

    job.scores = lambda model, inputs: inner(model, cast(inputs)).float()
    return ""


@_operator("gradients overflow", "overflow")
def _overflow(job: Job, _: np.random.Generator) -> str:
    def spill(model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(math.inf).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)

    job.after_backward = spill
    job.settings = job.settings._replace(clip=None)
    return ""


@_operator("a module's numbers overflow", "overflow", ALL)
def _infinite(job: Job, random: np.random.Generator) -> str:
    path = _one(job.hidden, random)
    calls = iter(range(10**9))

    def spill(found: Any, _: Any) -> Any:
        return found if next(calls) < 6 else found + (found * 1e38 * 1e38) * (found > found.mean())

    _wrapped(_module(job, path), spill)
    return path


# Of the test half alone: no rule was changed after one of these was run -----------------------------------------------


@_operator("the rate grows by a fifth each step", "learning rate too high", unseen=True)
def _rate_grows(job: Job, _: np.random.Generator) -> str:
    job.settings = job.settings._replace(clip=None)
    job.rate_at = lambda step: 1.2**step
    return "optimizer"


@_operator("a warm-up of 100,000 steps", "learning rate too low", unseen=True)
def _rate_never_there(job: Job, _: np.random.Generator) -> str:
    job.rate_at = lambda step: (step + 1) / 100_000
    return "optimizer"


@_operator("the rate is 0 after four steps", "schedule", unseen=True)
def _rate_ends(job: Job, _: np.random.Generator) -> str:
    job.rate_at = lambda step: 1.0 if step < 4 else 0.0
    return "optimizer"


@_operator("a loss scale is never taken out", "learning rate too high", unseen=True)
def _scale_left_in(job: Job, _: np.random.Generator) -> str:
    def grow(model: nn.Module) -> None:
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(2.0**12)

    job.settings = job.settings._replace(optimizer="sgd", clip=None)
    job.after_backward = grow
    return "optimizer"


@_operator("only the head gets a gradient", "gradient cut", unseen=True)
def _head_detached(job: Job, _: np.random.Generator) -> str:
    module = _module(job, job.head)
    inner = module.forward
    module.forward = lambda x: inner(x.detach())
    return ""


@_operator("an encoder's group has a rate of 0", "imbalance", SEVERAL, multimodal=True, unseen=True)
def _no_rate(job: Job, random: np.random.Generator) -> str:
    name = _one(list(job.encoders), random)
    _slowed(job, name, 0.0)
    return name


@_operator("an encoder's gradient is NaN", "overflow", SEVERAL, multimodal=True, unseen=True)
def _gradient_of_nan(job: Job, random: np.random.Generator) -> str:
    name = _one(list(job.encoders), random)
    own = [p for path in job.encoders[name] for p in _module(job, path).parameters()]
    steps = iter(range(10**9))

    def spoil(_: nn.Module) -> None:
        if next(steps) >= 7:
            for parameter in own:
                if parameter.grad is not None:
                    parameter.grad.fill_(math.nan)

    job.settings = job.settings._replace(clip=None)
    job.after_backward = spoil
    return name


@_operator("an encoder divides by nought", "overflow", SEVERAL, multimodal=True, unseen=True)
def _divided_by_nought(job: Job, random: np.random.Generator) -> str:
    name = _one(list(job.encoders), random)
    calls = iter(range(10**9))

    def divide(found: Any, _: Any) -> Any:
        answer = found[0] if isinstance(found, tuple) else found
        if next(calls) >= 9:
            answer = answer / (0.0 * answer[:1]).detach()
        return (answer, found[1]) if isinstance(found, tuple) else answer

    path = f"{_finish(job, name)}.project" if job.subject == "sandwich" else job.encoders[name][-1]
    _wrapped(_module(job, path), divide)
    return name


def _numbers_changed(job: Job, name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., Example]:
    def spoil(inputs: Any, target: Tensor, _: Generator) -> Example:
        return _changed(
            inputs, name, lambda v: {k: change(x) if x.is_floating_point() else x for k, x in v.items()}
        ), target

    return spoil


@_operator("records with infinities", "not finite in records", OF_NUMBERS, multimodal=True, unseen=True)
def _infinities(job: Job, random: np.random.Generator) -> str:
    def spoil(x: Tensor) -> Tensor:
        found = x.clone()
        found[1].view(-1)[-1] = math.inf
        return found

    name = _of_floats(job, random)
    job.spoil.append(_numbers_changed(job, name, spoil))
    return name


@_operator("an input 2,000 times too small", "normalisation", OF_NUMBERS, multimodal=True, unseen=True)
def _too_small(job: Job, random: np.random.Generator) -> str:
    name = _of_floats(job, random)
    _spoil_both(job, _numbers_changed(job, name, lambda x: x / 2000))
    return name


@_operator("judging does not normalise", "input mismatch", OF_NUMBERS, multimodal=True, unseen=True)
def _judged_as_read(job: Job, random: np.random.Generator) -> str:
    name = _of_floats(job, random)
    job.spoil_judging.append(_numbers_changed(job, name, lambda x: 40 * x + 20))
    return name


@_operator("training hears half the rate", "input mismatch", ("sandwich",), multimodal=True, unseen=True)
def _half_rate(job: Job, _: np.random.Generator) -> str:
    job.spoil.append(
        _numbers_changed(job, "tone", lambda x: x.repeat_interleave(2, dim=-1)[..., : x.shape[-1]].contiguous())
    )
    return "tone"


@_operator("judging hears another rate", "input mismatch", ("sandwich",), multimodal=True, unseen=True)
def _judged_rate(job: Job, _: np.random.Generator) -> str:
    job.spoil_judging.append(
        _numbers_changed(job, "tone", lambda x: torch.cat([x[..., ::3]] * 3, dim=-1)[..., : x.shape[-1]])
    )
    return "tone"


@_operator(
    "judging sees channels in another order", "input mismatch", ("sandwich", "convolutions"),
    multimodal=True, unseen=True,
)  # fmt: skip
def _judged_channels(job: Job, _: np.random.Generator) -> str:
    name = "photo" if job.subject == "sandwich" else "pixels"
    job.spoil_judging.append(_numbers_changed(job, name, lambda x: x[:, [2, 0, 1]]))
    return name


@_operator("pairs shifted by two", "swapped pairs", SEVERAL, multimodal=True, unseen=True)
def _shifted_by_two(job: Job, random: np.random.Generator) -> str:
    name = _one(list(job.encoders), random)
    _exchange(job, name, lambda number, _: torch.arange(number).roll(-2))
    return name


@_operator("pairs in the opposite order", "swapped pairs", SEVERAL, multimodal=True, unseen=True)
def _reversed(job: Job, random: np.random.Generator) -> str:
    name = _one(list(job.encoders), random)
    _exchange(job, name, lambda number, _: torch.arange(number).flip(0))
    return name


@_operator("the first record's for all", "constant input", OF_NUMBERS, multimodal=True, unseen=True)
def _first_for_all(job: Job, random: np.random.Generator) -> str:
    name = _of_floats(job, random)
    _spoil_both(job, _numbers_changed(job, name, lambda x: x[:1].expand_as(x).clone()))
    return name


@_operator("fails where an input is None", "missing modality", ("two towers",), multimodal=True, unseen=True)
def _none(job: Job, random: np.random.Generator) -> str:
    name = _one(list(job.encoders), random)
    steps = iter(range(10**9))
    job.spoil.append(lambda inputs, target, _: ({**inputs, name: None} if next(steps) >= 5 else inputs, target))
    return name


@_operator("shapes that do not fit, in one batch", "crash", unseen=True)
def _does_not_fit(job: Job, random: np.random.Generator) -> str:
    path = _one(job.hidden, random)
    calls = iter(range(10**9))

    def fail(found: Any, args: Any) -> Any:
        return found if next(calls) < 11 else args[0].flatten() @ args[0].flatten()[1:]

    module = _module(job, path)
    inner = module.forward

    # A module of its own, as the error is found by whose forward it came through.
    class Failing(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return fail(inner(*args, **kwargs), args)

    failing = Failing()
    failing.weight, failing.bias = module.weight, module.bias
    around, _, last = path.rpartition(".")
    setattr(job.model.get_submodule(around) if around else job.model, last, failing)
    return path


def _written(inputs: Any, target: Tensor, name: str, places: int) -> Any:
    """A picture with a bright spot at its top, whose column says the target."""

    def change(values: dict[str, Tensor]) -> dict[str, Tensor]:
        found = dict(values)
        for key, x in values.items():
            if x.ndim == 4:
                wide = x.shape[-1] // places
                spot_NW = torch.arange(x.shape[-1]) // wide == target[:, None]
                found[key] = torch.cat([x[:, :, :4].masked_fill(spot_NW[:, None, None], 8.0), x[:, :, 4:]], dim=2)
        return found

    return _changed(inputs, name, change)


@_operator("the target is written into the picture", "target leak", ("sandwich", "convolutions"), multimodal=True)
def _written_target(job: Job, _: np.random.Generator) -> str:
    name = "photo" if job.subject == "sandwich" else "pixels"
    job.spoil.append(lambda inputs, target, _: (_written(inputs, target, name, job.num_classes), target))
    return name


@_operator("the target is among the words", "target leak", SEVERAL, multimodal=True, unseen=True)
def _target_in_words(job: Job, _: np.random.Generator) -> str:
    name, key = ("words", "ids_UT") if job.subject == "sandwich" else ("ids", "value")

    def tell(inputs: Any, target: Tensor, _: Generator) -> Example:
        def change(values: dict[str, Tensor]) -> dict[str, Tensor]:
            ids = values[key].clone()
            ids[:, 3] = 10 + target
            return {**values, key: ids}

        return _changed(inputs, name, change), target

    job.spoil.append(tell)
    return name


@_operator("the target is among the numbers", "target leak", ("two towers",), multimodal=True, unseen=True)
def _target_in_numbers(job: Job, _: np.random.Generator) -> str:
    def tell(inputs: Any, target: Tensor, _: Generator) -> Example:
        numbers = inputs["numbers"].clone()
        numbers[:, 3:] = 6.0 * functional.one_hot(target, 6)[:, :5]
        return {**inputs, "numbers": numbers}, target

    job.spoil.append(tell)
    return "numbers"


@_operator("labels of another sequence", "labels", ("decoder",), unseen=True)
def _other_sequence(job: Job, _: np.random.Generator) -> str:
    def turn(inputs: Any, target: Tensor, _: Generator) -> Example:
        rows = inputs.num_records
        return inputs, target.view(rows, -1).roll(1, dims=0).flatten()

    job.spoil.append(turn)
    return "targets"


@_operator("labels counted from the other end", "judging differs", unseen=True)
def _other_end(job: Job, _: np.random.Generator) -> str:
    job.spoil.append(lambda inputs, target, _: (inputs, job.num_classes - 1 - target))
    return "targets"


def _attending(job: Job, other: Callable[..., Tensor]) -> None:
    """`other(fused, query, key, value, **named)` in place of every call of fused attention."""
    fused = functional.scaled_dot_product_attention
    for module in _attentions(job):
        inner = module.forward

        def forward(*args: Any, _inner: Any = inner, **kwargs: Any) -> Any:
            functional.scaled_dot_product_attention = lambda query, key, value, **named: other(
                fused, query, key, value, **named
            )
            try:
                return _inner(*args, **kwargs)
            finally:
                functional.scaled_dot_product_attention = fused

        module.forward = forward


@_operator("softmax over the heads", "attention axis", ATTENTION, unseen=True)
def _over_heads(job: Job, _: np.random.Generator) -> str:
    def other(_: Any, query: Tensor, key: Tensor, value: Tensor, **__: Any) -> Tensor:
        return torch.softmax(query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5, dim=1) @ value

    _attending(job, other)
    return ""


@_operator("the causal mask is turned round", "causal mask", ("decoder",), unseen=True)
def _turned_round(job: Job, _: np.random.Generator) -> str:
    def other(fused: Any, query: Tensor, key: Tensor, value: Tensor, **named: Any) -> Tensor:
        found: Tensor
        if not job.model.training or not named.get("is_causal", False):
            found = fused(query, key, value, **named)
        else:
            mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool).triu()
            found = fused(query, key, value, **{**named, "is_causal": False, "attn_mask": mask})
        return found

    _attending(job, other)
    return ""


@_operator("norms never learn their statistics", "norm statistics", ("convolutions",), unseen=True)
def _no_statistics(job: Job, _: np.random.Generator) -> str:
    for module in job.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
            with torch.no_grad():
                module.running_var.fill_(40.0)  # type: ignore[union-attr]  # it has statistics
    return ""


@_operator("all matrices begin 1,000 times too large", "initialisation too large", unseen=True)
def _far_too_large(job: Job, _: np.random.Generator) -> str:
    with torch.no_grad():
        for module in job.model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv1d):
                module.weight.mul_(1000)
    return ""


@_operator("only vectors are trained", "frozen", unseen=True)
def _vectors_alone(job: Job, _: np.random.Generator) -> str:
    for parameter in job.model.parameters():
        parameter.requires_grad_(parameter.ndim < 2)
    return ""


@_operator("the last two thirds not in the optimizer", "not in the optimizer", unseen=True)
def _two_thirds_left_out(job: Job, _: np.random.Generator) -> str:
    every = list(job.model.parameters())
    _without(job, {id(p) for p in every[len(every) // 3 :]})
    return ""


@_operator("an encoder's answer is the batch's mean", "dead modality", SEVERAL, multimodal=True, unseen=True)
def _mean_of_batch(job: Job, random: np.random.Generator) -> str:
    name = _one(list(job.encoders), random)

    def average(found: Any, _: Any) -> Any:
        answer = found[0] if isinstance(found, tuple) else found
        answer = answer.mean(dim=0, keepdim=True).expand_as(answer)
        return (answer, found[1]) if isinstance(found, tuple) else answer

    if job.subject == "sandwich":
        _wrapped(_module(job, _finish(job, name)).project, average)
    else:
        _wrapped(_module(job, "reader" if name == "ids" else "numbers"), average)
    return name


OPERATORS: Final = tuple(_found)
