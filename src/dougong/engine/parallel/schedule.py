"""Who computes what, and in which order, when a model's blocks are spread over several ranks.

Here        Action, the tables of five schedules, and how long one takes (`timeline`); no tensor and no process.
Elsewhere   carrying a table out (pipeline.py); choosing one (engine/planner/).
Promise     in every table each stage meets each micro-batch exactly once in each direction, and carried out in order on
            every rank nothing waits for what can never come: `timeline` of it ends.

gpipe        all forwards, then all backwards (Huang et al. 2018, arXiv:1811.06965).
1f1b         one forward, one backward in turn, so that a rank holds no more than it must (Narayanan et al. 2021,
             arXiv:2104.04473).
interleaved  the same with several stages to a rank, which are shorter, and so is the bubble (the same).
zbv          two stages to a rank, laid out as a V; a backward is cut in two, and what only weights need fills the
             bubble (Qi et al. 2023, arXiv:2401.10241; 2024, arXiv:2405.15362). Ours is made by list scheduling: any
             number of micro-batches fits, and so do stages of unequal cost.
dualpipev    two stages to a rank as a V, a forward beside each backward (DeepSeek-AI 2024, arXiv:2412.19437, in its
             form with one copy of the weights).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Final, Literal, NamedTuple, get_args

from dougong.core.errors import ConfigError

Schedule = Literal["gpipe", "1f1b", "interleaved", "zbv", "dualpipev"]
SCHEDULES: Final[tuple[Schedule, ...]] = get_args(Schedule)
V_SHAPED: Final[tuple[Schedule, ...]] = ("zbv", "dualpipev")

Kind = Literal["forward", "backward", "input", "weight"]
"""input and weight are a backward cut in two: first what the stage before waits for, then what only weights need."""


class Action(NamedTuple):
    """One micro-batch through one stage, in one direction."""

    kind: Kind
    stage: int
    batch: int


Table = list[list[Action]]
"""By rank, in order."""


class Span(NamedTuple):
    """When an action was carried out."""

    action: Action
    start: float
    end: float


Cost = Callable[[int, Kind], float]
"""Seconds of a stage's action."""


def even_cost(stage: int, kind: Kind) -> float:
    """A forward, and each half of a backward, take as long."""
    return 2.0 if kind == "backward" else 1.0


def rank_of_stage(schedule: Schedule, num_ranks: int, stages_per_rank: int) -> list[int]:
    """Where each stage lives: rank after rank in turns, or there and back."""
    if schedule in V_SHAPED:
        return [*range(num_ranks), *reversed(range(num_ranks))]
    return [stage % num_ranks for stage in range(num_ranks * stages_per_rank)]


def check_schedule(schedule: Schedule, num_ranks: int, stages_per_rank: int, num_batches: int) -> None:
    """
    Raises:
        ConfigError: this schedule cannot be made; the message says what can.
    """
    if schedule in V_SHAPED and stages_per_rank != 2:
        raise ConfigError(f"schedule {schedule} has 2 stages on each rank, not {stages_per_rank}. Use chunks: 2.")
    if schedule in ("gpipe", "1f1b") and stages_per_rank != 1:
        raise ConfigError(
            f"schedule {schedule} has 1 stage on each rank, not {stages_per_rank}. Use chunks: 1, or interleaved."
        )
    if schedule == "dualpipev" and num_batches < 2 * num_ranks:
        raise ConfigError(
            f"schedule dualpipev on {num_ranks} ranks needs {2 * num_ranks} micro-batches or more, and there are "
            f"{num_batches}. Use accumulation: {2 * num_ranks}, or zbv."
        )


def make_table(
    schedule: Schedule, num_ranks: int, stages_per_rank: int, num_batches: int, cost: Cost = even_cost
) -> Table:
    """What each rank does, in order.

    Raises:
        ConfigError: this schedule cannot be made; the message says what can.
    """
    check_schedule(schedule, num_ranks, stages_per_rank, num_batches)
    if schedule == "zbv":
        return _zbv(num_ranks, num_batches, cost)
    make = {
        "gpipe": _gpipe,
        "1f1b": _one_forward_one_backward,
        "interleaved": lambda rank, ranks, batches: _interleaved(rank, ranks, stages_per_rank, batches),
        "dualpipev": _dualpipev,
    }[schedule]
    return [make(rank, num_ranks, num_batches) for rank in range(num_ranks)]


def _gpipe(rank: int, num_ranks: int, num_batches: int) -> list[Action]:
    forwards = [Action("forward", rank, batch) for batch in range(num_batches)]
    return forwards + [Action("backward", rank, batch) for batch in range(num_batches)]


