import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlflow")

from dougong.continual.registry.index import Entry
from dougong.continual.registry.store import ObjectStore
from dougong.continual.registry.versions import CANDIDATE, PRODUCTION, About, Registry
from dougong.continual.tasks import add_part, read_parts, remove_task
from dougong.core.bundle import read_bundle
from dougong.core.errors import BundleError, ConfigError, RunError


def variant(bundle: Path, name: str) -> Path:
    """The same bundle with one more task."""
    part = read_parts(bundle, read_bundle(bundle))[0]
    add_part(bundle, part.task.model_copy(update={"name": name}), part.weights, part.traits)
    return bundle


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry's database before its first version: making one takes seconds."""
    folder = tmp_path_factory.mktemp("registry") / "empty"
    Registry(folder)._opened()._mlflow()  # type: ignore[attr-defined]
    return folder


@pytest.fixture
def registry(empty: Path, tmp_path: Path) -> Registry:
    return Registry(Path(shutil.copytree(empty, tmp_path / "registry")))


def test_versions_go_in_are_promoted_and_rolled_back(
    registry: Registry, taught: Path, copied: Path, tmp_path: Path
) -> None:
    first = registry.register(taught, "colours", note="the first")
    assert (first.number, first.aliases, first.about.parent) == (1, (CANDIDATE,), None)
    assert registry.register(taught, "colours").number == 1  # the same again
    second = registry.register(variant(copied, "third"), "colours")
    assert (second.number, second.about.parent, second.about.tasks) == (2, 1, ("stripes", "third", "tones"))
    assert "task tones" in second.about.metrics

    registry.promote("colours", 1)
    registry.promote("colours", CANDIDATE, verdict="passed", reason="more tasks")
    production = registry.production("colours")
    assert production is not None
    assert production.number == 2
    assert [v.number for v in registry.lineage("colours", PRODUCTION)] == [2, 1]

    registry.rollback("colours", reason="it was slow")
    assert registry.version("colours", PRODUCTION).number == 1
    with pytest.raises(ConfigError, match="is the first that was in production"):
        registry.rollback("colours")
    assert [(m.before, m.after, m.kind) for m in registry.history("colours")] == [
        (None, 1, "promote"),
        (1, 2, "promote"),
        (2, 1, "rollback"),
    ]
    changed = registry.diff("colours", 1, 2)
    assert changed["tasks"] == {"added": ["third"], "removed": []}
    assert changed["files"]["added"] == [
        f"tasks/third/1/{n}" for n in ("adapter.safetensors", "task.json", "traits.safetensors")
    ]

    registry.restore("colours", 1, tmp_path / "back")
    for path in sorted(p for p in taught.rglob("*") if p.is_file()):
        assert (tmp_path / "back" / path.relative_to(taught)).read_bytes() == path.read_bytes()
    read_bundle(tmp_path / "back")


def test_versions_of_one_base_cost_one_base(registry: Registry, copied: Path) -> None:
    registry.register(copied, "colours")
    before, whole = registry.store.num_bytes(), registry.version("colours", 1).about.num_bytes
    for number in range(3):
        registry.register(variant(copied, f"task-{number}"), "colours")
    assert registry.store.num_bytes() - before < 3 * 0.3 * whole
    del before


