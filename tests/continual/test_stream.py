import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from task_builders import quick, table_of, tones

from dougong.continual.learn import learn
from dougong.continual.rehearsal import RehearsalStore, read_key
from dougong.continual.stream import Round, learn_growing
from dougong.continual.tasks import read_parts
from dougong.continual.taught import open_taught
from dougong.core.bundle import read_bundle
from dougong.core.errors import ConfigError, DataError
from dougong.engine.trainer import TrainConfig


def short(steps: int = 6) -> object:
    return quick(train=TrainConfig(steps=steps, precision="fp32"))


def growing(copied: Path, folder: Path, *, most_bytes: int = 10**8, rounds: int = 1, **heard: Any) -> Iterator[Round]:
    given = {"most_bytes": most_bytes, "rounds": rounds, "target": "pitch", "seconds": 120, "every_seconds": 0}
    return learn_growing(copied, "stream", folder, short(), **given, **heard)  # type: ignore[arg-type]


def test_a_folder_that_grows_is_learnt_from(copied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "arriving"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(tones(40, seed=50)), folder / "a.parquet")
    (folder / "half.parquet").write_bytes(b"PAR1 not yet whole")
    said: list[str] = []

    def arrive(_: float) -> None:
        if (folder / "a.parquet").exists() and len(done) == 1:
            pq.write_table(pa.Table.from_pylist(tones(40, seed=51)), folder / "b.parquet")

    done: list[Round] = []
    for found in growing(copied, folder, rounds=2, say=said.append, pause=arrive):
        done.append(found)

    assert [found.shards for found in done] == [("a.parquet",), ("b.parquet", "a.parquet")]
    parts = [part.task for part in read_parts(copied, read_bundle(copied)) if part.task.name == "stream"]
    assert [task.number for task in parts] == [1, 2]
    assert parts[-1].covers == (1,)
    assert parts[-1].provenance["shards"] == ["a.parquet", "b.parquet"]
    asked = open_taught(copied)
    assert all(a.answer in ("low", "high") for a in asked.predict(tones(4, seed=52), "stream"))


def test_records_of_one_picture_wait_for_others(copied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "arriving"
    folder.mkdir()
    one = tones(40, seed=50)
    pq.write_table(pa.Table.from_pylist([{**row, "clip": one[0]["clip"]} for row in one]), folder / "a.parquet")
    said: list[str] = []

    def arrive(_: float) -> None:
        if any("waiting for others" in line for line in said):
            pq.write_table(pa.Table.from_pylist(tones(40, seed=51)), folder / "b.parquet")

    (found,) = growing(copied, folder, say=said.append, pause=arrive)

    assert set(found.shards) == {"a.parquet", "b.parquet"}
    assert sum("waiting for others" in line for line in said) == 1


def test_no_more_records_are_held_than_allowed(copied: Path, tmp_path: Path) -> None:
    folder = tmp_path / "arriving"
    folder.mkdir()
    for name in ("a", "b"):
        pq.write_table(pa.Table.from_pylist(tones(40, seed=50)), folder / f"{name}.parquet")
    size = pq.read_table(folder / "a.parquet").nbytes
    (found,) = growing(copied, folder, most_bytes=int(1.5 * size))
    assert len(found.shards) == len(found.left_out) == 1
    assert found.learnt.task.records + found.learnt.evaluation.num_records == 40


def test_it_ends_when_its_time_is_over(copied: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert (
        list(learn_growing(copied, "s", tmp_path / "empty", short(), seconds=0.05, most_bytes=1, every_seconds=0.01))
        == []
    )  # type: ignore[arg-type]
    with pytest.raises(DataError, match="is no folder"):
        list(learn_growing(copied, "s", tmp_path / "none", short(), seconds=1, most_bytes=1))  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> RehearsalStore:
    pytest.importorskip("cryptography")
    return RehearsalStore(tmp_path / "kept", read_key(tmp_path / "key"), most_bytes=20_000)


def words(count: int, start: int = 0) -> pa.Table:
    return pa.table({"remark": [f"secret remark {start + i}" for i in range(count)], "y": ["a"] * count})


def test_kept_records_are_unreadable_and_unaltered(store: RehearsalStore, tmp_path: Path) -> None:
    assert store.records("t") is None
    store.offer("t", words(20))
    (file,) = (tmp_path / "kept").iterdir()
    assert b"secret" not in file.read_bytes()
    assert b"remark" not in file.read_bytes()
    assert store.records("t") == words(20)
    assert (tmp_path / "key").stat().st_mode & 0o077 == 0

    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="cannot be opened"):
        store.records("t")
    content[-1] ^= 1
    (tmp_path / "kept" / "other.rehearsal").write_bytes(content)
    with pytest.raises(DataError, match="cannot be opened"):
        store.records("other")  # one task's file does not stand in for another's
    store.forget("t")
    assert store.records("t") is None


def test_no_more_is_kept_than_allowed_and_all_have_a_chance(store: RehearsalStore, tmp_path: Path) -> None:
    for start in range(0, 12_000, 3000):
        kept = store.offer("t", words(3000, start))
    (file,) = (tmp_path / "kept").iterdir()
    assert file.stat().st_size <= 20_000
    numbers = [int(text.split()[-1]) for text in store.records("t").column("remark").to_pylist()]  # type: ignore[union-attr]
    assert kept == len(numbers) > 100
    assert 0.1 < sum(number < 3000 for number in numbers) / len(numbers) < 0.45
    assert len(set(numbers)) == len(numbers)
    with pytest.raises(DataError, match="other columns"):
        store.offer("t", pa.table({"x": [1]}))


def test_a_key_that_is_none_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad").write_text("short")
    with pytest.raises(ConfigError, match="is no key"):
        read_key(tmp_path / "bad")
    monkeypatch.delenv("DOUGONG_REHEARSAL_KEY", raising=False)
    with pytest.raises(ConfigError, match="needs a key"):
        read_key(None)
    monkeypatch.setenv("DOUGONG_REHEARSAL_KEY", base64.b64encode(bytes(32)).decode())
    assert read_key(None) == bytes(32)


def test_rehearsed_records_are_learnt_again(copied: Path, store: RehearsalStore) -> None:
    config = short()
    learn(copied, "kept", table_of(tones(40, seed=60)), config, target="pitch", rehearsal=store)  # type: ignore[arg-type]
    second = learn(copied, "kept", table_of(tones(40, seed=61)), config, target="pitch", rehearsal=store)  # type: ignore[arg-type]
    assert second.task.covers == (1,)
    held = store.records("kept")
    assert held is not None
    assert second.task.records + second.evaluation.num_records > 40
