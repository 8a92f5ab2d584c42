import math
from collections.abc import Callable

import pytest
import torch
from tiny_run import TinyLoader, TinyModel, TinyOutput, same_weights, tiny_loss, weights
from torch import Tensor
from torch.optim import SGD, AdamW

from dougong.data.position import Position
from dougong.engine.batches import to_tensors
from dougong.engine.step import StepReport, TrainParts, train_step
from dougong.nn.batch import Batch


def gradients(model: TinyModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def take_step(sizes: list[int], *, max_grad_norm: float | None = None) -> tuple[TinyModel, StepReport]:
    """One step over the records 0 to 15, shared out like this, in float64."""
    model = TinyModel(dropout=0.0, norm=False).double()
    loader = TinyLoader(16)
    loader.x_ND = loader.x_ND.astype("float64")  # type: ignore[assignment]
    first, batches = 0, []
    for size in sizes:
        loader.batch_size = size
        order = torch.arange(16).roll(-first).numpy()
        batches.append(to_tensors(loader.collate(order, 0)))
        first += size
    parts = TrainParts(model, tiny_loss, SGD(model.parameters(), lr=1.0), max_grad_norm)
    return model, train_step(parts, batches, num_records=sum(sizes))


@pytest.mark.parametrize("sizes", [[8, 8], [13, 3], [1, 14, 1]])
def test_uneven_micro_batches_give_the_gradients_of_one_big_batch(sizes: list[int]) -> None:
    whole, want = take_step([16])
    parted, report = take_step(sizes)

    assert gradients(whole).keys() == dict(whole.named_parameters()).keys()
    torch.testing.assert_close(gradients(parted), gradients(whole))
    torch.testing.assert_close(parted.state_dict(), whole.state_dict())
    assert report.loss == pytest.approx(want.loss)  # float32 is what the loss is added up in
    assert report.grad_norm == pytest.approx(want.grad_norm)


def test_the_loss_is_the_mean_over_records_and_the_norm_that_of_all_gradients() -> None:
    model, report = take_step([13, 3])
    fresh = TinyModel(dropout=0.0, norm=False).double()
    batch = TinyLoader(16).all_tensors()
    batch.media["x"].values["numbers_UN"] = batch.media["x"].values["numbers_UN"].double()

    assert report.loss == pytest.approx(tiny_loss(fresh(batch), batch).item() / 16)
    squares = sum(float(gradient.square().sum()) for gradient in gradients(model).values())
    assert report.grad_norm == pytest.approx(math.sqrt(squares))
    assert not report.skipped


def test_long_gradients_are_shortened_and_keep_their_direction() -> None:
    whole, want = take_step([16])
    clipped, report = take_step([16], max_grad_norm=0.01)

    assert want.grad_norm > 0.01
    assert report.grad_norm == want.grad_norm  # told as it was
    factor = 0.01 / want.grad_norm
    torch.testing.assert_close(gradients(clipped), {n: g * factor for n, g in gradients(whole).items()})


def test_short_gradients_stay_as_they_are() -> None:
    whole, want = take_step([16])
    clipped, _ = take_step([16], max_grad_norm=want.grad_norm * 1.01)
    assert same_weights(whole, clipped)


def spoil_loss(output: TinyOutput, batch: Batch) -> Tensor:
    return tiny_loss(output, batch) * float("nan")


def spoil_gradient(output: TinyOutput, batch: Batch) -> Tensor:
    # The root's slope at 0 is infinite, its value is not.
    return tiny_loss(output, batch) + (output.output_BC * 0).sum().abs().sqrt()


def spoil_input(output: TinyOutput, batch: Batch) -> Tensor:
    return tiny_loss(output, batch)


@pytest.mark.parametrize("loss", [spoil_loss, spoil_gradient, spoil_input])
def test_a_step_that_is_not_finite_changes_nothing(loss: Callable[[TinyOutput, Batch], Tensor]) -> None:
    model = TinyModel()
    optimizer = AdamW(model.parameters(), lr=0.1)
    batch = TinyLoader().all_tensors()
    train_step(TrainParts(model, tiny_loss, optimizer), [batch], num_records=40)
    before = weights(model)
    memory = {name: {k: v.clone() for k, v in optimizer.state[p].items()} for name, p in model.named_parameters()}
    if loss is spoil_input:
        batch.media["x"].values["numbers_UN"][0, 0] = float("inf")

    report = train_step(TrainParts(model, loss, optimizer), [batch], num_records=40)

    assert report.skipped
    assert not (math.isfinite(report.loss) and math.isfinite(report.grad_norm))
    assert same_weights(model, before)  # running means too
    for name, parameter in model.named_parameters():
        assert all(torch.equal(optimizer.state[parameter][key], value) for key, value in memory[name].items())
    assert not gradients(model)


def test_gradients_of_the_step_before_have_no_part() -> None:
    model = TinyModel(dropout=0.0, norm=False)
    parts = TrainParts(model, tiny_loss, SGD(model.parameters(), lr=0.0), None)
    batch = TinyLoader().all_tensors()
    train_step(parts, [batch], num_records=40)
    once = gradients(model)
    train_step(parts, [batch], num_records=40)
    torch.testing.assert_close(gradients(model), once, rtol=0, atol=0)


def test_in_bf16_weights_and_gradients_stay_in_fp32() -> None:
    model = TinyModel(dropout=0.0)
    seen: list[torch.dtype] = []

    def loss(output: TinyOutput, batch: Batch) -> Tensor:
        seen.append(output.output_BC.dtype)
        return tiny_loss(output, batch)

    parts = TrainParts(model, loss, AdamW(model.parameters()), precision="bf16")
    _, arrays = next(iter(TinyLoader().batches(Position())))
    train_step(parts, [to_tensors(arrays)], num_records=8)

    assert seen == [torch.bfloat16]
    assert {p.dtype for p in model.parameters()} == {g.dtype for g in gradients(model).values()} == {torch.float32}


def test_a_parameter_without_a_part_in_the_loss_is_left_alone() -> None:
    model = TinyModel()
    model.spare = torch.nn.Parameter(torch.ones(2, 2))
    parts = TrainParts(model, tiny_loss, AdamW(model.parameters(), weight_decay=0.5))
    report = train_step(parts, [TinyLoader().all_tensors()], num_records=40)
    assert not report.skipped
    assert torch.equal(model.spare.detach(), torch.ones(2, 2))
