"""What a search knows is kept, and kept whole."""

from pathlib import Path

from dougong.compress.candidate import Budget, Candidate, Point
from dougong.compress.known import Known
from dougong.compress.student import StudentConfig

BUDGET = Budget(size_bytes=100)
HALF = Candidate(student=StudentConfig(width=0.5))


def point(candidate: Candidate, size_bytes: int = 90) -> Point:
    return Point(candidate=candidate, num_parameters=10, size_bytes=size_bytes, latency_seconds=0.01, speedup=2.0)


def test_a_point_that_is_timed_again_keeps_what_it_lost(tmp_path: Path) -> None:
    known = Known(tmp_path / "points.json", BUDGET, ["eager"])
    known.put(point(HALF), loss=0.01, metric=0.9, steps=40)

    known.put_cost(point(HALF, 120).model_copy(update={"latency_seconds": 0.02}))

    (kept,) = Known(tmp_path / "points.json", BUDGET, ["eager"])  # as it would be found after a kill
    assert (kept.size_bytes, kept.latency_seconds) == (120, 0.02)
    assert (kept.loss, kept.metric, kept.steps) == (0.01, 0.9, 40)


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
