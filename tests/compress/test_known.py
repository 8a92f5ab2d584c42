"""What a search knows is kept, and kept whole."""

from pathlib import Path
from typing import Any

from dougong.compress.candidate import Budget, Candidate, Point
from dougong.compress.draft import Drafting
from dougong.compress.known import Known
from dougong.compress.search_config import SearchConfig
from dougong.compress.student import StudentConfig

BUDGET = Budget(size_bytes=100)
HALF = Candidate(student=StudentConfig(width=0.5))


def point(candidate: Candidate, size_bytes: int = 90) -> Point:
    return Point(candidate=candidate, num_parameters=10, size_bytes=size_bytes, latency_seconds=0.01, speedup=2.0)


def test_a_point_that_is_timed_again_keeps_what_it_lost(tmp_path: Path) -> None:
    known = Known(tmp_path / "points.json", BUDGET, ["eager"])
    known.put(point(HALF), loss=0.01, metric=0.9, steps=40)

    known.put_cost(point(HALF, 120).model_copy(update={"latency_seconds": 0.02}), draft=False)

    (kept,) = Known(tmp_path / "points.json", BUDGET, ["eager"])  # as it would be found after a kill
    assert (kept.size_bytes, kept.latency_seconds) == (120, 0.02)
    assert (kept.loss, kept.metric, kept.steps) == (0.01, 0.9, 40)


def test_a_draft_that_is_measured_again_is_ranked_as_before(tmp_path: Path) -> None:
    """Else a search that goes on would take in another shape."""
    known = Known(tmp_path / "points.json", BUDGET, ["eager"])
    known.put_cost(point(HALF), draft=True)
    known.put_cost(point(Candidate(student=StudentConfig(width=0.75)), 110), draft=True)
    known.put(known.of(HALF), step_seconds=0.5)

    known.put_cost(point(HALF, 101), draft=False)

    again = Known(tmp_path / "points.json", BUDGET, ["eager"])
    assert [each.candidate for each in again.drafted()] == [HALF]
    assert again.fitting() == []
    assert again.step_seconds(HALF.model_copy(update={"engine": "openvino"})) == 0.5


def test_only_what_was_asked_for_is_offered(tmp_path: Path) -> None:
    known = Known(tmp_path / "points.json", BUDGET, ["openvino"])
    there = HALF.model_copy(update={"engine": "openvino"})
    large = there.model_copy(update={"bits": {"all": "w16a16"}})
    for each in (point(Candidate()), point(HALF), point(there), point(large, 110)):
        known.put(each)

    assert [each.candidate for each in known.offered()] == [there, large]
    assert [each.candidate for each in known.fitting()] == [there]
    assert [each.candidate for each in known.of_shape(HALF)] == [there]
    assert HALF in known
    assert HALF.model_copy(update={"keep": 0.5}) not in known


def test_what_was_recovered_foretells_nothing(tmp_path: Path) -> None:
    """Its weights were taught anew: no shape has them in torch, against which it could be held."""
    known = Known(tmp_path / "points.json", BUDGET, ["openvino"])
    rounded = HALF.model_copy(update={"engine": "openvino", "bits": {"all": "w8a8"}})
    other = Candidate(student=StudentConfig(width=0.25))
    for each in (HALF, other, rounded.model_copy(update={"recovered": True})):
        known.put(point(each))
    nothing: Any = None
    drafting = Drafting(nothing, known, BUDGET, SearchConfig(), nothing, print)

    wanted = other.model_copy(update={"engine": "openvino", "bits": {"all": "w8a8"}})
    assert drafting._foretold(known.of(other), wanted) is None
    known.put(point(rounded))
    foretold = drafting._foretold(known.of(other), wanted)
    assert foretold is not None
    assert foretold.candidate == wanted
