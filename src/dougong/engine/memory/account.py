"""The bytes that a training step holds, counted and not guessed.

Here        Account, StepBytes; Alive, of any piece of work; `num_bytes`.
Elsewhere   of each block by itself (blocks.py); the same of a rank that does not exist (engine/planner/rehearse.py);
            formulas for a thousand layouts (engine/planner/predict.py).
Promise     every piece of memory that a tensor operation makes is counted from then until nothing refers to it, once
            however many views look at it; also what is made larger or let go in place, as FSDP does.

Weights, gradients and optimizer are what this rank holds of them. Activations are all else that is there because of the
step: what autograd keeps for the backward, what lies between two operations, micro-batches under way in a pipeline,
what is being sent and received, weights gathered from other ranks and their gradients before they are spread. They are
told at the moment when there is most of them. The loader's batches are not counted, nor what a kernel needs inside.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class StepBytes(NamedTuple):
    """Of one rank, in one step."""

    weights: int
    gradients: int
    """At the end of the backward, of the weights that are held; those of weights that were gathered for the whole step
    are activations, until they are spread."""

    optimizer: int
    activations: int
    """At their most."""

    peak: int
    """Most of everything at one time; less than the sum where not all are at their most together."""


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch ships it without types
    """Counts what is made inside it, as long as anything refers to it; gradients of these weights apart."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parameters = list(parameters)
        self._made: dict[int, int] = {}
        self._alive: dict[int, weakref.ref[Any]] = {}
        self.now = 0
        """Bytes that are there."""

        self.peak = 0
        """At their most."""

        self.activations = 0
        """The same without gradients of weights."""

        self._gradients = 0

    def __enter__(self) -> Self:
        self._resize = torch.UntypedStorage.resize_
        counting, resize = self, self._resize

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            before = storage.nbytes()
            found = resize(storage, size)
            counting._changed(storage, storage.nbytes() - before)
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

    def begin(self) -> None:
        """What is there now is the most there has been."""
        self._gradients = self.held_gradients()
        self.peak, self.activations = self.now, self.now - self._gradients

    def held_gradients(self) -> int:
        return num_bytes([p.grad for p in self._parameters if p.grad is not None])

    def _changed(self, storage: torch.UntypedStorage, by: int) -> None:
        key = id(storage)
        if key not in self._made:
            self._made[key] = 0
            self._alive[key] = weakref.ref(storage, lambda _, key=key: self._gone(key))  # type: ignore[misc]
        self._made[key] += by
        self.now += by
        self.peak = max(self.peak, self.now)
        # Gradients only become more as the step goes on: they are asked for again where it may matter.
        if self.now - self._gradients > self.activations:
            self._gradients = self.held_gradients()
            self.activations = max(self.activations, self.now - self._gradients)

    def _gone(self, key: int) -> None:
        self.now -= self._made.pop(key)
        del self._alive[key]


class Account(Alive):  # type: ignore[no-untyped-call]  # as above
    """Counts while a step is carried out inside it: not the first, in which the optimizer makes what it keeps.

    Gradients of the step before are let go.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        # What is stepped may be other tensors, in the weights' own memory.
        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        super().__init__(dict.fromkeys([*model.parameters(), *stepped]))
        self._optimizer = optimizer
        self._accumulated: dict[nn.Parameter, int] = {}
        """Bytes of gradients that a backward has left here, some of which are let go before the step."""

    def __enter__(self) -> Self:
        self._optimizer.zero_grad(set_to_none=True)
        trained = [parameter for parameter in self._parameters if parameter.requires_grad]
        self._hooks = [each.register_post_accumulate_grad_hook(self._note) for each in trained]  # type: ignore[no-untyped-call]
        return super().__enter__()

    def __exit__(self, *details: Any) -> None:
        super().__exit__(*details)
        for hook in self._hooks:
            hook.remove()

    def _note(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        # Of its own numbers: spread gradients lie side by side in one piece of memory.
        self._accumulated[parameter] = sum(plain.nbytes for plain in _plain(parameter.grad))

    @property
    def bytes(self) -> StepBytes:
        """What has been counted, after the step and before the next one."""
        weights = num_bytes(self._parameters)
        states: list[Any] = list(self._optimizer.state.values())
        optimizer = num_bytes([leaf for state in states for leaf in state.values() if isinstance(leaf, Tensor)])
        gradients = max(self.held_gradients(), sum(self._accumulated.values()))
        return StepBytes(weights, gradients, optimizer, self.activations, weights + optimizer + self.peak)


def num_bytes(tensors: Sequence[Tensor]) -> int:
    """That lie under these tensors, each piece of memory once."""
    return sum(storage.nbytes() for storage in _storages(list(tensors)))


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
