"""Faults planted in small loops, each found with its cause and place; and healthy loops, in which nothing is."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dougong.watch.diagnose.catalogue import CATALOGUE
from dougong.watch.diagnose.history import History
from dougong.watch.diagnose.hook import Watched, watch
from dougong.watch.diagnose.rules import EXPLAINED, Finding, _data, _examined


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 32)
        self.middle = nn.Linear(32, 32)
        self.last = nn.Linear(32, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = functional.relu(self.first(x + 0.3 * y))
        found: Tensor = self.last(functional.relu(self.middle(hidden)))
        return found


def loop(
    steps: int = 70,
    change: Callable[[Net], None] = lambda model: None,
    batch: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = lambda x, y, t: (x, y, t),
    loss_of: Callable[[Tensor, Tensor], Tensor] = functional.cross_entropy,
    clears: bool = True,
    held: Callable[[Net], list[nn.Parameter]] = lambda model: list(model.parameters()),
    **settings: Any,
) -> list[Finding]:
    model = Net()
    change(model)
    optimizer = torch.optim.AdamW(held(model), **{"lr": 5e-3, **settings})
    generator = torch.Generator().manual_seed(0)
    watched = watch(model, optimizer, total_steps=steps)
    for _ in range(steps):
        x, y = torch.randn(32, 8, generator=generator), torch.randn(32, 8, generator=generator)
        x, y, target = batch(x, y, (x + 0.3 * y)[:, :4].argmax(dim=1))
        if clears:
            optimizer.zero_grad()
        loss = loss_of(model(x, y), target)
        loss.backward()
        optimizer.step()
        watched.step(loss)
    watched.close()
    return watched.findings()


@pytest.mark.parametrize("settings", [{}, {"lr": 2e-3, "weight_decay": 0.1}, {"lr": 1e-2, "betas": (0.8, 0.99)}])
def test_nothing_is_found_where_nothing_is_wrong(settings: dict[str, Any]) -> None:
    assert loop(**settings) == []


def freeze(model: Net) -> None:
    model.middle.requires_grad_(False)


def kill(model: Net) -> None:
    with torch.no_grad():
        model.middle.bias.fill_(-50.0)


def constant(model: Net) -> None:
    nn.init.constant_(model.first.weight, 0.1)


@pytest.mark.parametrize(
    ("cause", "place", "given"),
    [
        ("learning rate too high", "optimizer", {"lr": 3.0}),
        ("learning rate too low", "optimizer", {"lr": 1e-8}),
        ("gradients not cleared", "optimizer", {"clears": False}),
        ("goes uphill", "optimizer", {"maximize": True}),
        ("weight decay too high", "optimizer", {"weight_decay": 20.0}),
        ("optimizer memory", "optimizer", {"eps": 1.0}),
        ("frozen", "middle", {"change": freeze}),
        ("dead units", "", {"change": kill}),
        ("initialisation constant", "first", {"change": constant}),
        ("not in the optimizer", "last", {"held": lambda m: [*m.first.parameters(), *m.middle.parameters()]}),
        ("softmax twice", "loss", {"loss_of": lambda s, t: functional.cross_entropy(s.softmax(1), t)}),
        ("loss sign", "loss", {"loss_of": lambda s, t: -functional.cross_entropy(s, t)}),
        ("normalisation", "x", {"batch": lambda x, y, t: (x * 200, y, t)}),
        ("constant input", "x", {"batch": lambda x, y, t: (x * 0, y, t)}),
        ("not shuffled", "data", {"batch": lambda x, y, t: (x, y, t * 0 + 1)}),
    ],
)
def test_a_planted_fault_is_found_with_its_place(cause: str, place: str, given: dict[str, Any]) -> None:
    found = loop(**given)

    assert found
    assert found[0].cause == cause
    assert found[0].place == place or not place
    assert found[0].evidence


@pytest.mark.parametrize(("kind", "rate"), [(torch.optim.AdamW, 3e-3), (torch.optim.SGD, 0.1)])
@pytest.mark.parametrize("slow", [1.0, 1e-3])
def test_a_part_that_has_a_far_lower_rate_is_found_and_one_with_the_same_is_not(
    kind: Any, rate: float, slow: float
) -> None:
    model = Net()
    rest = [*model.middle.parameters(), *model.last.parameters()]
    optimizer = kind([{"params": rest, "lr": rate}, {"params": model.first.parameters(), "lr": slow * rate}])
    watched = watch(model, optimizer, total_steps=64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        x, y = torch.randn(32, 8, generator=generator), torch.randn(32, 8, generator=generator)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x, y), (x + 0.3 * y)[:, :4].argmax(dim=1))
        loss.backward()
        optimizer.step()
        watched.step(loss)
    watched.close()

    expected = [("imbalance", "first")] if slow < 1 else []
    assert [(each.cause, each.place) for each in watched.findings()] == expected


def test_records_that_are_not_finite_are_found_by_input_at_once() -> None:
    def spoil(x: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y[3, 0] = math.nan
        return x, y, t

    found = loop(steps=3, batch=spoil)

    assert (found[0].cause, found[0].place, found[0].step) == ("not finite in records", "y", 1)


def test_a_module_of_which_nobody_takes_a_gradient_is_found() -> None:
    class Cut(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            with torch.no_grad():
                hidden = functional.relu(self.first(x + y))
            found: Tensor = self.last(functional.relu(self.middle(hidden)))
            return found

    model = Cut()
    optimizer = torch.optim.AdamW(model.parameters())
    watched = watch(model, optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(torch.randn(8, 8), torch.randn(8, 8)), torch.arange(8) % 4)
        loss.backward()
        optimizer.step()
        watched.step(loss)

    assert (watched.findings()[0].cause, watched.findings()[0].place) == ("gradient cut", "first")


def test_an_error_is_placed_where_it_was_raised() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(RuntimeError), Watched(model, optimizer) as watched:
        model(torch.randn(4, 7), torch.randn(4, 7))

    assert (watched.findings()[0].cause, watched.findings()[0].place) == ("crash", "first")


def test_every_cause_that_explains_or_is_explained_is_in_the_catalogue() -> None:
    named = {cause for explained, causes in EXPLAINED.items() for cause in (explained, *causes)}

    assert named <= set(CATALOGUE)
    assert sum(fault.multimodal for fault in CATALOGUE.values()) >= 10


def test_a_modality_is_not_called_absent_while_batches_may_take_turns() -> None:
    def flow(number: int, present: float) -> dict[str, Any]:
        return {"step": 2**number, "inputs": {"tone": {"rows": 8.0, "present": present}}}

    lacking = [flow(number, 0.0) for number in range(6)]

    assert [found.cause for found in _data(History(flows=lacking[:5]))] == []
    assert {found.cause for found in _data(History(flows=lacking))} == {"never present"}
    assert [found.cause for found in _data(History(flows=[*lacking, flow(7, 0.5)]))] == []


@pytest.mark.parametrize(
    ("loss", "accuracy", "later", "found"),
    [
        (0.05, 0.5, 0.05, True),  # told in training, and not where it is judged
        (1.0, 0.5, 1.0, False),  # not learnt yet, by anybody
        (0.65, 0.5, 0.65, False),  # learnt as well as it is judged
        (1.0, 0.5, 0.05, False),  # learnt since it was judged
        (0.05, 0.9, 0.05, False),
        (1.4, 0.15, 1.4, False),  # guessed, by both
        (0.05, 0.02, 0.05, False),  # far less often right than by chance: other targets
    ],
)
def test_what_one_input_tells_leaks_only_where_training_has_learnt_it(
    loss: float, accuracy: float, later: float, found: bool
) -> None:
    pairs = {"photo": {"at 0": 0.9, "chance": 0.05, "right": 0.98}}
    history = History(
        total_steps=100, steps=[*range(1, 61)], losses=[loss] * 40 + [later] * 20, learning_rates=[1e-3] * 60
    )
    history.add({"kind": "Examined", "step": 24, "rows": 384, "pairs": pairs, "still_norms": []})
    history.add({"kind": "Evaluated", "step": 40, "metrics": {"accuracy": accuracy}})
    history.flows = [{"output": {"classes": 4.0}}]

    leaks = [one for one in _examined(history) if one.cause == "target leak"]

    assert [one.place for one in leaks] == (["photo"] if found else [])
