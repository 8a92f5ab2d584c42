import math
from pathlib import Path
from typing import Any

import pytest
import torch
from stacks import batches, build, loss_of
from tiny_run import TinyLoader, TinyModel, tiny_loss
from torch import Tensor, nn
from torch.nn import functional

from dougong.core.events import read_events
from dougong.data.position import WHOLE
from dougong.engine.flow.meter import FlowConfig, FlowMeter
from dougong.engine.flow.step import FlowMeasured
from dougong.engine.listening import Listening
from dougong.engine.trainer import TrainConfig, train


class Plain(nn.Module):
    """A network as anyone would write it."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.dropout(functional.relu(self.norm(self.first(x)))))
        return found


def trained(
    meter: FlowConfig | None, steps: int = 9, dropout: float = 0.3
) -> tuple[Plain, list[float], list[FlowMeasured]]:
    model = Plain(dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    watching = None if meter is None else FlowMeter(model, optimizer, meter)
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(1)
    losses, measured = [], []
    for _ in range(steps):
        x = torch.randn(8, 6, generator=generator)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), x[:, :3].argmax(dim=1))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if watching is not None and (found := watching.step(losses[-1])) is not None:
            measured.append(found)
    if watching is not None:
        watching.close()
    return model, losses, measured


def test_measuring_changes_no_number_of_training() -> None:
    plain, losses, _ = trained(None)
    watched, same, measured = trained(FlowConfig(every=2, probe_every=2))

    assert same == losses
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(watched.state_dict()[name], value, rtol=0, atol=0)
    assert len(measured) == 5
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in watched.modules())


def test_steps_that_are_powers_of_two_and_every_so_many_are_measured() -> None:
    _, _, measured = trained(FlowConfig(every=5), steps=17)

    assert [each.step for each in measured] == [1, 2, 4, 5, 8, 10, 15, 16]


def test_norms_are_those_of_gradients_weights_and_steps() -> None:
    model = Plain(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    meter = FlowMeter(model, optimizer)
    x = torch.randn(8, 6)
    loss = functional.cross_entropy(model(x), torch.arange(8) % 3)
    loss.backward()
    gradient, weight = model.last.weight.grad.clone(), model.last.weight.detach().clone()  # type: ignore[union-attr]
    bias = model.last.bias.grad.clone()  # type: ignore[union-attr]
    optimizer.step()
    found = meter.step(float(loss.detach()))
    meter.close()

    assert found is not None
    last = next(place for place in found.places if place["name"] == "last")
    assert last["gradient"] == pytest.approx(math.sqrt(float(gradient.norm() ** 2 + bias.norm() ** 2)), rel=1e-5)
    assert last["update"] == pytest.approx(0.5 * last["gradient"], rel=1e-4)
    assert last["trained"]
    assert last["held"]
    assert found.facts["downhill"] == pytest.approx(1.0, abs=1e-4)
    assert found.facts["gradient_is_fresh"] == pytest.approx(1.0, abs=1e-5)
    assert found.loss_terms[0]["function"] == "cross_entropy"
    assert found.targets["counts"] == [3, 3, 2]
    assert weight.shape == (3, 16)


def test_a_probe_tells_what_the_answer_hangs_on() -> None:
    _, _, measured = trained(FlowConfig(), steps=4, dropout=0.0)

    probes = [each.probes for each in measured if each.probes]

    assert probes[-1]["x"]["exchange_moves"] > 0.1
    assert "exchange_costs" in probes[-1]["x"]


def test_where_a_number_stopped_being_finite_is_told_with_its_records() -> None:
    model = Plain()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    meter = FlowMeter(model, optimizer)
    x = torch.randn(8, 6)
    x[5, 2] = math.inf
    loss = functional.cross_entropy(model(x), torch.arange(8) % 3)
    loss.backward()
    found = meter.step(float(loss.detach()))
    meter.close()

    assert found is not None
    assert found.first_not_finite == {"module": "first", "kind": "Linear", "rows": [5]}
    assert found.inputs["x"]["not_finite"] > 0


def test_a_sandwichs_inputs_gate_and_attention_are_named() -> None:
    model: Any = build("sandwich")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    meter = FlowMeter(model, optimizer)
    batch = batches("sandwich", WHOLE)[0]
    (loss_of(model(batch), batch) / 25).backward()
    optimizer.step()
    found = meter.step(1.0)
    meter.close()

    assert found is not None
    assert set(found.inputs) == {"words", "photo"}
    assert {"mean words", "mean photo", "saturated"} <= set(found.gate)
    assert {place["modality"] for place in found.places} == {"words", "photo", ""}
    assert all(call["scale_ratio"] == pytest.approx(1.0) for call in found.attention)
    assert any("CrossBlock" in call["holders"] for call in found.attention)
    assert found.probes["photo"]["exchange_moves"] > 0


def test_of_a_modality_that_a_whole_batch_lacks_nothing_is_told_by_exchanging_it() -> None:
    """As in turns that show records by one view or the other; it was taken for one that counts for nothing."""
    model: Any = build("sandwich")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    meter = FlowMeter(model, optimizer)
    batch = batches("sandwich", WHOLE)[0]
    words = batch.media["words"]
    hidden = words._replace(present_B=torch.zeros_like(words.present_B))  # there, and hidden from the answer
    batch = batch._replace(media={**batch.media, "words": hidden._replace(there_B=words.present_B)})
    (loss_of(model(batch), batch) / 25).backward()
    optimizer.step()
    found = meter.step(1.0)
    meter.close()

    assert found is not None
    assert found.probes["photo"]["exchange_moves"] > 0
    assert found.probes["words"].keys() == {"usual"}


def test_exponents_are_counted_by_modality_where_inputs_are_exchanged_too() -> None:
    model: Any = build("sandwich")
    with torch.no_grad():
        for parameter in model.parts()["photo"]:
            parameter.fill_(0.375)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    meter = FlowMeter(model, optimizer)
    told = []
    for batch in batches("sandwich", WHOLE)[:2]:
        optimizer.zero_grad()
        (loss_of(model(batch), batch) / 25).backward()
        optimizer.step()
        told.append(meter.step(1.0))
    meter.close()

    first, second = told
    assert first is not None
    assert second is not None
    assert set(first.exponents) == {"activations", "weights", "gradients"}
    assert set(first.exponents["weights"]) == {"photo", "words", "shared"}
    photo = first.exponents["weights"]["photo"]
    assert (photo["lowest"], len(photo["counts"]), photo["zeros"], photo["not_finite"]) == (-2, 1, 0, 0)
    # Every so many of a long tensor's numbers, all of a short one's.
    assert sum(photo["counts"]) == sum(len(range(0, (n := p.numel()), n // 4096 | 1)) for p in model.parts()["photo"])
    assert second.exponents == {}  # the second step is measured, and not probed
    assert second.conflicts == []


def test_a_run_that_knows_the_terms_of_its_loss_tells_who_pulls_against_whom(tmp_path: Path) -> None:
    model: Any = build("sandwich")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def terms(output: Any, batch: Any) -> dict[str, Tensor]:
        loss = loss_of(output, batch)
        return {"one": loss, "other": -loss}

    listening = Listening(model, optimizer, terms_of=terms)
    batch = batches("sandwich", WHOLE)[0]
    loss_of(model(batch), batch).backward()
    optimizer.step()
    measured, _ = listening.step(1.0)
    listening.close()

    assert measured is not None
    assert measured.conflicts[0]["cosine"] == pytest.approx(-1.0, abs=1e-5)


def test_a_run_announces_what_was_measured_and_learns_the_same(tmp_path: Path) -> None:
    losses = []
    for name, flow in (("without", None), ("with", FlowConfig(every=3, probe_every=3))):
        config = TrainConfig(steps=8, precision="fp32", flow=flow)
        train(TinyModel(), tiny_loss, TinyLoader(), config, folder=tmp_path / name)
        events = read_events(tmp_path / name / "events.jsonl")
        losses.append([event["loss"] for event in events if event["kind"] == "StepDone"])

    measured = [event["step"] for event in events if event["kind"] == "FlowMeasured"]
    assert losses[0] == losses[1]
    assert measured == [1, 2, 3, 4, 6, 8]


def test_a_run_also_asks_its_first_records_and_compares_gradients(tmp_path: Path) -> None:
    config = TrainConfig(steps=26, precision="fp32", flow=FlowConfig())
    train(TinyModel(), tiny_loss, TinyLoader(), config, folder=tmp_path)
    asked = [
        (event["kind"], event["step"])
        for event in read_events(tmp_path / "events.jsonl")
        if event["kind"] in ("Examined", "NoiseMeasured")
    ]
    assert asked == [("NoiseMeasured", 16), ("Examined", 24)]


def test_a_training_that_goes_on_is_not_asked_about_its_first_records() -> None:
    model = Plain()
    listening = Listening(model, torch.optim.SGD(model.parameters(), lr=0.1), steps=100)
    assert not listening.examining
    listening.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Placed(nn.Module):
    """Has places of tokens in a buffer, which its backward reads, and means that move."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("places", torch.arange(4))
        self.table = nn.Embedding(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.norm((x[:, None] + self.table(self.places)).mean(dim=1)))
        return found


