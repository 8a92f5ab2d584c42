"""Who computes what, and in which order, when a model's blocks are spread over several ranks.

Here        Action, the tables of five schedules, and how long one takes (`timeline`, `span_times`); no tensor.
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

import functools
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
    last = 2 * num_ranks - 1
    place = rank_of_stage("zbv", num_ranks, 2)
    # By stage, when each micro-batch's action had ended.
    ended: dict[Kind, list[list[float]]] = {kind: [[] for _ in place] for kind in ("forward", "input", "weight")}
    free = [0.0] * num_ranks
    held = [0] * num_ranks
    table: Table = [[] for _ in range(num_ranks)]

    def ready(kind: Kind, stage: int) -> float | None:
        """When the stage's next action of this kind may start; None while that is not known."""
        batch = len(ended[kind][stage])
        if batch == num_batches:
            return None
        needed = []
        if kind == "weight":
            needed = [ended["input"][stage]]
        elif kind == "forward" and stage:
            needed = [ended["forward"][stage - 1]]
        elif kind == "input":
            needed = [ended["forward"][stage]]
            if stage < last:
                needed.append(ended["input"][stage + 1])
        if any(len(done) <= batch for done in needed):
            return None
        return max([done[batch] for done in needed], default=0.0)

    def best(rank: int) -> tuple[float, int, int, int, Action] | None:
        """What this rank would do next."""
        choices = []
        for urgency, (kind, way) in enumerate(urgencies):
            stage = last - rank if way else rank
            if kind == "forward" and held[rank] >= _room(stage, num_ranks):
                continue
            when = ready(kind, stage)
            if when is not None:
                action = Action(kind, stage, len(ended[kind][stage]))
                choices.append((max(when, free[rank]), urgency, rank, stage, action))
        return min(choices, default=None)

    next_of = [best(rank) for rank in range(num_ranks)]
    while choices := [choice for choice in next_of if choice is not None]:
        start, _, rank, stage, action = min(choices)
        free[rank] = start + cost(stage, action.kind)
        ended[action.kind][stage].append(free[rank])
        table[rank].append(action)
        held[rank] += {"forward": 1, "input": 0, "weight": -1}.get(action.kind, 0)
        # Nothing has changed for those that neither work nor wait for this stage.
        for near in {rank, place[max(0, stage - 1)], place[min(last, stage + 1)]}:
            next_of[near] = best(near)
    return table


def _room(stage: int, num_ranks: int) -> int:
    """The way down may not take the last place: what is under way could then never come up and be let go."""
    return 2 * num_ranks - 1 if stage < num_ranks else 2 * num_ranks


class Course(NamedTuple):
    """A table in an order in which it can be carried out, whatever anything costs."""

    actions: list[Action]
    ranks: list[int]
    before: list[int]
    """What the same rank has done just before, by its place here; -1: nothing."""

    needs: list[list[tuple[int, bool]]]
    """What else must be done before, by its place here; and whether it must be sent from another rank."""


def course_of(table: Table, place: Sequence[int]) -> Course:
    """`place` is each stage's rank.

    Raises:
        ValueError: the ranks wait for each other forever.
    """
    last = len(place) - 1
    cut = {(action.stage, action.batch) for actions in table for action in actions if action.kind == "input"}

    def needed(action: Action) -> list[tuple[str, int, int]]:
        kind, stage, batch = action
        if kind == "forward":
            return [("forward", stage - 1, batch)] if stage else []
        if kind == "weight":
            return [("input", stage, batch)]
        own = ("forward", stage, batch)
        if stage == last:
            return [own]
        return [own, ("input" if (stage + 1, batch) in cut else "backward", stage + 1, batch)]

    found: dict[tuple[str, int, int], int] = {}
    course = Course([], [], [], [])
    done, before = [0] * len(table), [-1] * len(table)
    # Ranks that may be able to go on: at first all, then those to which another has given something.
    waiting = dict.fromkeys(range(len(table)))
    while waiting:
        rank = next(iter(waiting))
        del waiting[rank]
        for action in table[rank][done[rank] :]:
            needs = needed(action)
            if any(each not in found for each in needs):
                break
            course.needs.append([(found[each], place[each[1]] != rank) for each in needs])
            course.before.append(before[rank])
            course.ranks.append(rank)
            before[rank] = found[action] = len(course.actions)
            course.actions.append(action)
            done[rank] += 1
            for near in (action.stage - 1, action.stage + 1):
                if 0 <= near <= last and place[near] != rank:
                    waiting[place[near]] = None
    if any(count < len(actions) for count, actions in zip(done, table, strict=True)):
        stuck = next(rank for rank, actions in enumerate(table) if done[rank] < len(actions))
        raise ValueError(f"rank {stuck} waits forever")
    return course


def _at_once(stage: int, to: int) -> float:
    return 0.0


def span_times(
    course: Course, cost: Cost = even_cost, send_seconds: Callable[[int, int], float] = _at_once
) -> tuple[list[float], list[float]]:
    """When each action begins and ends, if each rank begins its next as soon as what that needs is there.

    `send_seconds` is how long a stage's state, or its gradient, is on its way to another rank's stage, beside the work.
    """
    took = {(kind, stage): cost(stage, kind) for kind, stage in {(a.kind, a.stage) for a in course.actions}}
    sent = functools.cache(send_seconds)
    starts: list[float] = []
    ends: list[float] = []
    for action, before, needs in zip(course.actions, course.before, course.needs, strict=True):
        start = ends[before] if before >= 0 else 0.0
        for needed, far in needs:
            there = ends[needed] + (sent(course.actions[needed].stage, action.stage) if far else 0.0)
            start = max(start, there)
        starts.append(start)
        ends.append(start + took[action.kind, action.stage])
    return starts, ends


def timeline(
    table: Table,
    place: Sequence[int],
    cost: Cost = even_cost,
    send_seconds: Callable[[int, int], float] = _at_once,
) -> list[list[Span]]:
    """When each rank does what.

    Raises:
        ValueError: the ranks wait for each other forever.
    """
    course = course_of(table, place)
    spans: list[list[Span]] = [[] for _ in table]
    for action, rank, start, end in zip(
        course.actions, course.ranks, *span_times(course, cost, send_seconds), strict=True
    ):
        spans[rank].append(Span(action, start, end))
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
