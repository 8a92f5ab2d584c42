"""Weights, gradients and what the optimizer keeps, on the disk, but for the blocks that are at work.

Here        OffloadConfig, `apply_offload`, Offloaded.
Elsewhere   the files (shelf.py); activations (recompute.py, saved.py); checkpoints, which are whole without these files
            (engine/checkpoint.py).
Promise     the numbers are those of a run without it, bit for bit; so is everything that looks at weights: they are
            where the model says, and may be read, judged and saved as ever. What a step needs in memory at one time is
            the weights of two blocks and some gradients, beside activations; the rest is the system's to drop or keep.

A block that is made anew in the backward works on a copy of its weights in memory, read while the one before it works,
forwards and backwards; one whose activations are kept works on the files themselves, since what autograd keeps would
hold the copies of all. A gradient is written when it arrives, and its memory let go; its norm is taken before. The
optimizer goes through the weights some megabytes at a time, the next being read and the ones before written meanwhile.
Embedding and head are one unit more. (Rajbhandari et al. 2021, arXiv:2104.07857; Ren et al. 2021, arXiv:2101.06840,
whose gradients and optimizer are where the processor is, as all is here.)
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.utils._pytree import tree_leaves

from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.engine.memory.shelf import MOST_STORING, Copy, Shelf, Slot
from dougong.engine.weights import local_part
from dougong.nn.block_stack import BlockStack

Place = Literal["memory", "disk"]

MEANS: Final = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each weight."""

REST: Final = "rest"
"""The unit of what is in no block."""

STEPPED: Final = 2 * 2**20
"""Bytes of weights that the optimizer has in memory at a time, three times over."""

GIVEN_BACK: Final = 4
"""Blocks after whose backward free memory is given back: it takes milliseconds."""

LARGEST: Final = 64 * 2**20
"""Bytes of a weight that is stepped where it lies."""


class Piece(NamedTuple):
    """What the optimizer steps at a time: weights of a unit, next to each other."""

    unit: str
    parameters: Mapping[str, nn.Parameter]
    copied: bool


class Read(NamedTuple):
    """A block's weights, on their way into memory."""

    copy: Copy
    version: int
    """Of the weights when it set out: nobody may have written to them since."""


class OffloadConfig(Config):
    """What lies on the disk."""

    optimizer: Place = "memory"
    """The optimizer's state: half of all, where weights and gradients are in fp32."""

    gradients: Place = "memory"
    weights: Place = "memory"

    folder: str | None = None
    """Where. None: in the run's folder."""

    @model_validator(mode="before")
    @classmethod
    def _all_of_it(cls, given: Any) -> Any:
        """`offload: disk` is all three."""
        if given in ("memory", "disk"):
            return {"optimizer": given, "gradients": given, "weights": given}
        return given

    @model_validator(mode="after")
    def _somewhere(self) -> OffloadConfig:
        if self.folder is not None and not self.on_disk:
            raise ValueError(
                f"folder={self.folder} has no effect where nothing lies on the disk. Use disk, or no folder."
            )
        return self

    @property
    def on_disk(self) -> tuple[str, ...]:
        """Which of the three."""
        return tuple(kind for kind in ("weights", "gradients", "optimizer") if getattr(self, kind) == "disk")


