"""Weights in 16 bits, and what keeps small steps from being rounded away.

Here        Weights, `apply_weights`, Narrowed; `widen_weights`; `round_randomly`; `add_gradient`.
Elsewhere   stepping such weights (adamw.py); adding their gradients up over ranks (engine/parallel/collectives.py).
Promise     trained matrices alone become bf16: what has fewer than two dimensions (scales of norms, biases,
            temperatures), tables that are looked up, what is frozen, and what a module names in `exact_weights`, stay
            as they are. Names stay, and what is tied stays tied. Gradients of several micro-batches are added up in
            fp32.

bf16 has 8 bits, so a step of less than a 256th of its weight would be lost. bf16-stochastic: rounded up or down by
chance, so that what is lost is made up for in the mean (Gupta et al. 2015, arXiv:1502.02551). bf16-kahan: what rounding
has taken away is kept beside, in bf16, and added to the next step (Zamirai et al. 2020, arXiv:2010.06192).
bf16-masters: fp32 weights are stepped, and bf16 ones are their copies (Micikevicius et al. 2018, arXiv:1710.03740).

A table's gradient is a sum over all places where a word stands, which on a CPU torch adds up in the table's own format.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

Weights = Literal["fp32", "bf16-stochastic", "bf16-kahan", "bf16-masters"]
"""Of matrices; and how bf16 ones are stepped."""


class Narrowed(NamedTuple):
    """What has become of a model's weights."""

    how: Weights
    exact: dict[nn.Parameter, Tensor]
    """Those of fp32, as they were, by what is bf16 now. Who steps them takes them away."""


def apply_weights(model: nn.Module, how: Weights, *, accumulation: int = 1) -> Narrowed:
    """Make the model's trained matrices bf16, in place. Their gradients are too, unless several micro-batches are added
    up. Gradients that are there are let go."""
    exact: dict[nn.Parameter, Tensor] = {}
    if how == "fp32":
        return Narrowed(how, exact)
    for parameter in _narrowable(model):
        before = parameter.detach()
        parameter.grad = None
        parameter.data = before.bfloat16()
        if accumulation > 1:
            parameter.grad_dtype = torch.float32
        if how != "bf16-stochastic":
            exact[parameter] = before
    return Narrowed(how, exact)


def _narrowable(model: nn.Module) -> list[nn.Parameter]:
    stay: set[nn.Parameter] = set()
    for module in model.modules():
        names = dict(module.named_parameters(recurse=False))
        kept: Any = getattr(module, "exact_weights", ())
        stay |= set(names.values()) if isinstance(module, nn.Embedding) else {names[name] for name in kept}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in stay]
    return [parameter for parameter in trained if parameter.ndim >= 2 and parameter.dtype == torch.float32]


@torch.no_grad()
def widen_weights(exact: dict[nn.Parameter, Tensor]) -> None:
    """Make them fp32 again, with these numbers, in place."""
    for parameter, value in exact.items():
        parameter.grad = None
        parameter.data = value
        parameter.grad_dtype = value.dtype


def round_randomly(x: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 to bf16: up or down, with a chance that makes the mean come out right."""
    chance = torch.randint(0, 1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    # What is below bf16's last bit carries into it as often as it is large.
    bits = chance.add_(x.view(torch.int32)).bitwise_and_(-(1 << 16))
    return bits.view(torch.float32).bfloat16()


def add_gradient(parameter: nn.Parameter, gradient: Tensor) -> None:
    """As `backward` would: to what earlier micro-batches have left."""
    gradient = gradient.to(gradient_type(parameter))
    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def gradient_type(parameter: Tensor) -> torch.dtype:
    """In which its gradient is added up."""
    return parameter.grad_dtype or parameter.dtype
