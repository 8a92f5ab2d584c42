from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from tiny_run import TARGET, TinyLoader, TinyModel, TinyOutput, same_weights, tiny_loss, weights
from torch import Tensor

from dougong.core.signature import Target
from dougong.engine.evaluate import evaluate
from dougong.engine.random_state import random_state
from dougong.nn.batch import Batch
from dougong.nn.block_stack import BlockStack


class Plain(NamedTuple):
    output_BC: Tensor


class Columns(BlockStack[Tensor, Any]):
    """Its output is the first columns of its input."""

    def __init__(self, num: int, weight: bool = False) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.ones(()))
        self.blocks = torch.nn.ModuleList()
        self.num, self.weight = num, weight

    def embed(self, batch: Batch) -> Tensor:
        return batch.media["x"].values["numbers_UN"] * self.factor

    def head(self, state: Tensor) -> Any:
        output_BC = state[:, : self.num]
        return TinyOutput(output_BC, state[:, 3:4]) if self.weight else Plain(output_BC)


class Unknown(TinyLoader):
    """Knows no target."""

    def collate(self, order: Any, number: int) -> Any:
        return super().collate(order, number)._replace(target=None)


@pytest.mark.parametrize("batch_size", [1, 8, 40])
def test_every_record_is_in_the_result_with_its_row_and_the_bad_ones_are_listed(batch_size: int) -> None:
    loader = TinyLoader(40, batch_size, bad={3, 11})
    found = evaluate(Columns(3), loader, TARGET)

    good = [row for row in range(40) if row not in (3, 11)]
    assert found.row_B.tolist() == good
    assert found.num_records == 38
    assert [record.row for record in found.bad] == [3, 11]
    assert found.prediction_B.tolist() == loader.x_ND[good, :3].argmax(axis=1).tolist()
    assert found.target_B is not None
    assert found.target_B.tolist() == loader.y_N[good].tolist()
    assert found.metrics == {"accuracy": 1.0, "balanced_accuracy": 1.0, "macro_f1": 1.0}
    assert found.confusion is not None
    assert found.confusion.sum() == 38
    np.testing.assert_allclose(
        found.probability_BC, torch.from_numpy(loader.x_ND[good, :3]).softmax(dim=1).numpy(), rtol=1e-5
    )


def test_the_model_is_left_as_it_was_each_module_in_its_mode() -> None:
    model = TinyModel().train()
    model.first.eval()
    modes, before, state = [module.training for module in model.modules()], weights(model), random_state()
    assert set(modes) == {True, False}

    evaluate(model, TinyLoader(), TARGET)

    assert [module.training for module in model.modules()] == modes
    assert same_weights(model, before)
    assert random_state() == state
    assert all(p.grad is None for p in model.parameters())


def test_modes_come_back_after_an_error() -> None:
    class Broken(TinyLoader):
        def collate(self, order: Any, number: int) -> Any:
            raise RuntimeError("broken")

    model = TinyModel().train()
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(model, Broken(), TARGET)
    assert all(module.training for module in model.modules())


def test_dropout_has_no_part() -> None:
    model = TinyModel(dropout=0.9).train()
    first, second = (evaluate(model, TinyLoader(), TARGET).probability_BC for _ in range(2))
    assert np.array_equal(first, second)  # type: ignore[arg-type]


def test_the_loss_is_its_mean_per_record() -> None:
    model = TinyModel(dropout=0.0).eval()
    batch = TinyLoader(40).all_tensors()
    want = tiny_loss(model(batch), batch).item() / 40

    found = evaluate(model, TinyLoader(40, 7), TARGET, loss=tiny_loss)

    assert found.metrics["loss"] == pytest.approx(want, rel=1e-6)
    assert "loss" not in evaluate(model, TinyLoader(), TARGET).metrics


def test_without_known_targets_there_are_predictions_and_no_figures() -> None:
    found = evaluate(TinyModel(), Unknown(), TARGET, loss=tiny_loss)
    assert found.metrics == {}
    assert found.target_B is None
    assert len(found.prediction_B) == found.num_records == 40


def test_no_record_at_all_is_no_error() -> None:
    found = evaluate(TinyModel(), TinyLoader(8, 4, bad=set(range(8))), TARGET)
    assert found.metrics == {}
    assert found.num_records == len(found.row_B) == len(found.prediction_B) == 0
    assert len(found.bad) == 8


def test_a_value_is_in_the_targets_own_units() -> None:
    loader = TinyLoader()
    loader.y_N = loader.x_ND[:, 0] + np.float32(0.5)
    target = Target(name="price", task="regression", mean=100.0, scale=10.0)

    found = evaluate(Columns(1), loader, target)

    np.testing.assert_allclose(found.prediction_B, 100 + 10 * loader.x_ND[:, 0], rtol=1e-6)
    assert found.target_B is not None
    np.testing.assert_allclose(found.target_B - found.prediction_B, 5.0, rtol=1e-5)
    assert found.metrics["rmse"] == pytest.approx(5.0, rel=1e-5)
    assert found.probability_BC is None
    assert found.confusion is None


def test_several_labels_are_ones_and_zeros() -> None:
    loader = TinyLoader()
    loader.y_N = (loader.x_ND[:, :2] > 0).astype(np.float32)
    target = Target(name="tags", task="multi_label", labels=("a", "b"))

    found = evaluate(Columns(2), loader, target)

    assert found.prediction_B.tolist() == loader.y_N.tolist()
    assert found.metrics == {"micro_f1": 1.0, "macro_f1": 1.0, "mean_average_precision": 1.0}


def test_the_gates_share_is_its_mean_over_records_and_not_over_batches() -> None:
    loader = TinyLoader(10, 8)  # 8 and 2
    found = evaluate(Columns(3, weight=True), loader, TARGET)
    assert found.gate == {"x": pytest.approx(float(loader.x_ND[:, 3].mean()), rel=1e-5)}
    assert evaluate(Columns(3), loader, TARGET).gate == {}


def test_it_computes_in_the_precision_that_is_asked_for() -> None:
    seen: set[torch.dtype] = set()

    class Noted(TinyModel):
        def head(self, state: Tensor) -> TinyOutput:
            seen.add(state.dtype)
            return super().head(state)

    model = Noted(norm=False)
    evaluate(model, TinyLoader(), TARGET)
    assert seen == {torch.float32}
    evaluate(model, TinyLoader(), TARGET, precision="bf16")
    assert seen == {torch.float32, torch.bfloat16}
