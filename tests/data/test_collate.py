"""Holds data/collate.py to its promise: shared media once, bad records aside, and a batch made again anywhere."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from data_builders import LABELS, array_cells, fitted, inline, picture, rows, sound
from pydantic import ValidationError

from dougong.core.errors import ConfigError
from dougong.core.signature import Target
from dougong.data.batch import BatchArrays
from dougong.data.collate import Collator, Request, View, _Cache
from dougong.data.modality.image import ImageAugment, ImageModality
from dougong.data.preparation import Preparation

IMAGES = [inline(picture(seed=seed)) for seed in range(4)]


@pytest.fixture(scope="module")
def preparation() -> Preparation:
    table = rows(
        image=IMAGES,
        speech=[inline(sound(seed=seed)) for seed in range(4)],
        question=["what is it", "who is it", "where is it", "why is it"],
        age=[1.0, 2.0, 3.0, 4.0],
        ecg=array_cells(4),
        label=["no", "yes"] * 2,
    )
    return fitted(table, {"question": "text"}, image_augment=ImageAugment(flip=True, shift_pixels=2))


def request(
    preparation: Preparation, num_rows: int = 4, *, number: tuple[int, int] = (0, 0), **columns: Any
) -> Request:
    """Cells that are good, but for the columns given."""
    good: dict[str, list[Any]] = {
        "image": [IMAGES[row % 4] for row in range(num_rows)],
        "speech": [inline(sound(seed=row % 4)) for row in range(num_rows)],
        "question": ["what is it"] * num_rows,
        "age": [float(row) for row in range(num_rows)],
        "ecg": array_cells(num_rows),
        "label": ["no"] * num_rows,
    }
    wanted = [*preparation.columns, "label"]
    return Request(np.arange(100, 100 + num_rows), {**{name: good[name] for name in wanted}, **columns}, number)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[Any]:
    """How often each picture was decoded."""
    counts: Counter[Any] = Counter()
    real = ImageModality.decode

    def counted(self: ImageModality, cells: tuple[Any, ...], folder: Path) -> Any:
        counts[self.key(cells)] += 1
        return real(self, cells, folder)

    monkeypatch.setattr(ImageModality, "decode", counted)
    return counts


def collator(preparation: Preparation, **settings: Any) -> Collator:
    return Collator(preparation, Path(), **{"seed": 0, **settings})


def present(batch: BatchArrays) -> npt.NDArray[np.bool_]:
    return np.stack([media.present_B for media in batch.media.values()], axis=1)


def assert_alike(one: BatchArrays, other: BatchArrays) -> None:
    np.testing.assert_array_equal(one.row_B, other.row_B)
    np.testing.assert_array_equal(one.target, other.target)
    assert one.bad == other.bad
    for name, media in one.media.items():
        np.testing.assert_array_equal(media.index_B, other.media[name].index_B)
        np.testing.assert_array_equal(media.present_B, other.media[name].present_B)
        for key, values in media.values.items():
            np.testing.assert_array_equal(values, other.media[name].values[key])


def test_a_medium_that_records_share_is_decoded_and_stands_once(
    preparation: Preparation, decoded: Counter[Any]
) -> None:
    shared = [IMAGES[place] for place in (0, 1, 0, 0)]
    batch = collator(preparation, cache_bytes=0)(request(preparation, image=shared))
    assert sorted(decoded.values()) == [1, 1]
    assert batch.media["image"].values["pixels_UCHW"].shape[0] == 2
    assert batch.media["image"].index_B.tolist() == [0, 1, 0, 0]


def test_a_medium_that_the_cache_holds_is_not_decoded_again(preparation: Preparation, decoded: Counter[Any]) -> None:
    collate = collator(preparation)
    for number in range(3):
        collate(request(preparation, number=(0, number)))
    assert sorted(decoded.values()) == [1, 1, 1, 1]


def test_a_bad_medium_is_tried_once_and_said_of_every_record(preparation: Preparation, decoded: Counter[Any]) -> None:
    collate = collator(preparation)
    for _ in range(2):
        batch = collate(request(preparation, image=[inline(b"no"), IMAGES[0], inline(b"no"), None]))
        assert [tuple(bad) for bad in batch.bad] == [
            (100, "image", "is not a picture"),
            (102, "image", "is not a picture"),
        ]
        assert batch.row_B.tolist() == [101, 103]
    assert sorted(decoded.values()) == [1, 1]


@pytest.mark.parametrize("column", ["image", "speech", "question", "age", "ecg", "label"])
def test_one_bad_cell_never_costs_a_neighbour(preparation: Preparation, column: str) -> None:
    whole = collator(preparation)(request(preparation))
    cells = list(request(preparation).cells[column])
    cells[2] = {"strange": [1]}
    batch = collator(preparation)(request(preparation, **{column: cells}))
    assert [(bad.row, bad.column) for bad in batch.bad] == [(102, "table" if column == "age" else column)]
    assert batch.row_B.tolist() == [100, 101, 103]
    for name, media in whole.media.items():
        for key, values in media.values.items():
            left = batch.media[name]
            np.testing.assert_array_equal(left.values[key][left.index_B], values[media.index_B[[0, 1, 3]]])


def test_the_first_reason_stands_where_there_are_two(preparation: Preparation) -> None:
    batch = collator(preparation)(request(preparation, 1, image=[b"no"], label=["maybe"]))
    assert [tuple(bad) for bad in batch.bad] == [(100, "image", "is not a picture")]


@pytest.mark.parametrize(
    ("target", "shape", "kind"),
    [
        (LABELS, (0,), np.int64),
        (Target(name="label", task="multi_label", labels=("a", "b", "c")), (0, 3), np.float32),
        (Target(name="label", task="regression"), (0,), np.float32),
    ],
)
def test_a_batch_of_bad_records_alone_keeps_its_shapes(
    preparation: Preparation, target: Target, shape: tuple[int, ...], kind: Any
) -> None:
    batch = collator(Preparation(preparation.modalities, target))(request(preparation, 2, label=[None, None]))
    assert batch.target is not None
    assert (batch.target.shape, batch.target.dtype) == (shape, kind)
    assert [bad.reason for bad in batch.bad] == ["the target is missing"] * 2
    assert batch.media["image"].values["pixels_UCHW"].shape == (0, 3, 16, 16)


@pytest.mark.parametrize("column", ["image", "speech", "question", "age", "ecg"])
def test_any_value_may_be_missing_in_any_record(preparation: Preparation, column: str) -> None:
    cells = request(preparation).cells[column]
    batch = collator(preparation)(request(preparation, **{column: [None, cells[1], None, cells[3]]}))
    name = "table" if column == "age" else column
    assert batch.bad == ()
    assert batch.media[name].present_B.tolist() == [False, True, False, True]
    assert all(media.present_B.all() for other, media in batch.media.items() if other != name)


def test_a_record_with_nothing_at_all_is_a_record(preparation: Preparation) -> None:
    batch = collator(preparation)(request(preparation, 2, **{name: [None, None] for name in preparation.columns}))
    assert batch.row_B.tolist() == [100, 101]
    assert not present(batch).any()


def test_without_a_target_column_there_is_no_target(preparation: Preparation) -> None:
    asked = request(preparation)
    del asked.cells["label"]
    assert collator(preparation)(asked).target is None


@pytest.mark.parametrize(
    "settings",
    [
        {"augment": True, "withhold": 0.4},
        {"augment": True, "views": (View(keep=("image",)), View(keep=("speech", "question")))},
    ],
)
def test_a_batch_depends_on_its_records_the_seed_and_its_number_alone(
    preparation: Preparation, settings: dict[str, Any]
) -> None:
    asked = request(preparation, 32, number=(3, 7))
    busy, fresh = collator(preparation, **settings), collator(preparation, cache_bytes=0, **settings)
    for number in range(3):
        busy(request(preparation, number=(0, number)))
    want = fresh(asked)
    assert_alike(busy(asked), want)
    for others in (collator(preparation, **{**settings, "seed": 1})(asked), fresh(asked._replace(number=(3, 8)))):
        assert not np.array_equal(present(others), present(want))
        pixels = [batch.media["image"].values["pixels_UCHW"] for batch in (others, want)]
        assert not np.array_equal(*pixels)


def test_every_batch_is_augmented_in_its_own_way(preparation: Preparation) -> None:
    collate = collator(preparation, augment=True)
    pixels = [
        collate(request(preparation, number=number)).media["image"].values["pixels_UCHW"]
        for number in ((0, 0), (0, 1), (1, 0), (0, 0))
    ]
    np.testing.assert_array_equal(pixels[0], pixels[3])
    assert all(not np.array_equal(pixels[0], other) for other in pixels[1:3])


def test_a_withheld_modality_leaves_every_record_something(preparation: Preparation) -> None:
    collate = collator(preparation, withhold=0.9)
    alone = [None] * 200
    batch = collate(request(preparation, 200, image=[IMAGES[0]] * 100 + alone[:100], speech=alone))
    kept = present(batch)
    assert kept.any(axis=1).all()
    has = np.stack([np.arange(200) < 100, np.zeros(200), np.ones(200), np.ones(200), np.ones(200)], axis=1)
    assert not (kept & ~has.astype(bool)).any()
    assert kept[:100, 0].mean() < 0.9
    assert not collator(preparation)(request(preparation)).bad


def test_what_is_withheld_beside_is_encoded_and_hidden_as_it_would_be_otherwise(preparation: Preparation) -> None:
    asked = request(preparation, 50, image=[IMAGES[0]] * 40 + [None] * 10)
    beside = collator(preparation, withhold=0.5, withheld_beside=True)(asked)
    plain = collator(preparation, withhold=0.5)(asked)

    np.testing.assert_array_equal(present(beside), present(plain))
    assert not present(beside).all()
    for name, media in beside.media.items():
        assert media.there_B is not None
        assert media.there_B.tolist() == [name != "image" or row < 40 for row in range(50)]


def test_what_is_withheld_is_not_decoded_and_cannot_be_bad(preparation: Preparation, decoded: Counter[Any]) -> None:
    collate = collator(preparation, views=(View(keep=("question",)),))
    batch = collate(request(preparation, image=[inline(b"no")] * 4))
    assert batch.bad == ()
    assert not decoded
    assert present(batch)[:, list(preparation.modalities).index("question")].all()
    assert present(batch).sum() == 4


def views_seen(preparation: Preparation, views: tuple[View, ...], **settings: Any) -> list[list[str]]:
    batch = collator(preparation, views=views)(request(preparation, 400, **settings))
    names = np.array(list(preparation.modalities))
    return [sorted(names[row]) for row in present(batch)]


def test_views_are_seen_by_weight() -> None:
    table = rows(question=["a b c", "d e f"], age=[1.0, 2.0], label=["no", "yes"])
    small = fitted(table, {"question": "text"})
    seen = views_seen(small, (View(keep=("question",), weight=3.0), View(keep=("table",))))
    assert 0.68 < seen.count(["question"]) / 400 < 0.82
    assert seen.count(["question"]) + seen.count(["table"]) == 400


@pytest.mark.parametrize(
    ("epoch", "want"), [(0, {"question"}), (1, {"question", "table"}), (2, {"table"}), (3, {"table"})]
)
def test_views_come_and_go_with_the_epochs(epoch: int, want: set[str]) -> None:
    small = fitted(rows(question=["a b c", "d e f"], age=[1.0, 2.0], label=["no", "yes"]), {"question": "text"})
    views = (View(keep=("question",), until_epoch=2), View(keep=("table",), from_epoch=1))
    assert {name for seen in views_seen(small, views, number=(epoch, 0)) for name in seen} == want


def test_an_epoch_that_no_view_is_meant_for_sees_them_all() -> None:
    small = fitted(rows(question=["a b c", "d e f"], age=[1.0, 2.0], label=["no", "yes"]), {"question": "text"})
    views = (View(keep=("question",), from_epoch=5), View(keep=("table",), from_epoch=5))
    assert {name for seen in views_seen(small, views) for name in seen} == {"question", "table"}


def test_what_stands_beside_a_view_is_there_and_not_present(preparation: Preparation) -> None:
    views = (View(keep=("image",), beside=("speech",)),)
    batch = collator(preparation, views=views)(request(preparation, speech=[None, *[inline(sound(seed=1))] * 3]))

    heard, seen = batch.media["speech"], batch.media["image"]
    assert len(heard.values["samples_UT"]) == 1
    assert heard.there_B is not None
    assert heard.there_B.tolist() == [False, True, True, True]
    assert not heard.present_B.any()
    assert seen.present_B.all()


def test_one_view_a_batch_shows_all_its_records_alike(preparation: Preparation) -> None:
    views = (View(keep=("image",)), View(keep=("question", "speech")))
    collate = collator(preparation, views=views, one_view_a_batch=True)
    seen = set()
    for number in range(20):
        kept = present(collate(request(preparation, 8, number=(0, number))))
        assert (kept == kept[0]).all()
        seen.add(tuple(kept[0]))
    assert len(seen) == 2


def test_a_view_gives_nothing_that_a_record_lacks(preparation: Preparation) -> None:
    collate = collator(preparation, views=(View(keep=("image", "question")),))
    kept = present(collate(request(preparation, 2, image=[None, IMAGES[0]])))
    assert kept[:, 0].tolist() == [False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"views": (View(keep=("image",)),), "withhold": 0.1}, "views and withhold both say what is left out"),
        ({"one_view_a_batch": True}, "one_view_a_batch has no views to choose from"),
        ({"withhold": 1.0}, r"withhold 1\.0 is no chance\. Use 0 or more and less than 1"),
        ({"withhold": -0.1}, r"withhold -0\.1 is no chance"),
    ],
)
def test_settings_that_cannot_take_effect_are_refused(
    preparation: Preparation, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        collator(preparation, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0.0}, r"0\.0 must be above 0: a view that is never seen is no view"),
        ({"weight": float("nan")}, "nan must be above 0"),
        ({"from_epoch": 2, "until_epoch": 2}, "until_epoch 2 must be above from_epoch 2: a view that is never seen"),
    ],
)
def test_a_view_that_is_never_seen_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        View(keep=("image",), **settings)


def test_the_cache_stays_within_its_bytes_whatever_is_the_larger_part() -> None:
    for key, medium in ((("x" * 2000, 7), np.zeros(1)), ("k", np.zeros(250)), ("k", "reason " * 285)):
        cache = _Cache(20_000)
        for number in range(100):
            cache.put((number, key), medium)
        kept = [number for number in range(100) if cache.get((number, key)) is not None]
        assert kept == list(range(100 - len(kept), 100))
        assert 5 <= len(kept) <= 10


def test_the_cache_forgets_what_was_not_used_for_longest() -> None:
    cache = _Cache(20_000)
    for number in range(100):
        cache.put(number, np.zeros(250))
        assert cache.get(0) is not None
    assert cache.get(1) is None


def test_a_medium_larger_than_the_cache_is_not_kept() -> None:
    cache = _Cache(1000)
    cache.put("small", np.zeros(1))
    cache.put("large", np.zeros(1000))
    assert cache.get("large") is None
    assert cache.get("small") is not None
