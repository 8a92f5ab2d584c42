"""What a network does between its modules: calls of attention, activations, dropout and losses.

Here        Heard, what was heard of a forward; Calls, which listens.
Elsewhere   the step in which it listens (step.py).
Promise     every call is carried out as it is, and returns what it would have returned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

FEW_RECORDS: Final = 4
"""Of which attention is looked at."""


@dataclass
class Heard:
    """Of one forward, and of the loss after it. Each figure's meaning stands with FlowMeasured (step.py)."""

    model: nn.Module
    stack: list[str] = field(default_factory=list)
    """Names of the modules that are being called, the outermost first."""

    activations: dict[str, dict[str, float]] = field(default_factory=dict)
    attention: list[dict[str, Any]] = field(default_factory=list)
    loss_terms: list[dict[str, Any]] = field(default_factory=list)
    loss_inputs: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Scores and targets of each loss of classes; what is learnt from first."""

    dropout: dict[str, float] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """The innermost module that is being called."""
        return self.stack[-1] if self.stack else ""

    def holders(self) -> list[str]:
        """The kinds of modules that are being called, the outermost first."""
        return [type(self.model.get_submodule(name)).__name__ for name in self.stack]


class Calls(TorchFunctionMode):
    """Hears calls that say what a network does."""

    def __init__(self, to: Heard) -> None:
        super().__init__()
        self._to = to

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        hear = _HEARD.get(func)
        if hear is None:
            return func(*args, **kwargs)
        if func is functional.multi_head_attention_forward:
            return self._within(func, args, kwargs)
        output = func(*args, **kwargs)
        with torch.no_grad():
            hear(self._to, func, args, kwargs, output)
        return output

    def _within(self, func: Any, args: Any, kwargs: Any) -> Any:
        """torch's own attention layer calls fused attention where a mode no longer hears it."""
        fused = functional.scaled_dot_product_attention

        def heard(*given: Any, **named: Any) -> Any:
            output = fused(*given, **named)
            with torch.no_grad():
                _hear_attention(self._to, fused, given, named, output)
            return output

        functional.scaled_dot_product_attention = heard
        try:
            return func(*args, **kwargs)
        finally:
            functional.scaled_dot_product_attention = fused


def _hear_attention(to: Heard, _: Any, args: Any, kwargs: Any, __: Any) -> None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    query, key = given["query"][:FEW_RECORDS].float(), given["key"][:FEW_RECORDS].float()
    if query.ndim != 4 or not query.numel() or not key.numel():
        return
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    usual = query.shape[-1] ** -0.5
    scale = usual if given.get("scale") is None else float(given["scale"])
    score = query @ key.transpose(-1, -2) * scale
    score_spread = float(score.std())
    mask = given.get("attn_mask")
    allowed: Tensor | None = None
    if isinstance(mask, Tensor):
        mask = mask[:FEW_RECORDS] if mask.ndim == 4 and mask.shape[0] > 1 else mask
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        score = score.masked_fill(~allowed, -1e30) if mask.dtype == torch.bool else score + mask
    if given.get("is_causal"):
        allowed = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).tril()
        score = score.masked_fill(~allowed, -1e30)
    weight = score.softmax(dim=-1)
    reach = weight.shape[-1] if allowed is None else allowed.expand_as(weight).sum(dim=-1).clamp(min=1)
    most = torch.as_tensor(reach, dtype=torch.float32).log()
    entropy = -(weight * weight.clamp(min=1e-30).log()).sum(dim=-1)
    told: dict[str, Any] = {
        "place": to.place,
        "holders": to.holders(),
        "scale_ratio": scale / usual,
        "entropy": float((entropy / most.clamp(min=0.1)).clamp(max=1).mean()),
        "score_spread": score_spread,
        "has_mask": allowed is not None,
        "forbidden": 0.0 if allowed is None else 1 - float(allowed.float().mean()),
        "num_keys": weight.shape[-1],
        "num_queries": weight.shape[-2],
    }
    if query.shape[-2] == key.shape[-2] and query.shape[-2] > 1:
        told["ahead"] = float(weight.triu(1).sum(dim=-1).mean())
    to.attention.append(told)


