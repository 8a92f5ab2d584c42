"""What rounding a layer does to the answers, before anything is rounded for good.

Here        `observe` (inputs of layers on calibration records); scores of every choice of every layer, by one pass for
            all (`by_fisher`, `by_trace`) or one for each (`by_output`); `rows_of`, some of a batch's records.
Elsewhere   choosing by them (quantise.py).
Promise     a score is an estimate of the same thing whatever the method: the mean KL divergence per record, in nats,
            of the answer from that of the unrounded model. Labels are not looked at.

Shapes: N rows, D inputs, B records, C outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dougong.compress.bits import Range, Rounded, fit_range
from dougong.compress.plan import Choice
from dougong.core.signature import Task
from dougong.model.sandwich import Sandwich
from dougong.nn.batch import Batch, only_media

Method = Literal["fisher", "trace", "output"]
ROWS_KEPT: Final = 1024
DRAWS: Final = 4
Scores = dict[str, dict[Choice, float]]


def rows_of(batch: Batch, row_B: Tensor) -> Batch:
    """Some of a batch's records, with the media of theirs alone; without targets."""
    media = {
        name: only_media(one._replace(index_B=one.index_B[row_B], present_B=one.present_B[row_B], there_B=None))
        for name, one in batch.media.items()
    }
    return Batch(media, None)


class Seen(NamedTuple):
    """A linear layer's inputs on calibration records."""

    range: Range
    """In which they are rounded to 8 bits."""

    hessian_DD: Tensor
    """The sum of x x^T, by which GPTQ knows how inputs go together."""


class Candidate(NamedTuple):
    """A layer's weights at one choice; None where they stay."""

    weight: Tensor | None
    range: Range | None
    """Of its input, where that is rounded too."""

    def output(self, module: nn.Module, given: Tensor) -> Tensor:
        """What the layer would say."""
        if isinstance(module, nn.Embedding):
            return functional.embedding(given, module.weight if self.weight is None else self.weight)
        assert isinstance(module, nn.Linear)
        given = given if self.range is None else self.range.rounded(given)
        return functional.linear(given, module.weight if self.weight is None else self.weight, module.bias)


Candidates = Mapping[str, Mapping[Choice, Candidate]]