class Offloaded:
    """A model of whose state some lies on the disk."""

    def __init__(
        self, model: BlockStack[Any, Any], config: OffloadConfig, folder: Path, anew: Sequence[bool] = ()
    ) -> None:
        self.model, self.config = model, config
        self._unit_of: dict[nn.Parameter, str] = {}
        self._name_of: dict[nn.Parameter, str] = {}
        for name, parameter in model.named_parameters():
            self._name_of[parameter] = name
            self._unit_of[parameter] = _unit_of(name)
        self.units = [f"block-{place}" for place in range(len(model.blocks))]
        self.units = [unit for unit in [REST, *self.units] if unit in self._unit_of.values()]
        self.shelf = Shelf(folder, {unit: self._slots(unit) for unit in self.units})
        self._arriving: str | None = None
        """The unit whose gradients arrive."""

        self._going_back = False
        self._by = 1.0
        """By what gradients are to be multiplied."""

        self._norms: dict[nn.Parameter, Tensor] = {}
        """Of gradients that arrived, and nothing has been added to."""

        self._undo: list[Callable[[], None]] = []
        self._weights = config.weights == "disk"
        self._owned = {unit: [p for p, its in self._unit_of.items() if its == unit] for unit in self.units}
        self._anew = {f"block-{place}" for place, each in enumerate(anew) if each and self._weights} & set(self.units)
        self._at: str | None = None
        """The block that works on a copy of its weights."""

        self._read: dict[str, Read] = {}
        if self._weights:
            for parameter in self._unit_of:
                self._shelve(parameter)
            for place, block in enumerate(model.blocks):
                if f"block-{place}" in self._anew:
                    self._undo.append(block.register_forward_pre_hook(self._before_forward(place)).remove)
                    self._undo.append(block.register_forward_hook(self._after_forward(place)).remove)
                else:
                    self._undo.append(block.register_forward_pre_hook(self._ahead_of(place)).remove)
        if config.gradients == "disk":
            for parameter in self._unit_of:
                if parameter.requires_grad:
                    undo = parameter.register_post_accumulate_grad_hook(self._arrived).remove  # type: ignore[no-untyped-call]
                    self._undo.append(undo)

    def _slots(self, unit: str) -> dict[str, dict[str, Slot]]:
        own = {self._name_of[p]: p for p, its in self._unit_of.items() if its == unit}
        slots = {name: Slot(p.dtype, tuple(local_part(p).shape)) for name, p in own.items()}
        trained = {name: slot for name, slot in slots.items() if own[name].requires_grad}
        kinds = {}
        if self.config.weights == "disk":
            kinds["weight"] = slots
        if self.config.gradients == "disk":
            kinds["gradient"] = trained
        if self.config.optimizer == "disk":
            kinds |= dict.fromkeys(MEANS, trained)
        return kinds

    def _lying(self, kind: str, parameter: nn.Parameter) -> Tensor:
        return self.shelf.tensor(self._unit_of[parameter], kind, self._name_of[parameter])

    def _shelve(self, parameter: nn.Parameter) -> None:
        self.shelf.write(self._unit_of[parameter], "weight", self._name_of[parameter], parameter)
        parameter.data = self._lying("weight", parameter)

    # Weights -------------------------------------------------------------------------------------------------

    def _ahead_of(self, place: int) -> Callable[..., None]:
        following = f"block-{place + 1}"
        following = following if following in self.units else REST

        def ahead(*_: Any) -> None:
            if following in self.units:
                self.shelf.soon(following, ["weight"])

        return ahead

    def _before_forward(self, place: int) -> Callable[..., None]:
        return lambda *_: self._enter(place, place + 1)

    def _after_forward(self, place: int) -> Callable[..., None]:
        """What comes out tells when the backward comes to it."""

        def leave(_: nn.Module, given: Any, made: Any) -> None:
            self._leave()
            if not torch.is_grad_enabled():
                return
            passed = {id(leaf) for leaf in tree_leaves(given)}
            for leaf in tree_leaves(made):
                if isinstance(leaf, Tensor) and leaf.requires_grad and id(leaf) not in passed:
                    leaf.register_hook(lambda _: self._back_to(place))  # type: ignore[no-untyped-call]

        return leave

    def _back_to(self, place: int) -> None:
        if self._at != f"block-{place}" and place % GIVEN_BACK == 0:
            _give_back()
        self._enter(place, place - 1)

    def _enter(self, place: int, following: int) -> None:
        """This block works now, and that one next. That may be wrong: it is about time alone."""
        unit, ahead = f"block-{place}", f"block-{following}"
        if self._at != unit:
            self._leave()
            read = self._read.pop(unit, None)
            if read is None or read.version != self._version(unit):
                read = self._fetch(unit)
            tensors = read.copy.wait()
            for parameter in self._owned[unit]:
                parameter.data = tensors[self._name_of[parameter]]
            self._at = unit
        for other in set(self._read) - {ahead}:
            del self._read[other]
        if ahead in self._anew and ahead not in self._read:
            self._read[ahead] = self._fetch(ahead)

    def _leave(self) -> None:
        if self._at is not None:
            for parameter in self._owned[self._at]:
                parameter.data = self._lying("weight", parameter)
            self._at = None

    def _fetch(self, unit: str) -> Read:
        names = [self._name_of[p] for p in self._owned[unit]]
        return Read(self.shelf.copy_of(unit, "weight", names), self._version(unit))

    def _version(self, unit: str) -> int:
        return sum(p._version for p in self._owned[unit])

    # Gradients -----------------------------------------------------------------------------------------------

    def _arrived(self, parameter: nn.Parameter) -> None:
        if not self._going_back:
            self._going_back = True
            torch.autograd.Variable._execution_engine.queue_callback(self._gone_back)
        unit = self._unit_of[parameter]
        if unit != self._arriving:
            if self._arriving is not None:
                self.shelf.behind(self._arriving)
            self._arriving = unit
            before = self._before(unit)
            if before is not None:
                self.shelf.soon(before, ["weight"])
        lying, gradient = self._lying("gradient", parameter), parameter.grad
        assert gradient is not None
        if gradient.data_ptr() == lying.data_ptr():  # it has been added to what lies there
            self._norms.pop(parameter, None)
            return
        (self._norms[parameter],) = torch._foreach_norm([gradient])
        name = self._name_of[parameter]
        if unit in self._anew:
            copy = self.shelf.room_for(unit, "gradient", [name])
            copy.tensors[name].copy_(gradient)
            self.shelf.store(copy)
        else:
            self.shelf.write(unit, "gradient", name, gradient)
        parameter.grad = lying

    def _gone_back(self) -> None:
        """Everybody may look at gradients, and the next backward add to them."""
        self._going_back = False
        self._leave()
        self.shelf.stored()

    def _before(self, unit: str) -> str | None:
        place = self.units.index(unit)
        return self.units[place - 1] if place else None

    # The optimizer -------------------------------------------------------------------------------------------

    def take(self, optimizer: Optimizer) -> None:
        """Have this optimizer step unit by unit; what it keeps lies on the disk, if it is to.

        Raises:
            ConfigError: it keeps something else.
        """
        if self.config.optimizer == "disk":
            if type(optimizer) is not AdamW:
                raise ConfigError(
                    f"memory.offload.optimizer=disk puts the two fp32 means of AdamW there, and the optimizer is "
                    f"{type(optimizer).__name__}. Use memory.offload.optimizer: memory."
                )
            for parameter in self._trained(optimizer):
                means = {kind: _spread_like(parameter, self._lying(kind, parameter)) for kind in MEANS}
                optimizer.state[parameter] = {"step": torch.zeros(()), **means}
        step = optimizer.step
        pieces = self._pieces(optimizer)
        # Of each piece, what is in which group.
        by_group = [
            [[p for p in group["params"] if self._name_of[p] in piece.parameters] for group in optimizer.param_groups]
            for piece in pieces
        ]

        def by_piece(*_: Any) -> None:
            groups = optimizer.param_groups
            self._leave()
            self._read.clear()
            self.shelf.stored()
            ahead = deque(self._copies(optimizer, piece) for piece in pieces[:2])
            try:
                for place, piece in enumerate(pieces):
                    copies = ahead.popleft()
                    for following in pieces[place + 2 : place + 3]:
                        ahead.append(self._copies(optimizer, following))
                    optimizer.param_groups = [
                        {**group, "params": own} for group, own in zip(groups, by_group[place], strict=True)
                    ]
                    with self._in_memory(optimizer, piece, copies):
                        if self._by != 1.0:
                            self._multiplied(piece.parameters.values())
                        step()
                        for parameter in piece.parameters.values():
                            parameter.grad = None  # a multiplied one is in memory
                    for kind, copy in copies.items():
                        if kind != "gradient":
                            self.shelf.store(copy)
                    if not piece.copied:
                        self.shelf.behind(piece.unit)
            finally:
                optimizer.param_groups = groups
                self.shelf.stored()
            self._arriving, self._by = None, 1.0
            self._norms.clear()

        optimizer.step = by_piece  # type: ignore[method-assign, assignment]

    def _pieces(self, optimizer: Optimizer) -> list[Piece]:
        """All that it steps. From the last: those before it have been looked at last, and are needed first by the next
        step."""
        stepped = set(self._trained(optimizer))
        pieces: list[Piece] = []
        for unit in self.units[::-1]:
            held: dict[str, nn.Parameter] = {}
            for parameter in self._owned[unit]:
                if parameter not in stepped:
                    # What lies next to each other may be read at once; this one is between.
                    pieces, held = _with_piece(pieces, unit, held), {}
                    continue
                size = local_part(parameter).nbytes
                if held and sum(local_part(p).nbytes for p in held.values()) + size > STEPPED:
                    pieces, held = _with_piece(pieces, unit, held), {}
                held[self._name_of[parameter]] = parameter
            pieces = _with_piece(pieces, unit, held)
        return pieces

    def _copies(self, optimizer: Optimizer, piece: Piece) -> dict[str, Copy]:
        """Of all that it needs and that is not in memory, on its way there."""
        if not piece.copied or all(p.grad is None for p in piece.parameters.values()):
            return {}
        kinds = ["weight"] if self._weights else []
        if self.config.gradients == "disk" and all(
            p.grad is None or p.grad is self._lying("gradient", p) for p in piece.parameters.values()
        ):
            kinds.append("gradient")
        if self.config.optimizer == "disk":
            kinds += MEANS
        return {kind: self.shelf.copy_of(piece.unit, kind, list(piece.parameters)) for kind in kinds}

    @contextlib.contextmanager
    @torch.no_grad()
    def _in_memory(self, optimizer: Optimizer, piece: Piece, copies: Mapping[str, Copy]) -> Iterator[None]:
        """What is copied is where the optimizer looks, and afterwards where it lies again."""
        there: list[tuple[Tensor, Tensor]] = []
        for kind, copy in copies.items():
            tensors = copy.wait()
            for name, parameter in piece.parameters.items():
                lying = self._lying(kind, parameter)
                if kind == "gradient":
                    if parameter.grad is not None:
                        parameter.grad = tensors[name]
                    continue
                held = local_part(parameter if kind == "weight" else optimizer.state[parameter][kind])
                there.append((held, lying.view_as(lying)))
                held.data = tensors[name]
        try:
            yield
        finally:
            for held, lying in there:
                held.data = lying

    def norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Of them all, of which those that have arrived in one go need not be read for it."""
        known = {id(self._lying("gradient", p)): norm for p, norm in self._norms.items()}
        norms = [known[id(g)] if id(g) in known else torch._foreach_norm([g])[0] for g in gradients]
        found: Tensor = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
        return found

    def multiply(self, gradients: Sequence[Tensor], by: float) -> None:
        """When the optimizer comes to them: they need not be read for it, nor written."""
        self._by = by

    def _multiplied(self, parameters: Iterable[nn.Parameter]) -> None:
        """What lies on the disk stays as it is there."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = parameter.grad * self._by

    def _trained(self, optimizer: Optimizer) -> Sequence[nn.Parameter]:
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        assert all(p in self._unit_of for p in stepped), "what the optimizer steps is the model's"
        return stepped

    def close(self) -> None:
        """The model is in memory again, as far as it was, and the files are gone."""
        self._leave()
        self._read.clear()
        for undo in self._undo:
            undo()
        self._undo.clear()
        self.shelf.close()


