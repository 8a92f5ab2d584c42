"""Pairs that are shifted, a target that was written into an input, and norms that learn no statistics; and what is said
of pairs that are right."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from dougong.cli.main import main
from dougong.engine.examine import LEAST, Examined, Examiner, examine, score_pairs
from dougong.nn.batch import Batch, MediaBatch
from dougong.watch.diagnose.history import History
from dougong.watch.diagnose.hook import Watched, watch
from dougong.watch.diagnose.rules import diagnose

Change = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm, self.two = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(12, 16)
        self.last = nn.Linear(32, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = self.last(torch.cat([self.norm(self.one(x)), functional.relu(self.two(y))], dim=1))
        return found


def train(change: Change, steps: int = 30, model: Net | None = None, judged: float | None = None) -> Watched:
    """Targets that x and y each tell one half of."""
    model = model or Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    watched = watch(model, optimizer, total_steps=200)
    for _ in range(steps):
        x, y = torch.randn(24, 8, generator=generator), torch.randn(24, 12, generator=generator)
        target = 2 * (x[:, 0] > 0).long() + (y[:, 0] > 0).long()
        x, y = change(x, y, target)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x, y), target)
        loss.backward()
        optimizer.step()
        watched.step(loss)
    if judged is not None:
        watched.judged(accuracy=judged)
    watched.close()
    return watched


@pytest.mark.parametrize("shift", [-2, -1, 1, 2])
def test_pairs_that_are_shifted_are_found_with_input_and_distance(shift: int) -> None:
    watched = train(lambda x, y, _: (x, y.roll(-shift, dims=0)))

    found = watched.findings()[0]
    assert (found.cause, found.place) == ("swapped pairs", "y")
    where = f"the record {abs(shift)} {'after' if shift > 0 else 'before'} it"
    assert where in found.evidence


def test_nothing_is_said_of_pairs_that_are_right_or_that_tell_nothing() -> None:
    assert train(lambda x, y, _: (x, y)).findings() == []
    noise = torch.Generator().manual_seed(9)
    assert train(lambda x, y, _: (x, torch.randn(24, 12, generator=noise))).findings() == []


def test_a_target_in_an_input_is_found_where_judging_does_not_agree() -> None:
    def leak(x: Tensor, y: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.cat([y[:, :8], 4.0 * functional.one_hot(target, 4)], dim=1)

    found = {(each.cause, each.place) for each in train(leak, steps=90, judged=0.4).findings()}
    assert ("target leak", "y") in found
    # What is as easy where it is judged is easy, and no leak; and before it is learnt, nobody can know.
    for steps, judged in ((90, 0.97), (27, 0.4)):
        assert not any(each.cause == "target leak" for each in train(leak, steps=steps, judged=judged).findings())


def test_norms_without_a_momentum_are_found() -> None:
    model = Net()
    model.norm.momentum = 0.0

    found = train(lambda x, y, _: (x, y), model=model).findings()
    assert ("norm statistics", "norm") in {(each.cause, each.place) for each in found}


def test_training_is_the_same_with_and_without_and_nothing_stays_hooked() -> None:
    def weights(watching: bool) -> tuple[Tensor, int]:
        model, dropped = Net(), nn.Dropout(0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        examiner = Examiner(model) if watching else None
        torch.manual_seed(1)
        for _ in range(20):
            x, y = torch.randn(24, 8), torch.randn(24, 12)
            optimizer.zero_grad()
            functional.cross_entropy(model(dropped(x), y), (x[:, 0] > 0).long()).backward()
            optimizer.step()
            if examiner is not None:
                examiner.step()
        return model.last.weight.detach(), len(model._forward_pre_hooks)

    (plain, _), (watched, hooks) = weights(False), weights(True)
    torch.testing.assert_close(watched, plain, rtol=0, atol=0)
    assert hooks == 0


def test_targets_that_are_not_records_are_not_scored() -> None:
    """Of a model that tells every word's next one."""
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 9))
    examiner = Examiner(model)
    told: list[Examined] = []
    for _ in range(12):
        ids = torch.randint(9, (4, 6))
        functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        if (found := examiner.step()) is not None:
            told.append(found)

    assert [(each.rows, each.pairs) for each in told] == [(0, {})]


def test_of_too_few_records_or_one_class_nothing_is_said() -> None:
    rows = [torch.randn(8, 3) for _ in range(LEAST // 8)]
    targets = [torch.randint(3, (8,)) for _ in rows]

    assert score_pairs(rows, targets)
    assert score_pairs(rows[:-1], targets[:-1]) == {}
    assert score_pairs(rows, [torch.zeros_like(each) for each in targets]) == {}
    assert score_pairs([torch.ones(8, 3)] * len(rows), targets) == {}


def test_rows_whose_length_differs_from_batch_to_batch_are_asked_all_the_same() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(2, 2)

        def forward(self, ids: Tensor, sound: Tensor) -> Tensor:
            found: Tensor = self.last(torch.stack([ids.float().mean(dim=1), sound.mean(dim=1)], dim=1))
            return found

    model = Reads()
    examiner = Examiner(model)
    told: list[Examined] = []
    for step in range(24):
        target = torch.arange(24) % 2
        ids = torch.randint(3, 30, (24, 4 + step % 5))
        ids[:, 0] = 1 + target
        sound = torch.randn(24, 40 + 60 * (step % 4)) + target[:, None]
        functional.cross_entropy(model(ids, sound), target).backward()
        if (found := examiner.step()) is not None:
            told.append(found)

    # Sounds that are too short to be averaged into as many numbers as the first had are left out, with their batches.
    assert [set(each.pairs) for each in told] == [{"ids", "sound"}]
    assert told[0].pairs["ids"]["right"] > 0.95


def batches(shift: int) -> list[Batch]:
    """Numbers of which the first tells a class, of the record so far before."""
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(20):
        x = torch.randn(24, 6, generator=generator)
        target = (x[:, 0] > 0).long()
        every, there = torch.arange(24), torch.ones(24).bool()
        found.append(Batch({"table": MediaBatch({"numbers_UF": x.roll(shift, dims=0)}, every, there)}, target))
    return found


def test_records_in_a_tables_own_order_are_asked_without_a_network() -> None:
    right, shifted = examine(batches(0)), examine(batches(1))

    assert right.rows == shifted.rows == 384
    assert right.pairs["table"]["at 0"] > 0.5 > 0.2 > abs(right.pairs["table"]["at -1"])
    assert shifted.pairs["table"]["at -1"] > 0.5 > 0.2 > abs(shifted.pairs["table"]["at 0"])
    history = History()
    history.add(shifted)
    assert [(each.cause, each.place) for each in diagnose(history)] == [("swapped pairs", "table")]
    assert examine([batch._replace(target=None) for batch in batches(0)]).pairs == {}


def test_a_runs_own_records_are_asked_where_that_is_wanted(
    colour_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diagnose", str(colour_run), "--records", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert not [each for each in told["findings"] if each["cause"] in ("swapped pairs", "target leak")]

    (tmp_path / "events.jsonl").write_text("", encoding="utf-8")
    assert main(["diagnose", str(tmp_path), "--records"]) == 2
    assert "is no run of a recipe that decides" in capsys.readouterr().err