def test_looking_for_where_a_number_broke_leaves_the_backward_and_its_buffers_alone() -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    gradients, means = [], []
    for watched in (False, True):
        model = Placed()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        meter = FlowMeter(model, optimizer, FlowConfig(every=100)) if watched else None
        for step in range(3):  # the third is not measured
            given = x.clone()
            given[3] = float("inf") if step == 2 else given[3]
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(given), torch.arange(8) % 3)
            loss.backward()
            if step < 2:
                optimizer.step()
            if meter is not None:
                meter.step(float(loss.detach()))
        assert model.table.weight.grad is not None
        gradients.append(model.table.weight.grad)
        means.append(model.norm.running_mean)
    assert torch.equal(gradients[0].nan_to_num(), gradients[1].nan_to_num())
    assert torch.equal(means[0].nan_to_num(), means[1].nan_to_num())


def test_a_bad_batch_is_told_once_with_what_was_bad_in_it() -> None:
    model = Plain(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    meter = FlowMeter(model, optimizer, FlowConfig(every=1000), steps=100)
    told = []
    for number in range(40):
        x = torch.randn(8, 6)
        if number == 1:
            x[5, 2] = math.nan
        loss = functional.cross_entropy(model(x), torch.arange(8) % 3)
        optimizer.zero_grad()
        if loss.isfinite():
            loss.backward()
            optimizer.step()
        found = meter.step(float(loss.detach()))
        if found is not None:
            told.append((found.first_not_finite, found.inputs["x"].get("not_finite", 0.0)))
    meter.close()

    assert told[0][0] == {"module": "first", "kind": "Linear", "rows": [5]}
    assert told[0][1] == pytest.approx(1 / 48)
    assert len(told) > 1
    assert all(each == (None, 0.0) for each in told[1:])
