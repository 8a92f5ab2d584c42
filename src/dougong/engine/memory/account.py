"""The bytes that a training step holds, counted and not guessed.

Here        Account, StepBytes.
Elsewhere   the same of a rank that does not exist (rehearse.py); formulas for a thousand layouts (predict.py).
Promise     every piece of memory that a tensor operation makes is counted from then until nothing refers to it, once
            however many views look at it; also what is made larger or let go in place, as FSDP does.

Weights, gradients and optimizer are what this rank holds of them. Activations are all else that is there because of the
step: what autograd keeps for the backward, what lies between two operations, micro-batches under way in a pipeline,
what is being sent and received, weights gathered from other ranks and their gradients before they are spread. They are
told at the moment when there is most of them. The loader's batches are not counted, nor what a kernel needs inside.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class StepBytes(NamedTuple):
    """Of one rank, in one step."""

    weights: int
    gradients: int
    """At the end of the backward."""

    optimizer: int
    activations: int
    """At their most."""

    peak: int
    """Most of everything at one time; less than the sum where not all are at their most together."""


class Account(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch ships it without types
    """Counts while a step is carried out inside it: not the first, in which the optimizer makes what it keeps.

    Gradients of the step before are let go.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parameters, self._optimizer = list(model.parameters()), optimizer
        self._made: dict[int, int] = {}
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._now = self._peak = self._activations = self._gradients = 0

    def __enter__(self) -> Account:
        self._optimizer.zero_grad(set_to_none=True)
        self._resize = torch.UntypedStorage.resize_
        account, resize = self, self._resize

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            before = storage.nbytes()
            found = resize(storage, size)
            account._changed(storage, storage.nbytes() - before)
            return found

        torch.UntypedStorage.resize_ = resized  # type: ignore[assignment, method-assign]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)  # type: ignore[no-untyped-call]
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        made = _storages(found)
        if made:
            given = {id(storage) for storage in _storages((args, kwargs))}
            for storage in made:
                if id(storage) not in given and id(storage) not in self._made:
                    self._changed(storage, storage.nbytes())
        return found

    @property
    def bytes(self) -> StepBytes:
        """What has been counted, after the step and before the next one."""
        weights = _bytes(self._parameters)
        states: list[Any] = [self._optimizer.state[p] for p in self._parameters if p in self._optimizer.state]
        optimizer = _bytes([leaf for state in states for leaf in state.values() if isinstance(leaf, Tensor)])
        return StepBytes(
            weights, self._held_gradients(), optimizer, self._activations, weights + optimizer + self._peak
        )

    def _changed(self, storage: torch.UntypedStorage, by: int) -> None:
        key = id(storage)
        if key not in self._made:
            self._made[key] = 0
            self._alive[key] = weakref.ref(storage, lambda _, key=key: self._gone(key))  # type: ignore[misc]
        self._made[key] += by
        self._now += by
        self._peak = max(self._peak, self._now)
        # Gradients only become more as the step goes on: they are asked for again where it may matter.
        if self._now - self._gradients > self._activations:
            self._gradients = self._held_gradients()
            self._activations = max(self._activations, self._now - self._gradients)

    def _gone(self, key: int) -> None:
        self._now -= self._made.pop(key)
        del self._alive[key]

    def _held_gradients(self) -> int:
        return _bytes([p.grad for p in self._parameters if p.grad is not None])


def _storages(values: Any) -> list[torch.UntypedStorage]:
    """Of all tensors in there, each once."""
    found = {}
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor):
            for tensor in _plain(leaf):
                storage = tensor.untyped_storage()
                found[id(storage)] = storage
    return list(found.values())


def _plain(tensor: Tensor) -> list[Tensor]:
    """A spread tensor's part here."""
    whole: Any = tensor
    if not is_traceable_wrapper_subclass(whole):
        return [tensor]
    names, _ = whole.__tensor_flatten__()
    inner = [getattr(tensor, name) for name in names]
    return [plain for each in inner if isinstance(each, Tensor) for plain in _plain(each)]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(storage.nbytes() for storage in _storages(list(tensors)))