def _hear_activation(to: Heard, func: Any, _: Any, __: Any, output: Any) -> None:
    if not isinstance(output, Tensor) or output.ndim < 2 or not output.numel():
        return
    name = getattr(func, "__name__", "activation")
    flat = output.detach().flatten(0, -2) if output.ndim != 4 else output.detach().transpose(1, 3).flatten(0, 2)
    if name in ("sigmoid", "tanh"):
        low = 0.0 if name == "sigmoid" else -1.0
        edge = ((flat - low).abs() < 0.01 * (1 - low)) | ((1 - flat).abs() < 0.01 * (1 - low))
        told = {"saturated": float(edge.float().mean())}
    else:
        told = {
            "dead": float((flat.abs() < 1e-6).all(dim=0).float().mean()),
            "zero": float((flat.abs() < 1e-6).float().mean()),
        }
    told["spread"] = float(flat.float().std())
    to.activations[f"{to.place}:{name}"] = told


def _hear_softmax(to: Heard, _: Any, args: Any, kwargs: Any, output: Any) -> None:
    if not isinstance(output, Tensor) or output.ndim != 4:
        return
    dim = kwargs.get("dim", args[1] if len(args) > 1 and isinstance(args[1], int) else -1)
    to.attention.append({"place": to.place, "softmax_dim": int(dim) % 4 - 4, "num_keys": output.shape[-1]})


def _hear_loss(to: Heard, func: Any, args: Any, kwargs: Any, output: Any) -> None:
    if len(args) < 2 or not isinstance(args[0], Tensor) or not isinstance(args[1], Tensor):
        return
    given, target = args[0].detach(), args[1].detach()
    told: dict[str, Any] = {"function": getattr(func, "__name__", "loss"), "inside": bool(to.stack)}
    if given.ndim >= 2 and given.shape[-1] > 1:
        rows = given.float()
        told["rows_sum_to_one"] = bool(((rows.sum(dim=1) - 1).abs() < 1e-3).all()) and bool((rows >= 0).all())
        told["spread"] = float(rows.std())
    told["label_smoothing"] = float(kwargs.get("label_smoothing", 0.0))
    told["ignored"] = 0.0
    if not target.is_floating_point() and target.numel():
        told["ignored"] = float((target == kwargs.get("ignore_index", -100)).float().mean())
    weight = kwargs.get("weight", args[2] if len(args) > 2 else None)
    if isinstance(weight, Tensor):
        told["classes_without_weight"] = float((weight == 0).float().mean())
    value = output.detach().float().mean() if isinstance(output, Tensor) else torch.zeros(())
    told["value"] = float(value)
    to.loss_terms.append(told)
    if told["function"] in ("cross_entropy", "nll_loss"):
        # What is computed outside of all modules is what is learnt from; inside there may be another one besides.
        to.loss_inputs.insert(len(to.loss_inputs) if to.stack else 0, (given, target))


def _hear_dropout(to: Heard, func: Any, args: Any, kwargs: Any, _: Any) -> None:
    share = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    to.dropout[to.place] = max(float(share) if training else 0.0, to.dropout.get(to.place, 0.0))


_HEARD: Final[dict[Any, Callable[..., None]]] = {
    functional.scaled_dot_product_attention: _hear_attention,
    **dict.fromkeys(
        (
            functional.relu, torch.relu, Tensor.relu, functional.gelu, functional.silu,
            functional.sigmoid, torch.sigmoid, Tensor.sigmoid, functional.tanh, torch.tanh, Tensor.tanh,
        ),
        _hear_activation,
    ),
    **dict.fromkeys((functional.softmax, torch.softmax, Tensor.softmax), _hear_softmax),
    **dict.fromkeys((functional.cross_entropy, functional.nll_loss, functional.mse_loss), _hear_loss),
    functional.dropout: _hear_dropout,
    functional.multi_head_attention_forward: _hear_dropout,  # never called: its own calls are heard
}  # fmt: skip
