"""Holds data/alignment.py to its promise: planted faults are found, clean and unrelated tables are left in peace, and
nothing trains what judges it."""

import itertools
from typing import Any

import numpy as np
import pytest
from data_builders import inline, rows
from PIL import Image

from dougong.data import alignment as alignment_module
from dougong.data.alignment import (
    Alignment,
    _distinct,
    _is_apart,
    _mismatched,
    _permuted,
    _Scorer,
    find_misaligned,
    suspicious_rows,
)
from dougong.data.columns import infer_roles
from dougong.data.table import Table

WORDS = ("red", "green", "blue", "grey", "pink", "brown", "lime", "teal")
NUM_ROWS = 320


def picture(colour: int, random: np.random.Generator) -> bytes:
    import io

    light = np.array([colour & 1, colour >> 1 & 1, colour >> 2 & 1]) * 180 + 40
    pixels = (light + random.integers(-35, 36, (12, 12, 3))).clip(0, 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def table(partner: Any = None, *, seed: int = 0, order: Any = None) -> Table:
    """Pictures of one colour, beside a text that names the colour of the row's partner."""
    random = np.random.default_rng(seed)
    colours = random.integers(0, 8, NUM_ROWS) if order is None else order
    partner = np.arange(NUM_ROWS) if partner is None else partner
    return rows(
        photo=[inline(picture(int(colour), random)) for colour in colours],
        remark=[f"the {WORDS[colours[other]]} one, number {other}, as it was seen" for other in partner],
        label=["no", "yes"] * (NUM_ROWS // 2),
    )


def colours_of(seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 8, NUM_ROWS)


def judged(found: Table, **options: Any) -> Alignment:
    roles = infer_roles(found, target="label", named={"remark": "text"})
    pairs = find_misaligned(found, {name: roles[name] for name in ("photo", "remark")}, **options)
    (only,) = pairs
    return only


def test_swapped_pairs_are_ranked_first() -> None:
    random = np.random.default_rng(1)
    colours = colours_of()
    swapped = random.permutation(NUM_ROWS)[:16]
    partner = np.arange(NUM_ROWS)
    partner[swapped] = np.roll(swapped, 1)
    wrong = set(np.flatnonzero(colours[partner] != colours).tolist())

    found = judged(table(partner))

    flagged = {pair.row for pair in found.suspicious if pair.flagged}
    assert len(wrong) >= 10
    assert len(flagged & wrong) >= 0.9 * len(wrong), found
    assert len(flagged & wrong) >= 0.75 * len(flagged)
    assert len({pair.row for pair in found.suspicious[: len(wrong)]} & wrong) >= len(wrong) - 1
    first = list(suspicious_rows([found, found._replace(suspicious=found.suspicious[1:2])]))[:2]
    assert first == [found.suspicious[1].row, found.suspicious[0].row]
    assert found.related
    assert 0.02 < found.misfit_share < 0.09
    assert found.verdict.startswith("related; up to ")


@pytest.mark.parametrize("seed", range(3))
def test_a_clean_table_is_left_in_peace(seed: int) -> None:
    found = judged(table(seed=seed), seed=seed)

    assert found.related
    assert found.auc > 0.9
    assert found.p_value <= 0.001
    assert (found.num_flagged, found.shift) == (0, 0)
    assert found.verdict == "related; no sign of mismatched pairs"


@pytest.mark.parametrize("seed", range(4))
def test_where_nothing_is_related_no_record_is_suspicious(seed: int) -> None:
    found = judged(table(np.random.default_rng(seed).permutation(NUM_ROWS)), seed=seed)

    assert not found.related
    assert found.suspicious == ()
    assert found.num_flagged == 0
    assert found.shift == 0
    assert 0.4 < found.auc < 0.6
    assert found.verdict == "no relation found: nothing can be said of single records"


def test_a_column_that_is_one_row_late_is_told() -> None:
    found = judged(table(np.roll(np.arange(NUM_ROWS), 1)))

    assert found.shift == 1
    assert found.auc < 0.6 < 0.9 < found.shift_auc
    assert found.shift_rows is not None
    assert found.shift_rows[0] <= 3
    assert found.shift_rows[1] >= NUM_ROWS - 5
    assert "looks shifted: in rows" in found.verdict


def test_a_row_lost_in_the_middle_is_told_with_its_place() -> None:
    partner = np.arange(NUM_ROWS)
    partner[NUM_ROWS // 2 :] -= 1

    found = judged(table(partner))

    assert found.shift == 1
    assert found.shift_rows is not None
    assert abs(found.shift_rows[0] - NUM_ROWS // 2) <= 4
    assert found.shift_rows[1] >= NUM_ROWS - 5


def test_rows_in_the_order_of_their_classes_are_not_called_shifted() -> None:
    found = judged(table(order=np.sort(colours_of())))

    assert found.related
    assert found.shift == 0


def test_weak_relations_and_few_classes_are_told_apart() -> None:
    """Two classes: half of the shuffled pairs are true ones, yet low scores are mismatched ones. Scores of two normal
    distributions a deviation apart: low scores are true pairs' as well."""
    random = np.random.default_rng(0)
    few = np.where(random.random(2000) < 0.05, -3.0, 3.0) + random.normal(0, 0.3, 2000)
    shuffled_few = np.where(random.random(20_000) < 0.5, -3.0, 3.0) + random.normal(0, 0.3, 20_000)
    weak, shuffled_weak = random.normal(1, 1, 2000), random.normal(0, 1, 20_000)

    assert _is_apart(few, shuffled_few)
    assert not _is_apart(weak, shuffled_weak)
    share, flagged = _mismatched(few, shuffled_few)
    # Of the 5 % lowest, half are what chance would pair anyway: the share of shuffled ones is twice that.
    assert share == pytest.approx(0.1, abs=0.02)
    assert flagged.sum() >= 0.9 * (few < 0).sum()
    assert (few[flagged] < 0).mean() > 0.9


def test_rare_pairs_of_few_values_are_no_mismatched_records() -> None:
    """A hundred templates and 13 answers: each pair stands many times, and a rare one is no record of its own."""
    questions, answers, images = pytest.importorskip("easy_vqa").get_train_questions()
    few = rows(
        question=questions[:36_000:9], answer=answers[:36_000:9], image=[str(image) for image in images[:36_000:9]]
    )
    roles = infer_roles(few, target="answer", named={"question": "text", "image": "ignore"})

    (found,) = find_misaligned(few, roles, unit="image")

    assert found.related
    assert found.num_pairs < 400
    assert (found.num_flagged, found.misfit_share) == (0, 0.0)


def test_what_a_unit_shares_is_no_relation() -> None:
    """Each speaker has a colour and a favourite word of his own: that says nothing of other speakers."""
    random = np.random.default_rng(0)
    speakers = np.repeat(np.arange(16), 20)
    table_of_units = rows(
        x=[random.normal(speaker * 37 % 16, 0.3) for speaker in speakers],
        y=[random.normal(speaker * 53 % 17, 0.3) for speaker in speakers],
        speaker=[f"s{speaker}" for speaker in speakers],
        label=[float(value) for value in random.normal(size=320)],
    )
    roles = infer_roles(table_of_units, target="y", named={"x": "number", "speaker": "ignore", "label": "ignore"})

    (apart,) = find_misaligned(table_of_units, roles, unit="speaker")
    (mixed,) = find_misaligned(table_of_units, roles)

    assert mixed.related
    assert not apart.related


def test_too_few_pairs_are_said_to_be_too_few() -> None:
    few = rows(x=[1.0, 2.0, 3.0] * 10, y=[1.0, 2.0, 3.0] * 10)
    roles = infer_roles(few, target="y", named={})

    (found,) = find_misaligned(few, roles)

    assert found.verdict == "3 distinct pairs in 3 units are too few to tell"
    assert not found.related


def test_the_score_is_the_log_likelihood_ratio_of_two_gaussians() -> None:
    correlation = np.array([0.8, 0.3])
    eye, zero = np.eye(2), np.zeros(2)
    scorer = _Scorer(eye, zero, eye, zero, correlation)
    u, v = np.array([[0.5, -1.0]]), np.array([[1.2, 0.4]])

    want = 0.0
    for a, b, r in zip(u[0], v[0], correlation, strict=True):
        both = np.linalg.inv([[1, r], [r, 1]])
        want += -0.5 * (np.array([a, b]) @ both @ np.array([a, b]) - a * a - b * b) - 0.5 * np.log(1 - r * r)

    assert scorer.scores(u, v)[0, 0] == pytest.approx(want, rel=1e-12)


def test_the_p_value_is_small_as_rarely_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alignment_module, "PERMUTATIONS", 99)
    count = np.arange(80)
    values = []
    for seed in range(60):
        random = np.random.default_rng(seed)
        x, y = random.standard_normal((80, 3)), random.standard_normal((80, 3))
        values.append(_permuted(x, y, _distinct(count, count, count, count), seed))

    # 60 draws of chance .1: 12 or more come with probability .02, and the seeds are fixed.
    assert sum(value <= 0.1 for value in values) < 12
    assert sum(value <= 0.01 for value in values) <= 2


def test_a_pair_that_repeats_is_judged_once_and_is_a_unit_by_itself() -> None:
    left, right = np.array([0, 0, 1, 0, -1]), np.array([0, 0, 1, 1, 1])
    unit, row = np.array([5, 6, 5, 5, 5]), np.array([10, 11, 12, 13, 14])

    found = _distinct(left, right, unit, row)

    assert list(zip(found.left_P.tolist(), found.right_P.tolist(), strict=True)) == [(0, 0), (1, 1), (0, 1)]
    assert found.row_P.tolist() == [10, 12, 13]
    assert found.unit_P[0] not in (5, 6)
    assert found.unit_P[1:].tolist() == [5, 5]


def test_a_large_table_is_looked_at_in_runs_of_neighbours() -> None:
    many = rows(x=[float(number) for number in range(30_000)], label=["no", "yes"] * 15_000)

    places = alignment_module._runs(many, 1000)

    seen = [int(many.first_rows[chunk] + place) for chunk, inner in places.items() for place in inner]
    assert 900 <= len(seen) <= 1100
    assert sum(b == a + 1 for a, b in itertools.pairwise(seen)) > 0.9 * len(seen)
    assert seen[0] == 0
    assert seen[-1] == 29_999