def _one_forward_one_backward(rank: int, num_ranks: int, num_batches: int) -> list[Action]:
    forwards = [Action("forward", rank, batch) for batch in range(num_batches)]
    backwards = [Action("backward", rank, batch) for batch in range(num_batches)]
    return _in_turns(forwards, backwards, ahead=num_ranks - rank - 1)


def _interleaved(rank: int, num_ranks: int, chunks: int, num_batches: int) -> list[Action]:
    """At least as many micro-batches as ranks go through one chunk, then through the next."""
    rounds = max(1, num_batches // num_ranks)
    bounds = [num_batches * place // rounds for place in range(rounds + 1)]
    groups = [range(first, last) for first, last in pairwise(bounds)]
    stages = [chunk * num_ranks + rank for chunk in range(chunks)]
    forwards = [Action("forward", stage, batch) for group in groups for stage in stages for batch in group]
    backwards = [Action("backward", stage, batch) for group in groups for stage in stages[::-1] for batch in group]
    longest = max(len(group) for group in groups)
    return _in_turns(forwards, backwards, ahead=2 * (num_ranks - rank - 1) + (chunks - 1) * longest)


def _in_turns(forwards: list[Action], backwards: list[Action], *, ahead: int) -> list[Action]:
    """So many forwards, then one of each in turn."""
    table = forwards[:ahead]
    for forward, backward in zip(forwards[ahead:], backwards, strict=False):
        table += [forward, backward]
    return table + backwards[max(0, len(forwards) - ahead) :]


def _dualpipev(rank: int, num_ranks: int, num_batches: int) -> list[Action]:
    """In DeepSeek's eight steps."""
    down, up = rank, 2 * num_ranks - 1 - rank
    made: list[Action] = []
    next_batch = {(kind, stage): 0 for kind in ("forward", "backward") for stage in (down, up)}
    owed: list[Action] = []

    def add(kind: Kind, stage: int) -> None:
        direction = "forward" if kind == "forward" else "backward"
        batch = next_batch[direction, stage]
        next_batch[direction, stage] += 1
        made.append(Action(kind, stage, batch))
        if kind == "input":
            owed.append(Action("weight", stage, batch))

    def add_owed() -> None:
        if owed:
            made.append(owed.pop(0))

    for _ in range(2 * (num_ranks - rank - 1)):
        add("forward", down)
    for _ in range(rank + 1):
        add("forward", down)
        add("forward", up)
    for _ in range(num_ranks - rank - 1):
        add("input", up)
        add_owed()
        add("forward", up)
    for _ in range(num_batches - 2 * num_ranks + rank + 1):
        add("forward", down)
        add("backward", up)
        add("forward", up)
        add("backward", down)
    for _ in range(num_ranks - rank - 1):
        add("backward", up)
        add("forward", up)
        add("backward", down)
    late = False
    for place in range(rank + 1):
        # From the middle on, what only weights need is put off until there is nothing else to do.
        late = late or (place == (rank + 1) // 2 and rank % 2 == 1)
        add("input" if late else "backward", up)
        late = late or place == (rank + 1) // 2
        add("input" if late else "backward", down)
    for _ in range(num_ranks - rank - 1):
        add_owed()
        add("input" if late else "backward", down)
    while owed:
        add_owed()
    return made


def _zbv(num_ranks: int, num_batches: int, cost: Cost) -> Table:
    """The shortest of what three orders of urgency make; none of them is best for all sizes."""
    place = rank_of_stage("zbv", num_ranks, 2)
    made = [_listed(num_ranks, num_batches, cost, urgency) for urgency in _URGENCIES]
    return min(made, key=lambda table: max(row[-1].end for row in timeline(table, place, cost)))


_URGENCIES: Final[tuple[tuple[tuple[Kind, int], ...], ...]] = (
    (("input", 1), ("input", 0), ("forward", 1), ("forward", 0), ("weight", 1), ("weight", 0)),
    (("forward", 1), ("input", 1), ("input", 0), ("forward", 0), ("weight", 1), ("weight", 0)),
    (("input", 0), ("input", 1), ("forward", 1), ("forward", 0), ("weight", 0), ("weight", 1)),
)
"""What a rank that is free takes first, on its way down (0) or up (1)."""


def _listed(num_ranks: int, num_batches: int, cost: Cost, urgencies: Sequence[tuple[Kind, int]]) -> Table:
    """List scheduling: whoever is free takes what others wait for first; weights when there is nothing else.

    A rank holds the activations of no more micro-batches, counted by stage, than 1F1B's first rank: 2 * num_ranks.
    """
    num_stages = 2 * num_ranks
    place = rank_of_stage("zbv", num_ranks, 2)
    ended: dict[Action, float] = {}
    free = [0.0] * num_ranks
    held = [0] * num_ranks
    table: Table = [[] for _ in range(num_ranks)]
    following = {(kind, stage): 0 for kind in ("forward", "input", "weight") for stage in range(num_stages)}
    left = 3 * num_stages * num_batches

    def ready(kind: Kind, stage: int) -> float | None:
        """When the stage's next action of this kind may start; None while that is not known."""
        batch = following[kind, stage]
        if batch == num_batches:
            return None
        needed = _needs(Action(kind, stage, batch), num_stages, cut=True)
        if any(action not in ended for action in needed):
            return None
        return max([ended[action] for action in needed], default=0.0)

    while left:
        choices: list[tuple[float, int, int, int, Action]] = []
        for rank in range(num_ranks):
            for urgency, (kind, way) in enumerate(urgencies):
                stage = 2 * num_ranks - 1 - rank if way else rank
                when = ready(kind, stage)
                if when is None or (kind == "forward" and held[rank] >= _room(stage, num_ranks)):
                    continue
                start = max(when, free[rank])
                choices.append((start, urgency, rank, stage, Action(kind, stage, following[kind, stage])))
        start, _, rank, stage, action = min(choices)
        ended[action] = free[rank] = start + cost(stage, action.kind)
        table[place[stage]].append(action)
        following[action.kind, stage] += 1
        held[rank] += {"forward": 1, "input": 0, "weight": -1}.get(action.kind, 0)
        left -= 1
    return table


def _room(stage: int, num_ranks: int) -> int:
    """The way down may not take the last place: what is under way could then never come up and be let go."""
    return 2 * num_ranks - 1 if stage < num_ranks else 2 * num_ranks


def _needs(action: Action, num_stages: int, *, cut: bool) -> list[Action]:
    """What must be done before; `cut`: whether the stage after cuts its backwards in two."""
    kind, stage, batch = action
    if kind == "forward":
        return [Action("forward", stage - 1, batch)] if stage else []
    if kind == "weight":
        return [Action("input", stage, batch)]
    own = [Action("forward", stage, batch)]
    if stage == num_stages - 1:
        return own
    return [*own, Action("input" if cut else "backward", stage + 1, batch)]


def timeline(
    table: Table,
    place: Sequence[int],
    cost: Cost = even_cost,
    send_seconds: Callable[[int, int], float] = lambda stage, to: 0.0,
) -> list[list[Span]]:
    """When each rank does what, if each begins its next action as soon as what that needs is there.

    `place` is each stage's rank; `send_seconds` how long a stage's state, or its gradient, is on its way to another
    rank's stage, beside the work.

    Raises:
        ValueError: the ranks wait for each other forever.
    """
    ended: dict[Action, float] = {}
    spans: list[list[Span]] = [[] for _ in table]
    left = [list(reversed(actions)) for actions in table]
    inputs = {(action.stage, action.batch) for actions in table for action in actions if action.kind == "input"}
    num_stages = len(place)
    while any(left):
        moved = False
        for rank, waiting in enumerate(left):
            while waiting:
                action = waiting[-1]
                needed = [
                    Action("input", *other[1:]) if other.kind == "backward" and other[1:] in inputs else other
                    for other in _needs(action, num_stages, cut=False)
                ]
                if any(other not in ended for other in needed):
                    break
                start = max(
                    [span.end for span in spans[rank][-1:]]
                    + [
                        ended[other] + (send_seconds(other.stage, action.stage) if place[other.stage] != rank else 0.0)
                        for other in needed
                    ],
                    default=0.0,
                )
                ended[action] = start + cost(action.stage, action.kind)
                spans[rank].append(Span(action, start, ended[action]))
                waiting.pop()
                moved = True
        if not moved:
            raise ValueError(f"rank {next(r for r, w in enumerate(left) if w)} waits forever")
    return spans


def bubble(spans: list[list[Span]]) -> float:
    """Share of all ranks' time in which they do nothing."""
    whole = max(span.end for row in spans for span in row) * len(spans)
    return 1.0 - sum(span.end - span.start for row in spans for span in row) / whole


def most_held(actions: Sequence[Action]) -> int:
    """Stages' micro-batches whose activations a rank holds at once, at most."""
    held = most = 0
    for action in actions:
        held += {"forward": 1, "backward": -1, "weight": -1, "input": 0}[action.kind]
        most = max(most, held)
    return most


def messages(table: Table, place: Sequence[int]) -> Iterator[tuple[int, int, Action]]:
    """(from, to, what is done with it there), each pair's in the order in which they are sent."""
    for rank, actions in enumerate(table):
        for kind, stage, batch in actions:
            if kind == "forward" and stage + 1 < len(place) and place[stage + 1] != rank:
                yield rank, place[stage + 1], Action("forward", stage + 1, batch)
            if kind in ("backward", "input") and stage and place[stage - 1] != rank:
                yield rank, place[stage - 1], Action("backward", stage - 1, batch)
