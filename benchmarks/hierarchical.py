"""Adding up over two emulated nodes: inside first and then across, against one flat all-reduce.

Here        the nodes, what each rank measures, and what is made of it (claim 1 of docs/claims.md).
Elsewhere   the forms (engine/parallel/hierarchical.py); options and the written result (harness.py).
Promise     all ways run in turns in the same processes, in an order that goes round; a time is the slowest rank's, a
            figure the median of the turns' ratios with a bootstrapped 95 % interval.

The nodes are emulated on one machine: two network namespaces with a wire between them whose rate is limited (tbf) both
ways; ranks of a node speak through its loopback. Delay is the machine's own, but for the wire that is said to have one,
which is a process that carries packets between two TUN devices (relay.py) and takes a part of the machine for it.
Making namespaces needs to be permitted; where it is not, the script says so and measures nothing.

Theory, where the wire is all that costs: of a message of S bytes a flat ring over N ranks sends 2 (N - 1) / N S over
the wire each way, and the two levels send S, so their times are as N to 2 (N - 1): 0.667 for 2 x 2 ranks, 0.571 for
2 x 4.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from harness import run
from paired import as_ranks, quartiles, ratio
from relay import MTU, Wire

from dougong.core.errors import ConfigError
from dougong.core.figures import Figure

WIRES: Final = {"200-Mbit": (200, 0.0), "1-Gbit": (1000, 0.0), "200-Mbit-5-ms": (200, 5e-3)}
"""Each a part. Megabits a second, and the delay of each way in seconds; 0: nothing is added to the machine's own."""

SIZES: Final = (2**10, 2**14, 2**18, 2**20, 2**22, 2**24, 2**26)
LOCAL: Final = (2, 4)
"""Ranks of a node."""

WAYS: Final = ("flat", "ours", "ours, bf16 across")
BUDGET_SECONDS: Final = 5.0
"""Of one size and way, at most; at least three turns."""

MOST_TURNS: Final = 200


def measure(quick: bool, parts: Sequence[str]) -> Iterator[Figure]:
    sizes = SIZES[1:5:3] if quick else SIZES
    for wire_name, (megabits, delay_seconds) in WIRES.items():
        if wire_name not in parts:
            continue
        for local in LOCAL[:1] if quick else LOCAL:
            with emulated_nodes(megabits, delay_seconds):
                found = run_nodes(local, sizes, quick=quick)
            yield from _figures(f"2 x {local}, {wire_name}", local, found, rate_bound=not delay_seconds)


def _figures(where: str, local: int, found: dict[str, Any], *, rate_bound: bool) -> Iterator[Figure]:
    theory = 2 * local / (2 * (2 * local - 1))
    for size, took in found["sizes"].items():
        flat = took["flat"]
        name = f"{where}, {_text(int(size))}"
        yield quartiles(f"{name}: flat", flat)
        yield ratio(f"{name}: ours ({found['forms'][size]}) over flat", took["ours"], flat, "<= 1.05")
        form = found["bf16 forms"][size]
        yield ratio(f"{name}: bf16 ({form}) over flat", took["ours, bf16 across"], flat, None)
    largest = max(found["sizes"], key=int)
    took = found["sizes"][largest]
    if rate_bound:
        whole = ratio("", took["ours"], took["flat"], None).value
        yield Figure(
            name=f"{where}: ours over flat at {_text(int(largest))}, over the theoretical ratio {theory:.3f}",
            value=whole / theory,
            unit="",
            asked="<= 1.10",
        )
    yield ratio(
        f"{where}: bf16 across over flat at {_text(int(largest))}",
        took["ours, bf16 across"],
        took["flat"],
        "<= 0.40" if rate_bound else None,
    )
    yield Figure(name=f"{where}: bf16's error, of the sum's spread", value=found["error"], unit="")
    step = found["step"]
    yield quartiles(f"{where}: step of a replicated model, flat", step["flat"])
    for way, asked in (("ours", "<= 0.80"), ("ours, bf16 across", "<= 0.42")):
        asked_here = asked if where.endswith("200-Mbit") else None
        yield ratio(f"{where}: step, {way} over flat", step[way], step["flat"], asked_here)
        late = "flat after the backward"
        yield ratio(f"{where}: step, {way} over {late}", step[way], step[late], None)


