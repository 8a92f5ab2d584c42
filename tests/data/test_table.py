"""Holds data/table.py to its promise: every kind of table opens, and a broken one says what would work."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_builders import inline, parquet, picture, rows

from dougong.core.errors import DataError
from dougong.data import table as table_module
from dougong.data.split import split_table
from dougong.data.table import Table, cells_of, open_table


def cells(table: Table, name: str) -> list[object]:
    return [cell for chunk in range(table.num_chunks) for cell in cells_of(table.read(chunk, [name]).column(name))]


def test_one_parquet_file_is_read_a_row_group_at_a_time(tmp_path: Path) -> None:
    table = open_table(parquet(tmp_path / "a.parquet", rows_per_group=4, x=list(range(10))))
    assert [len(table.rows_of(chunk)) for chunk in range(table.num_chunks)] == [4, 4, 2]
    assert table.read(1, ["x"]).column("x").to_pylist() == [4, 5, 6, 7]
    assert table.folder == tmp_path


def test_shards_follow_the_order_of_their_names_and_other_files_do_not_matter(tmp_path: Path) -> None:
    for name, start in (("b", 3), ("a", 0)):
        parquet(tmp_path / "shards" / f"{name}.parquet", x=[start, start + 1, start + 2])
    (tmp_path / "shards" / "_SUCCESS").touch()
    table = open_table(tmp_path / "shards")
    assert cells(table, "x") == [0, 1, 2, 3, 4, 5]
    assert table.numbers_of(1).tolist() == [3, 4, 5]
    assert table.folder == tmp_path / "shards"


def test_a_shard_of_another_schema_is_named(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", x=[1])
    parquet(tmp_path / "b.parquet", x=["one"])
    with pytest.raises(DataError, match=r"b\.parquet has other columns than a\.parquet: shards of one table are alike"):
        open_table(tmp_path)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", x=[1])
    whole = parquet(tmp_path / "b.parquet", x=[1]).read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"b\.parquet is not a whole Parquet file \(.*\)\. Write it again\."):
        open_table(tmp_path)


@pytest.mark.parametrize("read", [lambda table: table.read(1, ["x"]), lambda table: table.head(10)])
def test_a_damaged_row_group_is_named_when_it_is_read(tmp_path: Path, read: Callable[[Table], pa.Table]) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"x": [f"{i}" * 50 for i in range(8)]}),
        path,
        row_group_size=4,
        compression="snappy",
        use_dictionary=False,
    )
    content = bytearray(path.read_bytes())
    middle = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    content[middle : middle + 40] = b"\xff" * 40
    path.write_bytes(bytes(content))
    table = open_table(path)
    assert table.read(0, ["x"]).num_rows == 4
    with pytest.raises(DataError, match=r"a\.parquet: row group 1 is damaged \(.*\)\. Write it again\."):
        read(table)


def test_csv_and_jsonl_say_the_same_as_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,word\n1,red\n,blue\n3,\n")
    (tmp_path / "a.jsonl").write_text('{"x": 1, "word": "red"}\n{"word": "blue"}\n{"x": 3, "word": null}\n')
    parquet(tmp_path / "a.parquet", x=[1, None, 3], word=["red", "blue", None])
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        table = open_table(tmp_path / name)
        assert cells(table, "x") == [1, None, 3], name
        assert cells(table, "word") == ["red", "blue", None], name


def test_jsonl_holds_media_as_paths_in_structs(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"image": {"path": "a.png"}}\n{"image": null}\n')
    assert cells(open_table(tmp_path / "a.jsonl"), "image") == [{"path": "a.png"}, None]


def test_a_row_may_be_longer_than_a_mebibyte(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"x": [{",".join(["1.5"] * 1_000_000)}]}}\n')
    (tmp_path / "a.csv").write_text(f"x\n{'long ' * 1_000_000}\n")
    assert len(cells(open_table(tmp_path / "a.jsonl"), "x")[0]) == 1_000_000  # type: ignore[arg-type]
    assert len(cells(open_table(tmp_path / "a.csv"), "x")) == 1


def test_one_late_bad_cell_does_not_cost_a_csv_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x\n" + "1\n" * 600_000 + "abc\n")
    table = open_table(tmp_path / "a.csv")
    assert table.num_rows == 600_001
    assert cells(table, "x")[-2:] == ["1", "abc"]


def test_class_folders_give_the_commonest_medium_and_its_label(tmp_path: Path) -> None:
    for name in ("cat/a.png", "cat/deep/b.JPG", "dog/c.png", "dog/d.wav", "dog/notes.txt", ".hidden/e.png", "f.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture())
    table = open_table(tmp_path)
    assert cells(table, "image") == ["cat/a.png", "cat/deep/b.JPG", "dog/c.png"]
    assert cells(table, "label") == ["cat", "cat", "dog"]
    assert table.folder == tmp_path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", b"PK", r"a\.xlsx ends in '\.xlsx', which is no kind of table known here\. Use \.parquet, \.csv"),
        ("a", b"x\n1\n", r"a ends in '', which is no kind of table known here"),
        ("a.parquet", b"", r"a\.parquet is not a whole Parquet file"),
        ("a.parquet", b"PAR1 nonsense PAR1", r"a\.parquet is not a whole Parquet file"),
        ("a.csv", b"", r"a\.csv is not a CSV table with one header line: Empty CSV file"),
        ("a.csv", b"x,y\n1,2\n3\n", r"a\.csv is not a CSV table with one header line: .*Expected 2 columns, got 1"),
        ("a.csv", b"x,y\n", r"a\.csv holds no records"),
        ("a.csv", b"x,y,x\n1,2,3\n", r"a\.csv has two columns 'x': give each its own name"),
        ("a.jsonl", b"", r"a\.jsonl is not one JSON object a line"),
        ("a.jsonl", b"[1, 2]\n", r"a\.jsonl is not one JSON object a line"),
        ("a.jsonl", b'{"x": 1}\n{"x": "a"}\n', r"with the same kinds of values: .* from number to string in row 1"),
        ("a.jsonl", b'{"x": 1\n', r"a\.jsonl is not one JSON object a line"),
    ],
)
def test_what_is_no_table_is_said_in_one_line(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_table(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_nothing_there_and_nothing_in_it_are_said(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"gone\.parquet does not exist: give a Parquet, CSV or JSONL file, or a folder"
    ):
        open_table(tmp_path / "gone.parquet")
    with pytest.raises(DataError, match=r"has no class folders with images, sounds or \.npy arrays in them, and"):
        open_table(tmp_path)
    with pytest.raises(DataError, match=r"none\.parquet holds no records\."):
        open_table(parquet(tmp_path / "none.parquet", x=pa.array([], pa.int64())))


def test_a_text_table_too_large_for_memory_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "LARGEST_TEXT_TABLE_BYTES", 10)
    for name in ("a.csv", "a.jsonl"):
        (tmp_path / name).write_text("x" * 11)
        with pytest.raises(DataError, match=r"would be held in memory whole\. Write it as Parquet, which streams\."):
            open_table(tmp_path / name)


def test_a_string_that_is_not_utf8_stays_bytes_beside_its_neighbours(tmp_path: Path) -> None:
    buffers = [None, pa.py_buffer(pa.array([0, 2, 4, 4], pa.int32()).buffers()[1]), pa.py_buffer(b"ok\xff\xfe")]
    words = pa.Array.from_buffers(pa.string(), 3, buffers)
    assert cells(open_table(parquet(tmp_path / "a.parquet", x=words)), "x") == ["ok", b"\xff\xfe", ""]


def test_a_look_at_the_head_reaches_all_of_the_table_and_no_more_rows_than_asked(tmp_path: Path) -> None:
    table = open_table(parquet(tmp_path / "a.parquet", rows_per_group=10, x=list(range(1000))))
    found = table.head(80, ["x"]).column("x").to_pylist()
    assert len(found) == 80
    assert found == sorted(found)
    assert found[0] == 0
    assert found[-1] == 999
    assert rows(x=[1, 2, 3]).head(2).column("x").to_pylist() == [1, 2]


def test_a_look_at_one_side_of_a_split_sees_that_side(tmp_path: Path) -> None:
    whole = open_table(parquet(tmp_path / "a.parquet", rows_per_group=50, x=list(range(200))))
    for side in split_table(whole, 0.3, unit=None, seed=0):
        mine = [number for chunk in range(side.num_chunks) for number in side.numbers_of(chunk).tolist()]
        found = side.head(20).column("x").to_pylist()
        assert len(found) == 20
        assert set(found) <= set(mine)
        assert side.head(10_000).column("x").to_pylist() == mine


def test_the_size_of_a_chunk_counts_what_the_file_holds_once(tmp_path: Path) -> None:
    shared = [inline(picture(seed=row // 50)) for row in range(200)]
    table = open_table(parquet(tmp_path / "a.parquet", rows_per_group=100, image=shared))
    for chunk in range(table.num_chunks):
        held = table.read(chunk, ["image"]).nbytes
        assert held <= table.bytes_of(chunk) <= 1.5 * held


def test_a_byte_in_a_csv_that_is_not_utf8_is_its_own_records_trouble(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("n,word\n1,fine\n2,caf\xe9\n3,\n".encode("latin-1"))
    table = open_table(tmp_path / "a.csv")
    assert cells(table, "word") == ["fine", b"caf\xe9", None]
    assert cells(table, "n") == [1, 2, 3]


def test_words_that_mean_nothing_to_numbers_stay_words(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('n,word\n1,NA\nNA,null\n,"N/A"\n4,""\n5,x\n')
    table = open_table(tmp_path / "a.csv")
    assert cells(table, "word") == ["NA", "null", "N/A", None, "x"]
    assert cells(table, "n") == [1, None, None, 4, 5]