def passing_bytes(model: nn.Module, config: OffloadConfig) -> int:
    """Of what lies on the disk, how much is in memory at one time at the most, on its way there or back.

    Embedding and head do not count: they are used where they lie.
    """
    blocks: dict[str, int] = {}
    largest = 0
    for name, parameter in model.named_parameters():
        size = local_part(parameter).nbytes
        blocks[_unit_of(name)] = blocks.get(_unit_of(name), 0) + size
        largest = max(largest, size) if size <= LARGEST else largest
    block = max([size for unit, size in blocks.items() if unit != REST], default=0)
    # The block that works, the next, and the one before, until its last gradient has arrived.
    working = 3 * block if "weights" in config.on_disk else 0
    arriving = MOST_STORING + 2 * largest if "gradients" in config.on_disk else 0
    kinds = sum({"weights": 1, "gradients": 1, "optimizer": 2}[kind] for kind in config.on_disk)
    stepped = 3 * kinds * max(STEPPED, largest) + MOST_STORING
    return max(working + arriving, stepped) if config.on_disk else 0


def apply_offload(
    model: BlockStack[Any, Any], config: OffloadConfig, folder: Path, *, anew: Sequence[bool] = ()
) -> Offloaded:
    """Put on the disk what is to lie there, in place; after all else that is done to the model. `anew` says of each
    block whether it is made anew in the backward; none are where it is empty.

    Raises:
        ConfigError: the folder has no room, or the model is on a device that cannot compute with files.
    """
    strange = next((p.device.type for p in model.parameters() if p.device.type != "cpu"), None)
    if strange is not None:
        raise ConfigError(
            f"memory.offload maps files into the processor's memory, and the model is on {strange}. Train on the "
            "processor, or spread the state by plan.shard."
        )
    return Offloaded(model, config, folder, anew)


def _give_back() -> None:
    """Have the C library return to the system what is free. Else it keeps what activations took, some megabytes of each
    block, and under a limit that is memory like any other."""
    with contextlib.suppress(AttributeError):  # another C library than GNU's
        ctypes.CDLL(None).malloc_trim(0)


def _spread_like(parameter: nn.Parameter, local: Tensor) -> Tensor:
    """What is here of a tensor that is spread as this parameter is."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )


def _with_piece(pieces: Sequence[Piece], unit: str, held: Mapping[str, nn.Parameter]) -> list[Piece]:
    if not held:
        return list(pieces)
    copied = all(local_part(p).nbytes <= LARGEST for p in held.values())
    return [*pieces, Piece(unit, held, copied)]


def _unit_of(name: str) -> str:
    parts = name.split(".")
    return f"block-{parts[1]}" if parts[0] == "blocks" else REST
