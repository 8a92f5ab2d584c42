from pathlib import Path

import pytest
import torch

from dougong.core.errors import CheckpointError
from dougong.engine.parallel.pieces import Piece, PieceReader, index_of, own_pieces, told
from dougong.engine.weights import write_weights

WHOLE = torch.arange(60.0).view(6, 10)


def held(rows: slice, columns: slice) -> dict[str, Piece]:
    return {"weight": Piece(WHOLE[rows, columns].clone(), (rows.start, columns.start), (6, 10))}


def written(folder: Path, ranks: list[dict[str, Piece]]) -> PieceReader:
    index = index_of([told(each) for each in ranks])
    for rank, each in enumerate(ranks):
        write_weights(folder / f"{rank}.safetensors", own_pieces(each, index, rank))
    return PieceReader(folder, {rank: f"{rank}.safetensors" for rank in range(len(ranks))}, index)


def test_any_box_is_read_from_any_boxes(tmp_path: Path) -> None:
    four = [held(rows, columns) for rows in (slice(0, 4), slice(4, 6)) for columns in (slice(0, 5), slice(5, 10))]
    reader = written(tmp_path, four)

    assert torch.equal(reader.read("weight"), WHOLE)
    for first in range(6):
        for left in range(0, 10, 3):
            for height, width in ((1, 1), (2, 4), (6 - first, 10 - left)):
                shape = (min(height, 6 - first), min(width, 10 - left))
                box = WHOLE[first : first + shape[0], left : left + shape[1]]
                assert torch.equal(reader.read("weight", (first, left), shape), box)


def test_what_several_hold_is_written_once(tmp_path: Path) -> None:
    whole = held(slice(0, 6), slice(0, 10))
    reader = written(tmp_path, [whole, whole, whole])

    assert torch.equal(reader.read("weight"), WHOLE)
    assert [place["rank"] for place in reader.index["weight"]["at"]] == [0]
    sizes = [(tmp_path / f"{rank}.safetensors").stat().st_size for rank in range(3)]
    assert sizes[0] > sizes[1] == sizes[2]


def test_numbers_without_dimensions_and_empty_parts_are_kept(tmp_path: Path) -> None:
    step = {"step": Piece(torch.tensor(7.0), (), ())}
    nothing = {"weight": Piece(torch.zeros(0, 10), (6, 0), (6, 10))}
    reader = written(tmp_path, [held(slice(0, 6), slice(0, 10)) | step, nothing | step])

    assert reader.read("step").item() == 7.0
    assert torch.equal(reader.read("weight"), WHOLE)
    assert reader.read("weight", (6, 0), (0, 10)).shape == (0, 10)


def test_a_part_that_nobody_holds_and_files_that_are_gone_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="of weight 40 of 60 numbers are held by some rank"):
        index_of([told(held(slice(0, 4), slice(0, 10)))])
    reader = written(tmp_path, [held(slice(0, 6), slice(0, 10))])
    with pytest.raises(CheckpointError, match="has no bias"):
        reader.read("bias")
    (tmp_path / "0.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"0\.safetensors cannot be read as safetensors"):
        reader.read("weight")
    (tmp_path / "0.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"0\.safetensors is missing"):
        reader.read("weight")


def test_a_file_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    reader = written(tmp_path, [held(slice(0, 6), slice(0, 10))])
    (tmp_path / "inner").mkdir()
    outside = PieceReader(tmp_path / "inner", {0: "../0.safetensors"}, reader.index)
    with pytest.raises(CheckpointError, match="is missing"):
        outside.read("weight")