@contextlib.contextmanager
def _hooked(network: nn.Module, names: Sequence[str], hook: Callable[[str], Any]) -> Iterator[None]:
    held = [network.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for each in held:
            each.remove()


def observe(network: Sandwich, names: Sequence[str], batches: Sequence[Batch]) -> dict[str, Seen]:
    """The inputs of these linear layers on all batches; a layer that no record reached is left out."""
    hessians: dict[str, Tensor] = {}
    rows: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Any:
        def note(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
            x_ND = given[0].detach().flatten(0, -2).float()
            hessians[name] = hessians.get(name, 0) + x_ND.T @ x_ND
            few = max(1, ROWS_KEPT // len(batches))
            rows.setdefault(name, []).append(x_ND[:: max(1, len(x_ND) // few)][:few].clone())

        return note

    with torch.no_grad(), _hooked(network, names, hook):
        for batch in batches:
            network(batch)
    return {name: Seen(fit_range(torch.cat(rows[name])), hessians[name]) for name in names if name in hessians}


def by_fisher(network: Sandwich, candidates: Candidates, batches: Sequence[Batch], task: Task, seed: int) -> Scores:
    """Half the Fisher quadratic form of what each choice does to its layer's output, the others left as they are.

    KL(p(z) || p(z + dz)) is about half of dz' F dz, and F is the mean of g g' over labels drawn from the model itself
    (Martens 2014, arXiv:1412.1193). So for gradients g of drawn labels at a layer's output, the score is half the mean
    of (g . dy)^2, by medium or record. Unlike HAWQ's trace (Dong et al. 2019, arXiv:1905.03696) it knows the direction
    of the error, and counts that of activations alike.
    """
    sums: dict[str, dict[Choice, Tensor]] = {
        name: {choice: torch.zeros(()) for choice in of_layer} for name, of_layer in candidates.items()
    }
    random = torch.Generator().manual_seed(seed)
    num_records = 0
    for batch in batches:
        met, output_BC = _met(network, list(candidates), batch)
        moved = {
            name: {
                choice: (candidate.output(network.get_submodule(name), given) - made).detach()
                for choice, candidate in candidates[name].items()
            }
            for name, (given, made) in met.items()
        }
        for draw in range(DRAWS):
            gradients = torch.autograd.grad(
                output_BC,
                [made for _, made in met.values()],
                grad_outputs=_drawn(output_BC.detach(), task, random),
                retain_graph=draw < DRAWS - 1,
                allow_unused=True,
            )
            for name, gradient in zip(met, gradients, strict=True):
                if gradient is not None:
                    for choice, change in moved[name].items():
                        sums[name][choice] += (gradient * change).flatten(1).sum(dim=1).square().sum() / 2
        num_records += batch.num_records
    return {
        name: {choice: float(total) / (DRAWS * max(1, num_records)) for choice, total in of_layer.items()}
        for name, of_layer in sums.items()
    }


def by_trace(network: Sandwich, candidates: Candidates, batches: Sequence[Batch], task: Task, seed: int) -> Scores:
    """The mean curvature of a layer's weights, times the square of what each choice does to them; of inputs likewise.

    As HAWQ-V2 has it (Dong et al. 2020, arXiv:1911.03852), but for the curvature: not of the loss of true labels, found
    by Hutchinson's probes through second derivatives, but of the divergence itself, whose Hessian is the Fisher matrix;
    each draw of labels is one probe of its trace. It does not know in which direction an error goes.
    """
    weights, inputs = dict.fromkeys(candidates, 0.0), dict.fromkeys(candidates, 0.0)
    given_sizes = dict.fromkeys(candidates, 0)
    moved: dict[str, dict[Choice, float]] = {
        name: dict.fromkeys(of_layer, 0.0) for name, of_layer in candidates.items()
    }
    random = torch.Generator().manual_seed(seed)
    num_records = 0
    for batch in batches:
        met, output_BC = _met(network, list(candidates), batch)
        for name, (given, _) in met.items():
            given_sizes[name] += given.numel()
            for choice, candidate in candidates[name].items():
                if candidate.range is not None:
                    moved[name][choice] += float((candidate.range.rounded(given) - given).square().sum())
        for draw in range(DRAWS):
            gradients = torch.autograd.grad(
                output_BC,
                [made for _, made in met.values()],
                grad_outputs=_drawn(output_BC.detach(), task, random),
                retain_graph=draw < DRAWS - 1,
                allow_unused=True,
            )
            for (name, (given, _)), gradient in zip(met.items(), gradients, strict=True):
                if gradient is not None:
                    module = network.get_submodule(name)
                    weights[name] += _weight_norms(module, given, gradient)
                    if isinstance(module, nn.Linear):
                        inputs[name] += float((gradient @ module.weight.detach()).square().sum())
        num_records += batch.num_records
    scores: Scores = {}
    for name, of_layer in candidates.items():
        weight: Any = network.get_submodule(name).weight
        scores[name] = {}
        for choice, candidate in of_layer.items():
            changed = 0.0 if candidate.weight is None else float((candidate.weight - weight.detach()).square().sum())
            # Of a sum over records, its mean; the sizes of inputs are summed over records as their traces are.
            of_weights = weights[name] / weight.numel() * changed
            of_inputs = inputs[name] / max(1, given_sizes[name]) * moved[name][choice]
            scores[name][choice] = (of_weights + of_inputs) / (2 * DRAWS * max(1, num_records))
    return scores


def _weight_norms(module: nn.Module, given: Tensor, gradient: Tensor) -> float:
    """The sum over media or records of the squared norm of their gradient by the layer's weights, without making it."""
    gradient_NTO = gradient.flatten(1, -2) if gradient.dim() > 2 else gradient[:, None]
    if isinstance(module, nn.Embedding):
        id_NT = given.flatten(1) if given.dim() > 1 else given[:, None]
        if module.padding_idx is not None:  # whose row never learns
            gradient_NTO = gradient_NTO.masked_fill((id_NT == module.padding_idx)[..., None], 0.0)
        alike_NTT = (id_NT[:, :, None] == id_NT[:, None, :]).to(gradient.dtype)
    else:
        given_NTD = given.flatten(1, -2) if given.dim() > 2 else given[:, None]
        alike_NTT = given_NTD @ given_NTD.mT
    return float(((gradient_NTO @ gradient_NTO.mT) * alike_NTT).sum())


def _met(network: Sandwich, names: Sequence[str], batch: Batch) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """What each layer was given and what it made of it, with gradients, and the answer."""
    met: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def note(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> Tensor:
            made = made if made.requires_grad else made.detach().requires_grad_()  # behind frozen weights
            met[name] = (given[0].detach(), made)
            return made

        return note

    with torch.enable_grad(), _hooked(network, names, hook):
        return met, network(batch).output_BC


def _drawn(output_BC: Tensor, task: Task, random: torch.Generator) -> Tensor:
    """The gradient of -log p of a label that the model itself draws, by its output."""
    if task == "regression":
        return torch.randn(output_BC.shape, generator=random)
    if task == "multi_label":
        chance_BC = output_BC.sigmoid()
        return chance_BC - torch.bernoulli(chance_BC, generator=random)
    chance_BC = output_BC.softmax(dim=-1)
    label_B = torch.multinomial(chance_BC, 1, generator=random)[:, 0]
    return chance_BC - functional.one_hot(label_B, chance_BC.shape[1])


def by_output(network: Sandwich, candidates: Candidates, batches: Sequence[Batch], task: Task) -> Scores:
    """The divergence itself, with one layer at one choice at a time."""
    with torch.no_grad():
        exact = [network(batch).output_BC for batch in batches]
        num_records = sum(len(output_BC) for output_BC in exact)
        scores: Scores = {}
        for name, of_layer in candidates.items():
            scores[name] = {}
            for choice, candidate in of_layer.items():
                with simulated(network, {name: candidate}):
                    found = sum(
                        float(divergence(output_BC, network(batch).output_BC, task).sum())
                        for output_BC, batch in zip(exact, batches, strict=True)
                    )
                scores[name][choice] = found / max(1, num_records)
    return scores


@contextlib.contextmanager
def simulated(network: Sandwich, chosen: Mapping[str, Candidate]) -> Iterator[None]:
    """Inside, these layers answer as if rounded: for scores alone, never for a figure."""

    def hook(name: str) -> Any:
        def replace(module: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> Tensor:
            return chosen[name].output(module, given[0])

        return replace

    with _hooked(network, list(chosen), hook):
        yield


def divergence(exact_BC: Tensor, output_BC: Tensor, task: Task) -> Tensor:
    """KL of each record's answer from the exact one, (B,), in nats; of numbers, half the squared difference."""
    exact_BC, output_BC = exact_BC.double(), output_BC.double()
    if task == "regression":
        return (exact_BC - output_BC).square().sum(dim=1) / 2
    if task == "multi_label":
        pairs = [(functional.logsigmoid(s * exact_BC), functional.logsigmoid(s * output_BC)) for s in (1, -1)]
        return sum((p.exp() * (p - q)).sum(dim=1) for p, q in pairs)  # type: ignore[return-value]  # never empty
    log_BC, other_BC = exact_BC.log_softmax(dim=1), output_BC.log_softmax(dim=1)
    return (log_BC.exp() * (log_BC - other_BC)).sum(dim=1)


def candidate(choice: Choice, rounded: Rounded | None, seen: Seen | None) -> Candidate:
    """A layer at one choice, of its rounded weights and what was seen of its inputs."""
    weight = None if rounded is None else rounded.widened()
    return Candidate(weight, seen.range if seen is not None and choice.endswith("a8") else None)
