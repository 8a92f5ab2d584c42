"""What a kept figure stands on."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("harness")
    sys.modules.pop("harness", None)


def test_a_scripts_sources_are_those_its_imports_reach(harness: ModuleType) -> None:
    found = {file.relative_to(BENCHMARKS.parent).as_posix() for file in harness.reached(BENCHMARKS / "segments.py")}

    assert {"benchmarks/segments.py", "benchmarks/activations.py", "benchmarks/harness.py"} <= found
    assert {"src/dougong/__init__.py", "src/dougong/engine/step.py", "src/dougong/core/files.py"} <= found
    assert "benchmarks/fusion.py" not in found
    assert not [file for file in found if file.startswith("src/dougong/watch/")]


def test_a_part_is_taken_again_only_where_what_it_loaded_is_the_same(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "benchmarks").mkdir()
    script, other = tmp_path / "benchmarks" / "script.py", tmp_path / "benchmarks" / "other.py"
    later, apart = tmp_path / "benchmarks" / "later.py", tmp_path / "benchmarks" / "apart.py"
    for file in (script, other, later, apart):
        file.write_text("text = 1\n", encoding="utf-8")
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(harness, "__file__", str(tmp_path / "benchmarks" / "harness.py"))
    monkeypatch.setitem(sys.modules, "other", _module(other))
    kept = harness.Kept("script")
    monkeypatch.setitem(sys.modules, "later", _module(later))  # in a function, while measuring

    kept.put("key", {"loss": 0.5})

    assert harness.Kept("script").get("key") == {"loss": 0.5}
    assert harness.Kept("script").get("another") is None
    apart.write_text("text = 2\n", encoding="utf-8")
    assert harness.Kept("script").get("key") == {"loss": 0.5}
    for file in (script, other, later):
        before = file.read_text(encoding="utf-8")
        file.write_text("text = 2\n", encoding="utf-8")
        assert harness.Kept("script").get("key") is None, file.name
        file.write_text(before, encoding="utf-8")

    kept = harness.Kept("script")
    other.write_text("text = 3\n", encoding="utf-8")  # after it was loaded: not what ran
    kept.put("key", {"loss": 0.4})
    assert harness.Kept("script").get("key") is None


def _module(file: Path) -> ModuleType:
    module = ModuleType(file.stem)
    module.__file__ = str(file)
    return module
