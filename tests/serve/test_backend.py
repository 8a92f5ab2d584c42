"""What a worker does before it says that it is ready."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dougong.data.preparation import Preparation
from dougong.serve.backend import BundleBackend


def test_a_worker_is_warm_for_records_that_have_one_modality_alone(hollow_bundle: Path) -> None:
    asked: list[tuple[int, frozenset[str]]] = []

    def predict(records: Sequence[Mapping[str, Any]]) -> list[Any]:
        asked.append((len(records), frozenset(records[0])))
        return []

    preparation = Preparation.load(hollow_bundle)
    model: Any = SimpleNamespace(preparation=preparation, predict=predict)
    BundleBackend(model).warm()

    columns = [frozenset(each.columns) for each in preparation.modalities.values()]
    wanted = {frozenset[str](), frozenset[str]().union(*columns), *columns}
    for number in (1, 8):
        assert {shape for count, shape in asked if count == number} == wanted
