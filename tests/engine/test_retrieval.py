import numpy as np
import pytest

from dougong.engine.retrieval import ranks, ranks_among, recall_among, retrieval_metrics


def test_ranks_count_those_before_and_ties_count_against() -> None:
    score_NN = np.array([[0.9, 0.1, 0.2], [0.5, 0.5, 0.1], [0.3, 0.2, 0.1]], np.float32)
    assert ranks(score_NN).tolist() == [0, 1, 2]


def test_a_model_that_says_the_same_of_everything_finds_nothing() -> None:
    same_ND = np.ones((30, 4), np.float32) / 2
    metrics = retrieval_metrics(same_ND, same_ND, names=("words", "picture")).metrics
    assert metrics["recall_at_10"] == 0.0
    assert metrics["chance_at_10"] == pytest.approx(1 / 3)


def test_an_own_score_that_is_no_number_is_beaten_by_all() -> None:
    score_NN = np.array([[np.nan, 0.1], [0.0, 1.0]], np.float32)
    assert ranks(score_NN).tolist() == [1, 0]


def test_both_ways_are_judged() -> None:
    query_ND = np.eye(12, dtype=np.float32)
    gallery_ND = query_ND.copy()
    gallery_ND[2] = query_ND[3]  # queries 2 and 3 have it both: 2 finds nothing of its own, 3 is tied

    found = retrieval_metrics(query_ND, gallery_ND, names=("words", "picture"))

    assert found.num_records == 12
    assert found.metrics["words_to_picture_r1"] == pytest.approx(10 / 12)  # not 2, nor 3
    assert found.metrics["picture_to_words_r1"] == pytest.approx(11 / 12)  # not 2
    # Of 2, all eleven others score as high as its own, which is 0.
    assert found.metrics["words_to_picture_r10"] == pytest.approx(11 / 12)
    assert found.metrics["picture_to_words_r10"] == pytest.approx(11 / 12)
    assert found.metrics["recall_at_10"] == pytest.approx(11 / 12)


def test_a_score_that_is_no_number_beats_nothing() -> None:
    score = np.array([[0.9, np.nan, 0.1], [0.95, 0.9, np.nan], [0.1, 0.2, np.nan]])
    assert ranks(score).tolist() == [0, 1, 2]


def test_where_nobody_has_one_side_nothing_was_looked_for() -> None:
    there_ND, nothing_ND = np.eye(12, dtype=np.float32), np.zeros((12, 12), np.float32)
    for sides in ((there_ND, nothing_ND), (nothing_ND, there_ND)):
        found = retrieval_metrics(*sides, names=("words", "picture"))
        assert found.metrics.pop("chance_at_10") == pytest.approx(10 / 12)
        assert len(found.metrics) == 7
        assert all(np.isnan(value) for value in found.metrics.values())


def test_where_nobody_has_both_sides_nothing_could_be_found() -> None:
    half = np.arange(12)[:, None] < 6
    one_ND, other_ND = np.eye(12, dtype=np.float32) * half, np.eye(12, dtype=np.float32) * ~half
    found = retrieval_metrics(one_ND, other_ND, names=("words", "picture"))
    assert np.isnan(found.metrics["recall_at_10"])
    one_ND[6, 6] = 1.0  # of one record both are there
    assert retrieval_metrics(one_ND, other_ND, names=("words", "picture")).metrics["recall_at_10"] > 0


def test_what_is_left_out_counts_neither_way_and_several_may_ask_for_one_thing() -> None:
    score_NV = np.array([[0.5, 0.9, 0.7, 0.1], [0.5, 0.9, 0.7, 0.1], [0.2, 0.1, 0.2, np.nan]], np.float32)
    left_out_NV = np.zeros((3, 4), np.bool_)
    left_out_NV[1, 1] = True
    left_out_NV[2, 0] = True  # its own, which is looked for all the same

    found = ranks_among(score_NV, np.array([0, 0, 0]), left_out_NV)

    assert found.tolist() == [2, 1, 1]  # the tie counts against


def test_recall_and_chance_are_of_what_each_query_is_looked_for_among() -> None:
    thing_UD = np.eye(24, dtype=np.float32)
    left_out_UV = np.zeros((24, 24), np.bool_)
    left_out_UV[1] = True

    # The last asks for another's thing, and all others are as near or nearer: it finds nothing.
    found = recall_among(thing_UD, thing_UD, np.array([0, 1, 1, 2]), np.array([0, 1, 1, 3]), left_out_UV)

    chance = (10 / 24 + 1 + 1 + 10 / 24) / 4
    assert found == {"recall_at_10": pytest.approx(3 / 4), "chance_at_10": pytest.approx(chance)}