def test_what_is_not_there_is_said(registry: Registry, taught: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is no registry yet"):
        Registry(tmp_path / "nowhere").versions()
    with pytest.raises(ConfigError, match="has nothing named 'colours'. It has nothing yet"):
        registry.versions("colours")
    registry.register(taught, "colours")
    with pytest.raises(ConfigError, match="has no version '7'. It has 1 to 1, and candidate"):
        registry.version("colours", "7")
    with pytest.raises(ConfigError, match="nothing of colours is in production"):
        registry.rollback("colours")
    registry.promote("colours")
    with pytest.raises(ConfigError, match="is in production already"):
        registry.promote("colours", 1)
    with pytest.raises(ConfigError, match="is no URL"):
        Registry(tmp_path, "somewhere").names()


def test_an_altered_object_is_never_given_out(registry: Registry, taught: Path, tmp_path: Path) -> None:
    version = registry.register(taught, "colours")
    sha256 = registry.store.tree(version.tree)["preparation.json"]
    place = registry.store.folder / sha256[:2] / sha256
    place.chmod(0o644)
    place.write_text("{}")
    with pytest.raises(RunError, match="was altered"):
        registry.restore("colours", 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_is_not_whole_is_not_registered(registry: Registry, copied: Path) -> None:
    (copied / "preparation.json").unlink()
    with pytest.raises(BundleError, match="lacks its file"):
        registry.register(copied, "colours")
    with pytest.raises(ConfigError, match="has nothing named"):
        registry.versions("colours")


def test_a_move_that_was_written_down_and_not_done_is_struck_out(
    registry: Registry, taught: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.register(taught, "colours")
    registry.register(variant(copied, "third"), "colours")
    registry.promote("colours", 1)
    index = registry._opened()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(index), "point", killed)
        with pytest.raises(KeyboardInterrupt):
            registry.promote("colours", 2)
    assert registry.version("colours", PRODUCTION).number == 1
    assert [m.after for m in registry.history("colours")] == [1]

    registry.promote("colours", 2)
    registry.rollback("colours")
    assert registry.version("colours", PRODUCTION).number == 1
    assert [m.after for m in registry.history("colours")] == [1, 2, 1]


def _register(folder: Path, bundle: Path, copies: int) -> None:
    registry = Registry(folder)
    for number in range(copies):
        registry.register(variant(bundle, f"{bundle.name}-{number}"), "colours")


@pytest.mark.slow
def test_two_processes_lose_nothing_of_each_other_s(registry: Registry, taught: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    bundles = [Path(shutil.copytree(taught, tmp_path / name)) for name in ("one", "two")]
    workers = [context.Process(target=_register, args=(registry.folder, bundle, 4)) for bundle in bundles]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    versions = registry.versions("colours")
    assert [version.number for version in versions] == list(range(1, 9))
    assert len({version.tree for version in versions}) == 8


DIES_WRITING = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("PRAGMA cache_size = 1")  # so that pages go to the file before the transaction ends
connection.execute("BEGIN")
connection.execute("DELETE FROM registered_model_aliases")
connection.execute("DELETE FROM model_version_tags")
connection.execute("CREATE TABLE large (x)")
connection.executemany("INSERT INTO large VALUES (?)", [("x" * 4000,) for _ in range(200)])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_writer_that_was_killed_in_the_midst_leaves_what_can_be_read(registry: Registry, taught: Path) -> None:
    registry.register(taught, "m")
    file = registry.folder / "mlflow.db"
    before = registry.versions("m")

    ended = subprocess.run([sys.executable, "-c", DIES_WRITING, str(file)], check=False)

    assert ended.returncode == -signal.SIGKILL
    assert file.with_name("mlflow.db-journal").stat().st_size > 512  # half of it is in the file
    assert Registry(registry.folder).versions("m") == before
    assert before[0].aliases == (CANDIDATE,)
    registry.promote("m", CANDIDATE)


def test_two_hundred_versions_are_listed_and_compared_in_a_second(registry: Registry, taught: Path) -> None:
    version = registry.register(taught, "colours")
    index = registry._opened()
    about: dict[str, Any] = json.loads(version.about.model_dump_json())
    for number in range(199):
        tags = {"dougong.tree": version.tree, "dougong.about": json.dumps({**about, "note": f"number {number}"})}
        index._mlflow()._client.create_model_version(  # type: ignore[attr-defined]
            "colours", source=f"dougong:{version.tree}", tags=tags
        )
    started = time.perf_counter()
    fresh = Registry(registry.folder)
    assert len(fresh.versions("colours")) == 200
    assert fresh.diff("colours", 1, 200)["new"] == 200
    assert time.perf_counter() - started < 1.0


def test_mlflow_s_own_client_shows_the_same(registry: Registry, taught: Path) -> None:
    registry.register(taught, "colours")
    registry.promote("colours")
    own = registry._opened()
    by_client: Callable[..., list[Entry]] = own._mlflow().entries  # type: ignore[attr-defined]
    told = sorted((entry._replace(tags=dict(entry.tags)) for entry in by_client("colours")), key=lambda e: e.number)
    assert told == sorted(own.entries("colours"), key=lambda e: e.number)
    assert by_client("colours")[0].aliases == (CANDIDATE, PRODUCTION)
    assert dict(own._mlflow().tags("colours")) == dict(own.tags("colours"))  # type: ignore[attr-defined]


def test_a_half_written_object_is_nobody_s(taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ObjectStore(tmp_path)
    tree = store.put_bundle(taught)
    weights = store.tree(tree)["model.safetensors"]
    shutil.rmtree(store.folder / weights[:2])
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            store.put_bundle(taught)
    with pytest.raises(RunError, match="lacks the object"):
        store.restore(tree, tmp_path / "out")
    store.put_bundle(taught)
    store.restore(tree, tmp_path / "out")
    assert About(registered="now").parent is None


def test_removing_a_task_makes_a_version_of_its_own(registry: Registry, taught: Path, copied: Path) -> None:
    registry.register(taught, "colours")
    remove_task(copied, "tones")
    registry.register(copied, "colours")
    assert registry.diff("colours", 1, 2)["tasks"]["removed"] == ["tones"]
