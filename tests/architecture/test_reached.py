"""What a kept figure stands on."""

import importlib
import subprocess
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
    for name in ("harness", "current"):
        sys.modules.pop(name, None)


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


def test_a_result_is_current_while_sources_do_the_same_whatever_they_say(
    harness: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    current = importlib.import_module("current")
    monkeypatch.setattr(current, "ROOT", tmp_path)
    monkeypatch.setattr(current, "RESULTS", tmp_path / "benchmarks" / "results")
    monkeypatch.setattr(current, "reached", lambda script: [script])

    def git(*arguments: str) -> str:
        named = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", *named, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    script = tmp_path / "benchmarks" / "script.py"
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    script.write_text('"""Says one thing."""\n\nx = 1\n', encoding="utf-8")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    said = f"- command: `python benchmarks/script.py --write`\n- commit: {git('rev-parse', '--short', 'HEAD')}\n"
    (tmp_path / "benchmarks" / "results" / "one.md").write_text(said, encoding="utf-8")

    def differing() -> list[str]:
        for cached in (current._differs, current._touched, current._sources):
            cached.cache_clear()
        (found,) = current.results()
        return list(found.differing)

    script.write_text('"""Says another thing."""\n\n# and more\nx = 1\n', encoding="utf-8")
    assert differing() == []
    script.write_text('"""Says one thing."""\n\nx = 2\n', encoding="utf-8")
    assert differing() == ["benchmarks/script.py"]
