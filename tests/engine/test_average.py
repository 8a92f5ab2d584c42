from pathlib import Path

import pytest
import torch
from tiny_run import TinyModel, same_weights, tiny_loss, train_tiny, weights
from torch import nn

from dougong.engine.average import WeightAverage
from dougong.engine.checkpoint import best_weights, load_weights
from dougong.engine.trainer import Watch


def test_the_average_moves_as_the_formula_says() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = WeightAverage(model, 0.5)

    model.weight.data.fill_(3.0)
    average.update(1)  # decay 2/11: the first steps count more
    first = 1 + (1 - 2 / 11) * 2
    model.weight.data.fill_(-1.0)
    average.update(1000)  # decay 0.5: the cap
    second = first + 0.5 * (-1 - first)

    assert average.weights()["weight"].item() == pytest.approx(second)


def test_training_gets_its_weights_back_bit_for_bit_even_after_an_error() -> None:
    model = TinyModel()
    average = WeightAverage(model, 0.9)
    for weight in model.parameters():
        weight.data.add_(0.1)
    average.update(5)
    before, averaged = weights(model), average.weights()

    def judge() -> None:
        with average.in_place():
            assert same_weights(model, averaged)
            assert not same_weights(model, before)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        judge()
    assert same_weights(model, before)


def test_counters_are_not_averaged_and_running_means_are() -> None:
    model = TinyModel()
    average = WeightAverage(model, 0.5)
    for name, buffer in model.named_buffers():
        buffer.fill_(8) if "num_batches" in name else buffer.add_(1.0)
    counter = next(name for name, buffer in model.named_buffers() if not buffer.is_floating_point())
    mean = next(name for name, _ in model.named_buffers() if name.endswith("running_mean"))

    average.update(1000)

    assert average.weights()[counter].item() == 8
    torch.testing.assert_close(average.weights()[mean], torch.full((16,), 0.5))


def test_restored_averages_go_on_as_the_saved_ones() -> None:
    model = TinyModel()
    average = WeightAverage(model, 0.9)
    saved = {name: weight.clone() + 1 for name, weight in average.weights().items()}

    average.restore(saved)

    assert all(torch.equal(average.weights()[name], saved[name]) for name, _ in model.named_parameters())


def test_averaging_is_judged_and_is_the_result_and_training_does_not_see_it(tmp_path: Path) -> None:
    judged: list[dict[str, torch.Tensor]] = []
    model = TinyModel()

    class Seen:
        metrics = {"score": 1.0}
        num_records = 1

    def judge() -> dict[str, Seen]:
        judged.append(weights(model))
        return {"all": Seen()}

    train_tiny(tmp_path / "averaged", model=model, ema=0.9, evaluate_every=20, watch=Watch(judge, "score"))
    _, plain = train_tiny(tmp_path / "plain", loss=tiny_loss)

    assert same_weights(model, plain)
    assert not same_weights(judged[-1], plain)
    result = TinyModel(seed=9)
    load_weights(result, best_weights(tmp_path / "averaged"))
    assert same_weights(result, judged[-1])
