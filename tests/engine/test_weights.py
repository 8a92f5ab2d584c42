from pathlib import Path

import pytest
import torch
from tiny_run import TinyModel, same_weights, weights
from torch import nn

from dougong.core.errors import CheckpointError
from dougong.engine.weights import distinct_weights, mapped_weights, put_weights, write_weights


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


def test_weights_come_back_from_their_file_bit_for_bit(tmp_path: Path) -> None:
    model, other = TinyModel(), TinyModel(seed=1)
    write_weights(tmp_path / "w", distinct_weights(model))

    put_weights(other, mapped_weights(tmp_path / "w"), where="here")

    assert same_weights(model, other)


def test_a_weight_that_stands_twice_is_written_once(tmp_path: Path) -> None:
    model, other = Tied(), Tied()
    write_weights(tmp_path / "w", distinct_weights(model))
    kept = mapped_weights(tmp_path / "w")

    put_weights(other, kept, where="here")

    assert set(kept) == {"first.weight", "first.bias", "second.bias"}
    assert torch.equal(other.second.weight, model.second.weight)
    assert other.second.weight is other.first.weight


def test_empty_weights_are_not_taken_for_each_other() -> None:
    model = nn.Module()
    model.register_buffer("a", torch.empty(0))
    model.register_buffer("b", torch.empty(0))
    assert set(distinct_weights(model)) == {"a", "b"}


def test_weights_that_were_put_do_not_change_with_their_file(tmp_path: Path) -> None:
    model = nn.Linear(1000, 1, bias=False)
    write_weights(tmp_path / "w", {"weight": torch.arange(1000.0).view(1, 1000)})
    put_weights(model, mapped_weights(tmp_path / "w"), where="w")
    with (tmp_path / "w").open("r+b") as file:  # the same file, not a new one of its name
        file.seek(-4000, 2)
        file.write(bytes(4000))
    assert model.weight.sum() == 499500


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a pickle, perhaps", None])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "w").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot be read as safetensors .* Use another checkpoint\.$"):
        mapped_weights(tmp_path / "w")


def test_weights_of_another_model_are_refused_and_nothing_changes() -> None:
    model = TinyModel()
    before = weights(model)
    strange = {name: weight + 1 for name, weight in before.items()}
    strange["extra"] = strange.pop("last.bias")

    with pytest.raises(
        CheckpointError, match=r"^run is of another model: it lacks last\.bias and has extra besides\. Build the model"
    ):
        put_weights(model, strange, where="run")

    assert same_weights(model, before)


def test_weights_of_another_shape_are_refused_and_nothing_changes() -> None:
    model = TinyModel()
    before = weights(model)
    strange = {name: weight + 1 for name, weight in before.items()} | {"last.bias": torch.zeros(4)}

    with pytest.raises(
        CheckpointError, match=r"^run is of another model: last\.bias is \(4,\) there and \(3,\) here\."
    ):
        put_weights(model, strange, where="run")

    assert same_weights(model, before)


def test_many_missing_names_are_counted() -> None:
    with pytest.raises(CheckpointError, match=r"and 7 more and has nothing besides"):
        put_weights(TinyModel(), {"last.bias": torch.zeros(3)}, where="run")
