"""What a kept figure stands on."""

import importlib.util
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_a_scripts_sources_are_those_its_imports_reach() -> None:
    spec = importlib.util.spec_from_file_location("harness", BENCHMARKS / "harness.py")
    assert spec is not None
    assert spec.loader is not None
    harness = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(harness)

    found = {file.relative_to(BENCHMARKS.parent).as_posix() for file in harness.reached(BENCHMARKS / "segments.py")}

    assert {"benchmarks/segments.py", "benchmarks/activations.py", "benchmarks/harness.py"} <= found
    assert {"src/dougong/__init__.py", "src/dougong/engine/step.py", "src/dougong/core/files.py"} <= found
    assert "benchmarks/fusion.py" not in found
    assert not [file for file in found if file.startswith("src/dougong/watch/")]
