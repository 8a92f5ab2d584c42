"""Adding up over ranks that stand in nodes: inside first, then across, then inside again.

Here        Hierarchy, its forms, and the short measurement that chooses among them; `groups_in_nodes`.
Elsewhere   what is added up (replicate.py, layout.py).
Promise     every rank ends with the same numbers, those of a flat sum within rounding; with 16 bits on the wire between
            nodes, what a step loses by rounding is added to the next. Where flat was measured faster, flat is used.

leader      the node's ranks add up on its first rank, first ranks add up across, and spread what came of it inside.
scatter     each rank of a node gets the node's sum of a part, adds that up with its like in other nodes, and all
            gather the parts: every rank sends across, each another part (Cho et al. 2019, BlueConnect; Mikami et al.
            2018, arXiv:1811.05233).
Both work in chunks, one inside a node while another is on its way across.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dougong.engine.parallel.collectives import all_gather, begin_all_gather, reduce_scatter

Form = Literal["flat", "leader", "scatter"]
FORMS: Final[tuple[Form, ...]] = ("flat", "leader", "scatter")

CHUNK_BYTES: Final = 2**20
"""What goes across at a time: large enough that a message's own cost is little, small enough that what is done inside
before the first has left and after the last has come, when nothing is on the wire, is little too."""

MEASURED_BYTES: Final = (2**10, 2**14, 2**18, 2**22, 2**26)
"""Sizes at which forms are tried; a message takes the form of the nearest below."""

LONG_SECONDS: Final = 1.0
"""That one size may cost, if it is not two turns of all forms that cost more."""

MANY: Final = 5
"""Times that have a middle, and quarters, to be trusted."""

SURELY: Final = 0.95
"""Of flat's time, below which another form is taken: a smaller gain may be the measurement's noise."""


class Measured(NamedTuple):
    """What one form took for one size, in seconds, on the slowest rank."""

    num_bytes: int
    form: Form
    seconds: float


class _UnderWay(NamedTuple):
    """A chunk of which each rank of a node has a part, on its way across."""

    chunk: Tensor
    padded: Tensor
    part: Tensor
    crossing: Iterator[None]


_ARRIVED: Final = object()


class Hierarchy:
    """Ranks of a group in nodes of equal size, in order: the first node has the first ranks."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        inside: dist.ProcessGroup,
        across: dist.ProcessGroup,
        *,
        wire: Literal["fp32", "bf16"] = "fp32",
    ) -> None:
        """`inside` are the ranks of this node, `across` those with this one's place in other nodes; `wire` is how
        numbers go between nodes."""
        self.group, self.inside, self.across, self.wire = group, inside, across, wire
        self.per_node, self.num_nodes = dist.get_world_size(inside), dist.get_world_size(across)
        self.place = dist.get_rank(inside)
        self.choice: dict[int, Form] = {}
        """Form by size, once measured."""

        self.measured: list[Measured] = []
        self._lost: dict[str, Tensor] = {}
        """By the name of what is added up: what rounding has lost, of one's own part and of the sum."""

    def all_reduce(self, x: Tensor, *, form: Form | None = None, name: str = "") -> None:
        """Add up over all ranks, in place. `name` tells apart what is added up step after step."""
        form = form or self.form_of(x.nbytes)
        if form == "flat":
            dist.all_reduce(x, group=self.group)
            return
        flat = x.view(-1)
        chunks = list(torch.split(flat, max(1, CHUNK_BYTES // x.element_size())))
        work = self._scatter if form == "scatter" else self._leader
        work(chunks, name)

    def form_of(self, num_bytes: int) -> Form:
        """The form that was measured fastest for about this size; flat where nothing was measured."""
        below = [size for size in self.choice if size <= num_bytes]
        if not below:
            return self.choice[min(self.choice)] if self.choice else "flat"
        return self.choice[max(below)]

    def measure(
        self, sizes: Sequence[int] = MEASURED_BYTES, repeats: int = 20, seconds: float = LONG_SECONDS
    ) -> list[Measured]:
        """Try every form at every size, interleaved, and choose; all ranks come to the same choice.

        A size is tried no more once it has cost so many seconds: a slow wire is not to take minutes at each start.
        """
        device = "cpu" if dist.get_backend(self.group) == "gloo" else torch.accelerator.current_accelerator()
        self.measured = []
        for size in sizes:
            x = torch.ones(max(1, size // 4), device=device)
            took: dict[Form, list[float]] = {form: [] for form in FORMS}
            for turn in range(repeats + 1):
                for form in FORMS:
                    took[form].append(_timed(functools.partial(self.all_reduce, x, form=form, name="measured")))
                    x.fill_(1.0)
                if turn == 0 and size == sizes[0]:  # it met cold connections
                    took = {form: [] for form in FORMS}
                    continue
                spent = torch.tensor(sum(map(sum, took.values())), device=device)
                dist.all_reduce(spent, op=dist.ReduceOp.MAX, group=self.group)
                if turn and spent.item() > seconds:
                    break
            turns = torch.tensor([took[form] for form in FORMS], device=device)
            dist.all_reduce(turns, op=dist.ReduceOp.MAX, group=self.group)
            by_form = dict(zip(FORMS, turns.tolist(), strict=True))
            self.measured += [Measured(size, form, _typical(by_form[form])) for form in FORMS]
            self.choice[size] = _fastest(by_form)
        self._lost = {name: lost for name, lost in self._lost.items() if not name.startswith("measured")}
        return self.measured

    # Forms ---------------------------------------------------------------------------------------------------

    def _scatter(self, chunks: list[Tensor], name: str) -> None:
        size = self.per_node

        def begin(chunk: Tensor) -> tuple[Tensor, Tensor]:
            padded = torch.nn.functional.pad(chunk, (0, -len(chunk) % size))
            part = padded.new_empty(len(padded) // size)
            reduce_scatter(part, padded, self.inside)
            return padded, part

        # Chunks are added up and spread inside while others are on their way across.
        under_way: deque[_UnderWay] = deque()
        for number, chunk in enumerate(chunks):
            padded, part = begin(chunk)
            under_way.append(_UnderWay(chunk, padded, part, self._crossing(part, f"{name}/{number}")))
            next(under_way[-1].crossing)
            self._go_on(under_way, len(under_way) - 1)
        while under_way:
            self._go_on(under_way, len(under_way))

    def _go_on(self, under_way: deque[_UnderWay], count: int) -> None:
        """The next piece of work of the so many oldest; of which the oldest may come to its end."""
        for each in list(itertools.islice(under_way, count)):
            if next(each.crossing, _ARRIVED) is _ARRIVED:
                assert each is under_way[0]
                under_way.popleft()
                all_gather(each.padded, each.part, self.inside)
                each.chunk.copy_(each.padded[: len(each.chunk)])

    def _leader(self, chunks: list[Tensor], name: str) -> None:
        for number, chunk in enumerate(chunks):
            dist.reduce(chunk, group=self.inside, group_dst=0)
            if self.place == 0:
                self._across(chunk, f"{name}/{number}")
            dist.broadcast(chunk, group=self.inside, group_src=0)

    def _across(self, x: Tensor, name: str) -> None:
        for _ in self._crossing(x, name):
            pass

    def _crossing(self, x: Tensor, name: str) -> Iterator[None]:
        """Adds up between nodes, in place; yields when something is on its way, and then waits for it."""
        if self.wire == "fp32":
            work = dist.all_reduce(x, group=self.across, async_op=True)
            assert work is not None
            yield
            work.wait()
        else:
            yield from self._rounded(x, name)

    def _rounded(self, x: Tensor, name: str) -> Iterator[None]:
        """In 16 bits on the wire and 32 in sums: each node gets every other's part of its share, adds them up, and
        tells the sum. What rounding takes away is kept for the next time (Karimireddy et al. 2019,
        arXiv:1901.09847)."""
        nodes = self.num_nodes
        name = f"{name}, {len(x)}"
        lost = self._lost.get(f"{name} own")
        if lost is None:
            lost = x.new_zeros(-(-len(x) // nodes) * nodes, dtype=torch.float32)
        # In place, all of it: beside a fast wire, passing over memory is what 16 bits cost.
        lost[: len(x)] += x
        sent = lost.bfloat16()
        self._lost[f"{name} own"] = lost.sub_(sent)
        arrived = torch.empty_like(sent)
        work = dist.all_to_all_single(arrived, sent, group=self.across, async_op=True)
        assert work is not None
        yield
        work.wait()
        total = arrived.view(nodes, -1).sum(dim=0, dtype=torch.float32)
        before = self._lost.get(f"{name} sum")
        if before is not None:
            total += before
        told = total.bfloat16()
        self._lost[f"{name} sum"] = total.sub_(told)
        whole = told.new_empty(len(told) * nodes)
        telling = begin_all_gather(whole, told, self.across)
        yield
        telling.wait()
        x.copy_(whole[: len(x)])


def groups_in_nodes(groups: Sequence[Sequence[int]], per_node: int) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's group inside its node and across nodes, where each of `groups`, of all ranks there are, stands in
    nodes of so many of its ranks, in order. All ranks call this together."""
    nodes = [group[first : first + per_node] for group in groups for first in range(0, len(group), per_node)]
    across = [group[place::per_node] for group in groups for place in range(per_node)]
    return _made(nodes), _made(across)


def _made(rows: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    found: dist.ProcessGroup
    found, _ = dist.new_subgroups_by_enumeration([list(row) for row in rows])  # type: ignore[no-untyped-call]
    return found


def _typical(seconds: Sequence[float]) -> float:
    """The middle of many; of few the least, since whatever else the machine does only adds to a time."""
    return sorted(seconds)[len(seconds) // 2 if len(seconds) >= MANY else 0]


def _fastest(seconds: Mapping[Form, Sequence[float]]) -> Form:
    """By each form's times in the same turns: another than flat where most of its turns were faster, by more than what
    noise makes."""
    flat, found = seconds["flat"], {}
    for form, took in seconds.items():
        ratios = sorted(own / other for own, other in zip(took, flat, strict=True))
        few = len(ratios) < MANY
        ratio = min(took) / min(flat) if few else ratios[len(ratios) // 2]
        if ratio < SURELY and (few or ratios[3 * len(ratios) // 4] < 1.0):
            found[form] = ratio
    return min(found, key=lambda form: found[form]) if found else "flat"


def _timed(work: Callable[[], None]) -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    started = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - started
