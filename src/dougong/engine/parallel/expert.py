"""Routed experts spread over ranks, to which tokens travel.

Here        `apply_expert`, `check_expert`.
Elsewhere   choosing each token's experts (nn/experts.py); experts that are cut themselves (tensor.py).
Promise     a step gives every rank the gradients of its experts that one process with all records would have, within
            rounding. A rank without tokens, or whose experts nobody has chosen, takes part like any other.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dougong.core.errors import ConfigError
from dougong.engine.parallel.tensor import Cut, Cuts
from dougong.nn.experts import Experts


def check_expert(model: nn.Module, count: int) -> None:
    """
    Raises:
        ConfigError: there are no experts, or they cannot be shared out by so many ranks.
    """
    found = [module for module in model.modules() if isinstance(module, Experts)]
    if count > 1 and not found:
        raise ConfigError(f"plan expert={count} cannot take effect: this model has no routed experts. Use expert: 1.")
    for module in found:
        if module.num_experts % count:
            fits = [n for n in range(1, module.num_experts + 1) if module.num_experts % n == 0]
            raise ConfigError(
                f"plan expert={count} cannot share out {module.num_experts} experts: every rank needs as many. "
                f"Use expert in {fits}."
            )


def apply_expert(model: nn.Module, group: dist.ProcessGroup, cuts: Cuts) -> set[str]:
    """Keep this rank's experts, in place, note it in `cuts`, and return the names of their parameters.

    The model may be a pipeline's stage that has none: the whole one is what `check_expert` is asked of.
    """
    count, place = dist.get_world_size(group), dist.get_rank(group)
    names: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(module, Experts):
            continue
        for own, parameter in list(module.named_parameters(recurse=False)):
            part = parameter.detach().chunk(count)[place].clone()
            setattr(module, own, nn.Parameter(part, requires_grad=parameter.requires_grad))
            cuts.add(f"{name}.{own}", Cut(0, place, count))
            names.add(f"{name}.{own}")
        module.forward = functools.partial(_elsewhere, module, group)  # type: ignore[method-assign]
    return names


def _elsewhere(experts: Experts, group: dist.ProcessGroup, x_MD: Tensor, counts_E: Tensor) -> Tensor:
    """Rows to the ranks of their experts, through them, and back."""
    world = dist.get_world_size(group)
    arriving_E = torch.empty_like(counts_E)
    dist.all_to_all_single(arriving_E, counts_E, group=group)
    sent = counts_E.view(world, -1).sum(dim=1).tolist()
    arriving_RE = arriving_E.view(world, -1)  # by the rank they come from, then by expert here
    received = arriving_RE.sum(dim=1).tolist()
    y_MD = _Travelled.apply(x_MD, group, sent, received)  # type: ignore[no-untyped-call]

    # They arrive sorted by rank, and an expert wants all of its own in a row.
    expert_M = torch.arange(arriving_RE.shape[1], device=x_MD.device).repeat(world)
    order_M = expert_M.repeat_interleave(arriving_E).argsort(stable=True)
    y_MD = Experts.forward(experts, y_MD.index_select(0, order_M), arriving_RE.sum(dim=0))
    y_MD = torch.zeros_like(y_MD).index_copy(0, order_M, y_MD)
    found: Tensor = _Travelled.apply(y_MD, group, received, sent)  # type: ignore[no-untyped-call]
    return found


class _Travelled(torch.autograd.Function):
    """So many rows to each rank, and so many from each; the gradient travels back."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, group: dist.ProcessGroup, sent: list[int], received: list[int]) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return _travel(x_MD, group, sent, received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _travel(gradient, ctx.group, ctx.received, ctx.sent), None, None, None


def _travel(x_MD: Tensor, group: dist.ProcessGroup, sent: list[int], received: list[int]) -> Tensor:
    arrived = x_MD.new_empty(sum(received), *x_MD.shape[1:])
    dist.all_to_all_single(arrived, x_MD.contiguous(), received, sent, group=group)
    return arrived
