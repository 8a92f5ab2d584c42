"""Blocks in a row as one compiled piece: its forward is one graph, its making anew and backward another.

Here        `apply_segments`, Segment; `choose_segments`, which measures whether and how long they pay; SegmentChoice.
Elsewhere   making anew block by block (recompute.py); what torch's allocator hands out (allocated.py).
Promise     names of parameters stay; a segment keeps what it was given and no more; dropout draws the same numbers when
            its activations are made anew, and buffers move once. Numbers are those of the blocks within rounding, since
            a compiler adds up in another order; dropout's are others than without segments, as random. What cannot be
            compiled, or comes in too many shapes, is made anew block by block instead, which is said once.

Only a segment's input is kept, as Chen et al. 2016 (arXiv:1604.06174) do; that making anew and backward are compiled
together, so that cheap operations never reach memory, is after He and Yu 2023 (MLSys), torch's own partitioner.
The checkpoint stands inside what is compiled: with the partitioner's own budget at 0 instead, dropout drew other
numbers in the backward (docs/log.md).
"""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch.utils.checkpoint import checkpoint

from dougong.core.errors import ConfigError
from dougong.engine.memory.allocated import most_allocated
from dougong.engine.memory.recompute import recomputed
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.precision.choice import Chosen, autocast
from dougong.engine.precision.widened import Widened, has_bf16_products
from dougong.engine.random_state import random_state_kept
from dougong.nn.batch import Batch
from dougong.nn.block_stack import BlockStack

ENOUGH_GAIN: Final = 1.03
"""How many times faster a step must be with segments to be worth their rounding and compiling."""

SHAPES: Final = 8
"""Kinds of input for which one piece is compiled; a first change of sizes makes them variable, and counts as one."""

_CANNOT: Final = (TorchDynamoException, CppCompileError, InvalidCxxCompiler)


def check_segments(plan: PlanConfig) -> None:
    """
    Raises:
        ConfigError: segments cannot be made of a model that is laid out so.
    """
    for name in ("tensor", "context", "expert", "shard"):
        if getattr(plan, name) > 1:
            raise ConfigError(
                f"memory.segments compiles whole blocks, and with plan {name}={getattr(plan, name)} ranks exchange "
                f"something inside or around each. Use plan {name}: 1, or leave memory.segments out."
            )


def apply_segments(
    model: BlockStack[Any, Any], size: int, *, bounds: Sequence[int] = (), backend: str = "inductor"
) -> list[Segment]:
    """Make segments of `size` blocks each, in place; none goes across `bounds`, where stages begin and end.

    Raises:
        ValueError: `size` is not above 0.
    """
    if size < 1:
        raise ValueError(f"segments of {size} blocks")
    blocks = list(model.blocks)
    made = []
    for begin, end in itertools.pairwise(sorted({0, *bounds, len(blocks)})):
        made += [Segment(blocks[first : min(first + size, end)], backend) for first in range(begin, end, size)]
    return made


