"""AdamW for weights of 16 bits, and with state of 8 or 4.

Here        NarrowAdamW.
Elsewhere   what makes weights so (weights.py); what state of few bits is (states.py); the settings
            (engine/optimizer.py), which take torch's own AdamW where all is fp32.
Promise     the arithmetic is that of torch's kernel, in fp32: with masters, a step is that of fp32 weights with the
            same gradients, bit for bit. Its random numbers follow from seed, weight and step: they disturb no others,
            copies on other ranks draw the same, and a resumed run goes on with them. All state is plain tensors by
            name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from dougong.core.seeds import derive_seed
from dougong.engine.precision.states import StateFormat
from dougong.engine.precision.weights import Narrowed, round_randomly

AT_ONCE: Final = 2**20
"""Numbers that are widened for a step at a time: enough that a kernel's start does not matter."""


class NarrowAdamW(Optimizer):
    """Groups as torch's AdamW has them. State of each weight: `step`; `exp_avg` and `exp_avg_sq`, or the codes and
    scales of both; and `master` (fp32), or `compensation` (bf16), of a weight that is bf16."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        narrowed: Narrowed,
        states: StateFormat,
        seed: int = 0,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.how, self._states, self._seed = narrowed.how, states, seed
        self._places: dict[nn.Parameter, int] = {}
        self._generators: dict[torch.device, torch.Generator] = {}
        for place, weight in enumerate(self._weights()):
            self._places[weight] = place
            exact = narrowed.exact.pop(weight, None)
            if exact is not None and self.how == "bf16-masters":
                self.state[weight]["master"] = exact
            elif exact is not None:
                self.state[weight]["compensation"] = (exact - weight.detach()).bfloat16()

    def _weights(self) -> Iterator[nn.Parameter]:
        return (weight for group in self.param_groups for weight in group["params"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step every weight that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for weights in _some([weight for weight in group["params"] if weight.grad is not None]):
                self._step(weights, group)

    def _step(self, weights: Sequence[nn.Parameter], group: dict[str, Any]) -> None:
        states = [self.state[weight] for weight in weights]
        for weight, state in zip(weights, states, strict=True):
            if "step" not in state:
                state["step"] = torch.zeros(())
                self._states.begin(state, "exp_avg", weight)
                self._states.begin(state, "exp_avg_sq", weight)
        wide = [self._wide(weight) for weight in weights]
        read, pairs = self._states.read, list(zip(states, weights, strict=True))
        means = [read(state, "exp_avg", weight, signed=True) for state, weight in pairs]
        squares = [read(state, "exp_avg_sq", weight, signed=False) for state, weight in pairs]
        steps = [state["step"].to(weight.device) for state, weight in pairs]
        adamw(
            wide,
            [each.grad.to(to.dtype) for each, to in zip(weights, wide, strict=True)],  # type: ignore[union-attr]
            means,
            squares,
            [],
            steps,
            fused=weights[0].device.type in ("cpu", "cuda"),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for place, (state, weight) in enumerate(pairs):
            state["step"].copy_(steps[place])
            self._states.write(state, "exp_avg", means[place], signed=True)
            self._states.write(state, "exp_avg_sq", squares[place], signed=False)
            self._narrow(weight, wide[place], state)

    def _wide(self, weight: nn.Parameter) -> Tensor:
        """Its exact value, to be stepped in place."""
        state, value = self.state[weight], weight.detach()
        if "master" in state:
            master: Tensor = state["master"]
            return master
        if weight.dtype != torch.bfloat16:
            return value
        wide = value.float()
        return wide.add_(state["compensation"]) if "compensation" in state else wide

    def _narrow(self, weight: nn.Parameter, wide: Tensor, state: dict[str, Any]) -> None:
        if weight.dtype != torch.bfloat16:
            return  # it was stepped in place
        if self.how == "bf16-stochastic":
            weight.copy_(round_randomly(wide, self._generator(weight, state)))
            return
        weight.copy_(wide)
        if "compensation" in state:
            state["compensation"].copy_(wide - weight)

    def _generator(self, weight: nn.Parameter, state: dict[str, Any]) -> torch.Generator:
        generator = self._generators.setdefault(weight.device, torch.Generator(weight.device))
        step = int(state["step"].item())
        return generator.manual_seed(derive_seed(self._seed, "rounding", self._places[weight], step))

    def exact_weights(self) -> dict[nn.Parameter, Tensor]:
        """Of weights that are bf16, the best that is known of them, in fp32."""
        return {weight: self._wide(weight) for weight in self._weights() if weight.dtype == torch.bfloat16}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """State by the place of its weight. torch's own would cast it to the weight's type."""
        weights = list(self._weights())
        for place, kept in state_dict["state"].items():
            state = self.state[weights[place]]
            for key, value in kept.items():
                state[key] = value.clone() if key == "step" else value.to(weights[place].device, copy=True)


def _some(weights: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Of one type and device each, about so many numbers at once."""
    held: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for weight in weights:
        kind = (weight.dtype, weight.device)
        some = held.setdefault(kind, [])
        some.append(weight)
        if sum(each.numel() for each in some) >= AT_ONCE:
            yield held.pop(kind)
    yield from held.values()
