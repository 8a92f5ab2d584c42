import torch

from dougong.nn.batch import MediaBatch, only_media


def media(index: list[int], present: list[bool], there: list[bool] | None = None) -> MediaBatch:
    return MediaBatch(
        {"v": torch.arange(8.0).view(4, 2), "w": torch.arange(4)},
        torch.tensor(index),
        torch.tensor(present),
        None if there is None else torch.tensor(there),
        torch.tensor([[0.1], [0.2], [0.3], [0.4]]),
        torch.tensor([0.0, 0.25, 0.5, 0.75]),
    )


def test_media_that_nobody_has_any_more_are_left_out_and_the_others_stay_whose_they_were() -> None:
    got = only_media(media([3, 1, 0, 3, 2], [True, True, False, True, False]))

    assert got.values["w"].tolist() == [1, 3]
    assert got.values["v"].tolist() == [[2.0, 3.0], [6.0, 7.0]]
    assert got.index_B.tolist() == [1, 0, 0, 1, 0]
    assert got.quality_UQ is not None
    assert got.level_U is not None
    torch.testing.assert_close(got.quality_UQ, torch.tensor([[0.2], [0.4]]))
    assert got.level_U.tolist() == [0.25, 0.75]


def test_media_that_are_only_encoded_stay() -> None:
    got = only_media(media([3, 1, 0], [True, False, False], there=[True, True, False]))

    assert got.values["w"].tolist() == [1, 3]
    assert got.index_B.tolist() == [1, 0, 0]
    assert got.present_B.tolist() == [True, False, False]


def test_where_nobody_has_any_none_are_left_and_where_all_are_had_nothing_is_copied() -> None:
    assert only_media(media([3, 1], [False, False])).values["v"].shape == (0, 2)
    whole = media([0, 1, 2, 3], [True] * 4)
    assert only_media(whole) is whole