class Segment:
    """Blocks in a row. The first one's forward does the work of all, and the others hand on what it made."""

    def __init__(self, blocks: Sequence[nn.Module], backend: str = "inductor") -> None:
        self.blocks = list(blocks)
        self._piece = _Piece([(block, block.forward) for block in blocks], backend)
        self._made: Any = None
        for place, block in enumerate(blocks):
            block.forward = self._first(block.forward) if place == 0 else self._later(block, block.forward)

    @property
    def pieces(self) -> int:
        """In so many it had to be cut, as far as it has been called."""
        return self._piece.count

    @property
    def eager(self) -> int:
        """Blocks that could not be compiled, as far as they have been called."""
        return self._piece.eager

    def _first(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def first(*given: Any) -> Any:  # a block may be asked to show something besides
            if len(given) > 1 or not torch.is_grad_enabled():
                return own(*given)
            made = self._piece(given[0])
            if len(self.blocks) > 1:
                self._made = made
            return made

        return first

    def _later(self, block: nn.Module, own: Callable[..., Any]) -> Callable[..., Any]:
        def later(*given: Any) -> Any:
            if self._made is None or given[0] is not self._made:
                return own(*given)  # called by itself
            if block is self.blocks[-1]:
                self._made = None
            return given[0]

        return later


class _Piece:
    """Blocks that are compiled together, or two halves of them where that cannot be; one block alone is then eager."""

    def __init__(self, blocks: list[tuple[nn.Module, Callable[..., Any]]], backend: str) -> None:
        self._blocks, self._backend = blocks, backend
        self._halves: list[_Piece] = []
        self._told = False
        self._is_eager = False
        self._anew = [recomputed(block, forward, "nothing") for block, forward in blocks]
        forwards = [forward for _, forward in blocks]

        def chain(state: Any) -> Any:
            for forward in forwards:
                state = forward(state)
            return state

        def kept_less(state: Any) -> Any:
            return checkpoint(chain, state, use_reentrant=False)

        # torch's own overloads lack two of its options.
        compile_: Any = torch.compile
        self._compiled = compile_(
            kept_less,
            fullgraph=True,
            backend=backend,
            options=_options() if backend == "inductor" else None,
            recompile_limit=SHAPES,
            isolate_recompiles=True,
        )

    @property
    def count(self) -> int:
        return sum(half.count for half in self._halves) or 1

    @property
    def eager(self) -> int:
        return sum(half.eager for half in self._halves) or int(self._is_eager)

    def __call__(self, state: Any) -> Any:
        if self._halves:
            for half in self._halves:
                state = half(state)
            return state
        if self._is_eager:
            return self._by_block(state)
        try:
            # Experts' counts decide sizes inside a graph; and what cannot be compiled must be known in the forward.
            with (
                warnings.catch_warnings(action="ignore"),  # of what the compiler asks its own libraries
                torch._dynamo.config.patch(capture_scalar_outputs=True),
                torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
            ):
                return self._compiled(state)
        except FailOnRecompileLimitHit:
            self._tell(f"comes in more than {SHAPES} kinds of shapes; others are made anew block by block")
            return self._by_block(state)
        except _CANNOT as error:
            self._compiled = None
            if len(self._blocks) == 1:
                self._is_eager = True
                self._tell(f"cannot be compiled and is made anew by itself ({_first_line(error)})")
            else:
                middle = len(self._blocks) // 2
                self._halves = [_Piece(part, self._backend) for part in (self._blocks[:middle], self._blocks[middle:])]
            return self(state)

    def _by_block(self, state: Any) -> Any:
        for block in self._anew:
            state = block(state)
        return state

    def _tell(self, what: str) -> None:
        if not self._told:
            names = ", ".join(dict.fromkeys(type(block).__name__ for block, _ in self._blocks))
            warnings.warn(f"memory.segments: a segment of {names} {what}", stacklevel=2)
        self._told = True


def _options() -> dict[str, Any] | None:
    return None if has_bf16_products() else {"post_grad_custom_pre_pass": Widened()}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


class Tried(NamedTuple):
    """Segments of one size, beside making each block anew by itself."""

    size: int
    bytes: int
    """Handed out at most in a forward and backward, beyond what was there."""

    ratio: float | None
    """How many times faster, the median of pairs; None where it takes more memory and was not timed."""

    compile_seconds: float
    """What the first passes took beyond the later ones: once for each kind of input, or less where it is remembered."""

    eager: int
    """Blocks that could not be compiled."""


class SegmentChoice(NamedTuple):
    """What was chosen, and why."""

    size: int | None
    """None: blocks are made anew one by one."""

    bytes: int
    """What making each block anew by itself takes."""

    tried: tuple[Tried, ...]

    def in_words(self) -> str:
        if self.size is None:
            return f"segments are off: none of {', '.join(str(each.size) for each in self.tried)} blocks pays"
        ratio = next(each.ratio for each in self.tried if each.size == self.size)
        return f"segments of {self.size} blocks: {ratio:.2f} times as fast as blocks made anew one by one"


def sizes_of(num_blocks: int) -> tuple[int, ...]:
    """1, 2, 4 and so on, and all."""
    return tuple(
        sorted({*itertools.takewhile(lambda k: k < num_blocks, (2**n for n in itertools.count())), num_blocks})
    )


def choose_segments(
    model: BlockStack[Any, Any],
    loss: Callable[[Any, Batch], Tensor],
    batch: Batch,
    *,
    precision: Chosen = "fp32",
    sizes: Sequence[int] | None = None,
    pairs: int = 5,
    backend: str = "inductor",
) -> SegmentChoice:
    """Time forward and backward of one batch with segments of each size, beside each block made anew by itself.

    The model must be in training mode, and no recomputing applied to it yet; it is afterwards as it was. A size that
    takes more memory at its most than blocks made anew one by one does not count, however fast it is.
    """
    blocks = list(model.blocks)
    own = [block.__dict__.get("forward") for block in blocks]
    parameters = [p for p in model.parameters() if p.requires_grad]
    device_type = parameters[0].device.type

    def run() -> None:
        with autocast(precision, device_type):
            value = loss(model(batch), batch).float()
        # Not .backward(): that would add to the gradients that are there.
        torch.autograd.grad(value, parameters, allow_unused=True)

    def restore() -> None:
        for block, forward in zip(blocks, own, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward

    def forwards() -> list[Callable[..., Any]]:
        return [block.forward for block in blocks]

    def use(these: Sequence[Callable[..., Any]]) -> None:
        for block, forward in zip(blocks, these, strict=True):
            block.forward = forward

    with random_state_kept(), _as_before(model):
        try:
            for block in blocks:
                block.forward = recomputed(block, block.forward, "nothing")
            one_by_one = forwards()
            run()
            most = most_allocated(run, device_type)
            tried = []
            for size in sizes_of(len(blocks)) if sizes is None else sizes:
                restore()
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # it is told by whom it is really applied for
                    segments = apply_segments(model, size, backend=backend)
                    first = _seconds(run, device_type)
                    later = _seconds(run, device_type)
                    taken = most_allocated(run, device_type)
                compiled, ratio = forwards(), None
                if taken <= most:
                    ratios = []
                    for _ in range(pairs):
                        use(one_by_one)
                        before = _seconds(run, device_type)
                        use(compiled)
                        ratios.append(before / _seconds(run, device_type))
                    ratio = statistics.median(ratios)
                tried.append(Tried(size, taken, ratio, max(0.0, first - later), sum(s.eager for s in segments)))
        finally:
            restore()
    best = max(tried, key=lambda each: each.ratio or 0.0)
    pays = best.ratio is not None and best.ratio >= ENOUGH_GAIN
    return SegmentChoice(best.size if pays else None, most, tuple(tried))


def _seconds(run: Callable[[], None], device_type: str) -> float:
    if device_type != "cpu":
        torch.accelerator.synchronize()
    started = time.perf_counter()
    run()
    if device_type != "cpu":
        torch.accelerator.synchronize()
    return max(time.perf_counter() - started, 1e-9)


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Undo what a forward in training does to buffers."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, was in buffers:
                buffer.copy_(was)