def _text(count: int) -> str:
    return f"{count // 2**20} MiB" if count >= 2**20 else f"{count // 2**10} KiB"


# Nodes ---------------------------------------------------------------------------------------------------------

NODES: Final = ("dougong-a", "dougong-b")
CARDS: Final = ("wire-a", "wire-b")


@contextlib.contextmanager
def emulated_nodes(megabits: int, delay_seconds: float) -> Iterator[None]:
    """Two namespaces with a wire between them.

    Raises:
        ConfigError: this machine does not permit it.
    """

    def ip(*arguments: str) -> None:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True)  # noqa: S603, S607, our own words
        if done.returncode:
            raise ConfigError(
                f"network namespaces are not permitted here: ip {' '.join(arguments)}: {done.stderr.strip()}"
            )

    if subprocess.run(["which", "ip", "tc"], capture_output=True).returncode:  # noqa: S607
        raise ConfigError("this benchmark needs ip and tc. Install iproute2.")
    with contextlib.ExitStack() as stack:
        for node in NODES:
            gone = ["ip", "netns", "del", node]
            subprocess.run(gone, capture_output=True)  # noqa: S603, what a run that was killed has left
            stack.callback(subprocess.run, gone, capture_output=True)
            ip("netns", "add", node)
        if delay_seconds:
            try:
                wire = Wire(
                    dict(zip(NODES, CARDS, strict=True)), bits_per_second=1e6 * megabits, delay_seconds=delay_seconds
                )
            except OSError as error:
                raise ConfigError(f"a wire with delay is not permitted here: {error}.") from None
            stack.callback(wire.close)  # before its namespaces go
        else:
            first, second = CARDS
            ip("link", "add", first, "netns", NODES[0], "type", "veth", "peer", "name", second, "netns", NODES[1])
        for place, (node, card) in enumerate(zip(NODES, CARDS, strict=True), start=1):
            address = f"10.83.0.{place}"
            if delay_seconds:
                other = f"10.83.0.{3 - place}"
                ip("-n", node, "addr", "add", address, "peer", other, "dev", card)
                ip("-n", node, "link", "set", card, "mtu", str(MTU), "up")
            else:
                ip("-n", node, "addr", "add", f"{address}/24", "dev", card)
                ip("-n", node, "link", "set", card, "up")
                ip("netns", "exec", node, "tc", "qdisc", "add", "dev", card, "root", "tbf", "rate", f"{megabits}mbit",
                   "burst", "256kb", "latency", "400ms")  # fmt: skip
            ip("-n", node, "link", "set", "lo", "up")
        yield


def run_nodes(local: int, sizes: tuple[int, ...], *, quick: bool) -> dict[str, Any]:
    """What the ranks of both nodes have measured."""
    nodes = [NODES[rank // local] for rank in range(2 * local)]
    environments = [
        {
            "LOCAL_WORLD_SIZE": str(local),
            "MASTER_ADDR": "10.83.0.1",
            "MASTER_PORT": "29583",
            "GLOO_SOCKET_IFNAME": CARDS[NODES.index(node)],
            "DOUGONG_SIZES": json.dumps(sizes),
            "DOUGONG_BUDGET": str(1.0 if quick else BUDGET_SECONDS),
        }
        for node in nodes
    ]
    found: dict[str, Any] = as_ranks(Path(__file__), environments, [["ip", "netns", "exec", node] for node in nodes])
    return found


# A rank --------------------------------------------------------------------------------------------------------


def as_rank() -> None:
    """One rank's part; the first one writes the result."""
    import torch
    import torch.distributed as dist

    from dougong.engine.parallel.hierarchical import Hierarchy, groups_in_nodes

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    rank, world, local = dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    budget = float(os.environ["DOUGONG_BUDGET"])
    groups = groups_in_nodes([list(range(world))], local)
    plain, rounded = Hierarchy(group, *groups), Hierarchy(group, *groups, wire="bf16")
    sizes = json.loads(os.environ["DOUGONG_SIZES"])
    plain.measure(sizes)
    rounded.measure(sizes)

    def ways(x: torch.Tensor) -> dict[str, Callable[[], None]]:
        return {
            "flat": lambda: dist.all_reduce(x),
            "ours": lambda: plain.all_reduce(x),
            "ours, bf16 across": lambda: rounded.all_reduce(x, name="measured"),
        }

    found: dict[str, Any] = {"sizes": {}, "forms": {}, "bf16 forms": {}}
    for size in sizes:
        x = torch.zeros(size // 4)
        found["sizes"][size] = _interleaved(ways(x), budget)
        found["forms"][size] = plain.form_of(size)
        found["bf16 forms"][size] = rounded.form_of(size)
    x = torch.randn(2**18, generator=torch.Generator().manual_seed(rank))
    exact, rough = x.clone(), x.clone()
    dist.all_reduce(exact)
    rounded.all_reduce(rough, form="scatter", name="error")
    found["error"] = ((rough - exact).abs().mean() / exact.std()).item()
    found["step"] = _steps(plain, rounded, budget)
    if rank == 0:
        Path(os.environ["DOUGONG_RESULT"]).write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def _interleaved(ways: dict[str, Callable[[], None]], budget: float) -> dict[str, list[float]]:
    """Seconds of each way, of the slowest rank, by turn."""
    import torch
    import torch.distributed as dist

    names = list(ways)
    took: dict[str, list[float]] = {way: [] for way in names}
    turns = 0
    while True:
        first = turns % len(names)
        for way in [*names[first:], *names[:first]]:
            dist.barrier()
            started = time.perf_counter()
            ways[way]()
            seconds = torch.tensor(time.perf_counter() - started)
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
            if turns:
                took[way].append(seconds.item())
        turns += 1
        if turns > 3 and (turns > MOST_TURNS or sum(map(sum, took.values())) > budget * len(ways)):
            return took


def _steps(plain: Any, rounded: Any, budget: float) -> dict[str, list[float]]:
    """A whole step of a small transformer, 3.2 million parameters, copies on all ranks, as the engine takes it: flat
    sums are on their way while the backward goes on, and those in levels come after it."""
    import torch
    import torch.distributed as dist
    from torch import nn

    from dougong.engine.parallel.early import EARLY_BYTES, EarlySums
    from dougong.engine.parallel.replicate import add_up
    from dougong.engine.step import TrainParts

    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    model: Any = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    x_BTD: Any = torch.randn(4, 32, 256)
    group = dist.group.WORLD
    assert group is not None
    early = EarlySums(list(model.parameters()), group, EARLY_BYTES)
    parts = TrainParts(model, lambda output, _: output.square().mean(), torch.optim.SGD(model.parameters()))

    def flat() -> None:
        model.zero_grad(set_to_none=True)
        early.settle(early.backward(parts, [x_BTD], 1))

    def step(by: Callable[[torch.Tensor, str], None] | None) -> None:
        model.zero_grad(set_to_none=True)
        model(x_BTD).square().mean().backward()
        add_up([p.grad for p in model.parameters() if p.grad is not None], group, by=by)

    return _interleaved(
        {
            "flat": flat,
            "flat after the backward": lambda: step(None),
            "ours": lambda: step(lambda flat, name: plain.all_reduce(flat, name=name)),
            "ours, bf16 across": lambda: step(lambda flat, name: rounded.all_reduce(flat, name=f"step {name}")),
        },
        budget,
    )


if __name__ == "__main__":
    if "--as-rank" in sys.argv:
        as_rank()
    else:
        run(
            "hierarchical",
            "Two-level all-reduce against a flat one, on two emulated nodes.",
            measure,
            parts=tuple(WIRES),
        )
