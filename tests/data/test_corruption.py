"""Holds data/corruption.py to its promise: level 0 is the medium itself, and neighbours say nothing of a medium."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_builders import array_cells, fitted, inline, npy, picture, rows, sound
from pydantic import ValidationError

from dougong.core.errors import ConfigError
from dougong.data.batch import BatchArrays
from dougong.data.collate import Collator, Request
from dougong.data.corruption import CorruptConfig, Corruption, corrupt, parse_corruption
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.position import Position
from dougong.data.preparation import Preparation
from dougong.data.table import Table

NUM = 24
WORDS = ["red", "green", "blue", "large", "small", "round"]


@pytest.fixture(scope="module")
def table() -> Table:
    """Each picture and each category shared by records; the rest is each one's own."""
    return rows(
        image=[inline(picture(seed=row % 8)) for row in range(NUM)],
        speech=[inline(sound(seed=row)) for row in range(NUM)],
        question=[f"is it {WORDS[row % 6]} or {WORDS[row % 5]} number {row}" for row in range(NUM)],
        age=[float(row) for row in range(NUM)],
        ecg=array_cells(NUM),
        scan=[npy(np.random.default_rng(row).random((4, 5, 6))) for row in range(NUM)],
        label=["no", "yes"] * (NUM // 2),
    )


@pytest.fixture(scope="module")
def preparation(table: Table) -> Preparation:
    return fitted(table, {"question": "text", "scan": "volume"})


def batch(table: Table, preparation: Preparation, chosen: Any = slice(None), **settings: Any) -> BatchArrays:
    numbers = np.arange(NUM)[chosen]
    held = table.column  # cells by column
    cells = {name: [held(name).to_pylist()[row] for row in numbers] for name in [*preparation.columns, "label"]}
    number = settings.pop("number", (0, 0))
    for name, column in settings.pop("cells", {}).items():
        cells[name] = column
    return Collator(preparation, Path(), **{"seed": 0, **settings})(Request(numbers, cells, number))


def own(found: BatchArrays, name: str, row: int) -> Any:
    """One record's values of one modality, padding left out, and its level."""
    place = found.row_B.tolist().index(row)
    media = found.media[name]
    medium = int(media.index_B[place])
    values = {key: value[medium] for key, value in media.values.items()}
    if "mask_UT" in values:
        mask = values["mask_UT"]
        values = {key: value[..., mask] for key, value in values.items()}
    assert media.level_U is not None
    return values, float(media.level_U[medium])


def assert_same(one: Any, other: Any) -> None:
    assert one[1] == other[1]
    for key, value in one[0].items():
        np.testing.assert_array_equal(value, other[0][key])


def test_level_0_is_the_medium_itself(table: Table, preparation: Preparation) -> None:
    random = np.random.default_rng(0)
    for name, modality in preparation.modalities.items():
        cells = tuple(table.column(column).to_pylist()[3] for column in modality.columns)
        medium = modality.decode(cells, Path())
        for kind in (*modality.damages, None):
            assert corrupt(modality, medium, kind, 0.0, random) is medium
            # A row's only number is never dropped.
            assert (corrupt(modality, medium, kind, 1.0, random) is medium) == (kind == "dropped")
        with pytest.raises(ConfigError, match=r"'smell' is no corruption of this modality\. Use one of"):
            corrupt(modality, medium, "smell", 0.5, random)
        assert Corruption(modality=name, level=0.5).kind is None


def test_any_kind_is_one_that_changes_the_medium() -> None:
    grey_table = rows(
        image=[inline(picture(seed=row, grey=True)) for row in range(NUM)], label=["no", "yes"] * (NUM // 2)
    )
    preparation = fitted(grey_table)
    image = preparation.modalities["image"]
    random = np.random.default_rng(0)
    for cell in grey_table.column("image").to_pylist():
        medium = image.decode((cell,), Path())
        assert corrupt(image, medium, "saturation", 1.0, random) is medium
        for _ in range(8):
            assert (corrupt(image, medium, None, 0.25, random) != medium).any()


def test_what_could_not_be_changed_is_not_told_as_spoilt() -> None:
    half = NUM // 2
    pictures = [picture(seed=row, grey=True) for row in range(half)] + [picture(seed=row) for row in range(half)]
    table = rows(image=[inline(one) for one in pictures], label=["no", "yes"] * half)
    colourless = Corruption(modality="image", kind="saturation", level=0.75)
    found = Collator(fitted(table), Path(), seed=0, corruptions=[colourless])(
        Request(np.arange(NUM), {name: table.column(name).to_pylist() for name in ("image", "label")}, (0, 0))
    )
    media = found.media["image"]
    assert media.level_U is not None
    assert media.level_U[media.index_B].tolist() == [0.0] * half + [0.75] * half


def test_a_batch_at_level_0_is_the_clean_batch(table: Table, preparation: Preparation) -> None:
    clean = batch(table, preparation)
    none = batch(table, preparation, corruptions=[Corruption(modality="image", level=0.0)])
    for name, media in clean.media.items():
        assert media.level_U is None
        assert none.media[name].level_U is not None
        assert none.media[name].level_U.dtype == np.float32  # type: ignore[union-attr]
        assert not none.media[name].level_U.any()  # type: ignore[union-attr]
        for key, values in media.values.items():
            np.testing.assert_array_equal(none.media[name].values[key], values)


def test_in_judging_a_medium_is_spoilt_the_same_way_in_whatever_batch(table: Table, preparation: Preparation) -> None:
    settings = {"corruptions": [Corruption(modality=name, level=0.6) for name in preparation.modalities]}
    whole = batch(table, preparation, **settings)
    some = batch(table, preparation, [5, 17, 2], number=(3, 9), **settings)
    for name in preparation.modalities:
        assert whole.media[name].level_U.tolist() == pytest.approx([0.6] * len(whole.media[name].level_U))  # type: ignore[union-attr, arg-type]
        for row in (5, 17, 2):
            assert_same(own(some, name, row), own(whole, name, row))
    other = batch(table, preparation, [5], seed=1, **settings)
    assert (other.media["image"].values["pixels_UCHW"][0] != own(whole, "image", 5)[0]["pixels_UCHW"]).any()


def test_in_training_media_are_spoilt_one_by_one(table: Table, preparation: Preparation) -> None:
    settings = CorruptConfig(chance={"image": 0.5, "speech": 0.25}, levels=(0.2, 0.6), spare_one=False)
    levels: dict[str, list[float]] = {name: [] for name in preparation.modalities}
    for number in range(40):
        found = batch(table, preparation, corrupt=settings, number=(0, number), augment=False)
        for name, media in found.media.items():
            assert media.level_U is not None
            levels[name] += media.level_U.tolist()
    spoilt = {name: np.array([level for level in own_levels if level]) for name, own_levels in levels.items()}
    assert len(spoilt["image"]) / len(levels["image"]) == pytest.approx(0.5, abs=0.1)
    assert len(spoilt["speech"]) / len(levels["speech"]) == pytest.approx(0.25, abs=0.06)
    assert not len(spoilt["question"])
    assert 0.2 <= spoilt["image"].min() < 0.25
    assert 0.55 < spoilt["image"].max() <= 0.6


def test_in_training_neither_a_neighbour_nor_a_bad_one_changes_a_medium(table: Table, preparation: Preparation) -> None:
    settings = {"corrupt": CorruptConfig(chance=0.7, spare_one=False), "number": (2, 5)}
    whole = batch(table, preparation, **settings)
    few = batch(table, preparation, [9, 4], **settings)
    cells = table.column("image").to_pylist()
    cells[0] = inline(b"no picture")
    spoilt = batch(table, preparation, cells={"image": cells}, **settings)
    assert [bad.row for bad in spoilt.bad] == [0]
    for name in preparation.modalities:
        for row in (4, 9):
            assert_same(own(few, name, row), own(whole, name, row))
            assert_same(own(spoilt, name, row), own(whole, name, row))


def test_a_batch_made_again_is_spoilt_again_the_same(table: Table, preparation: Preparation) -> None:
    def made(workers: int) -> list[BatchArrays]:
        config = LoaderConfig(batch_size=7, workers=workers)
        loader = Loader(table, preparation, config, train=True, corrupt=CorruptConfig(chance=0.8), quality=True)
        batches = loader.batches(Position(0, 1))
        return [next(batches)[1] for _ in range(3)]

    for one, other in zip(made(0), made(1), strict=True):
        for name, media in one.media.items():
            np.testing.assert_array_equal(media.level_U, other.media[name].level_U)
            np.testing.assert_array_equal(media.quality_UQ, other.media[name].quality_UQ)
            for key, values in media.values.items():
                np.testing.assert_array_equal(values, other.media[name].values[key])


def spoilt_share(found: BatchArrays) -> np.ndarray[Any, Any]:
    return np.stack([media.level_U[media.index_B] > 0 for media in found.media.values()], axis=1)  # type: ignore[index]


def test_a_record_of_two_or_more_keeps_one_as_it_was(table: Table, preparation: Preparation) -> None:
    always = batch(table, preparation, corrupt=CorruptConfig(chance=1.0))
    clean = batch(table, preparation)
    share_BM = spoilt_share(always)
    assert (share_BM.sum(axis=1) < share_BM.shape[1]).all()
    assert share_BM.mean() > 0.6
    for name, media in always.media.items():
        assert media.level_U is not None
        for medium in np.flatnonzero(media.level_U == 0):
            for key, values in media.values.items():
                length = clean.media[name].values[key].shape[-1]
                np.testing.assert_array_equal(values[medium][..., :length], clean.media[name].values[key][medium])
    strong = CorruptConfig(chance=1.0, levels=(0.8, 1.0), spare_one=False)
    assert spoilt_share(batch(table, preparation, corrupt=strong)).all()


def test_the_one_that_is_kept_is_the_least_spoilt(table: Table, preparation: Preparation) -> None:
    two = preparation.only(("speech", "question"))
    every = batch(table, two, corrupt=CorruptConfig(chance=1.0, spare_one=False))
    spared = batch(table, two, corrupt=CorruptConfig(chance=1.0))
    for row in range(NUM):
        levels = {name: own(every, name, row)[1] for name in two.modalities}
        kept = min(levels, key=levels.__getitem__)
        assert {name for name in levels if own(spared, name, row)[1] == 0} == {kept}


def test_a_record_of_one_modality_is_not_spared(table: Table, preparation: Preparation) -> None:
    alone = batch(table, preparation.only(("speech",)), corrupt=CorruptConfig(chance=1.0))
    assert (alone.media["speech"].level_U > 0).all()  # type: ignore[operator]


def test_what_the_cache_holds_is_never_spoilt(table: Table, preparation: Preparation) -> None:
    collate = Collator(preparation, Path(), seed=0, corrupt=CorruptConfig(chance={"image": 1.0, "ecg": 1.0}))
    numbers = np.arange(8)
    cells = {name: table.column(name).to_pylist()[:8] for name in [*preparation.columns, "label"]}
    first = collate(Request(numbers, cells, (0, 0)))
    collate(Request(numbers, cells, (0, 1)))
    again = collate(Request(numbers, cells, (0, 0)))
    for name in ("image", "ecg"):
        for key, values in first.media[name].values.items():
            np.testing.assert_array_equal(again.media[name].values[key], values)


def test_only_the_kinds_that_were_named_come(table: Table, preparation: Preparation) -> None:
    settings = CorruptConfig(chance={"question": 1.0}, kinds={"question": ("delete",)}, levels=(1.0, 1.0))
    found, clean = batch(table, preparation, corrupt=settings), batch(table, preparation)
    for row in range(NUM):
        left = iter(own_ids(clean, row))
        assert all(token in left for token in own_ids(found, row))
        assert len(own_ids(found, row)) < len(own_ids(clean, row))


def own_ids(found: BatchArrays, row: int) -> list[int]:
    media = found.media["question"]
    medium = media.index_B[row]
    return media.values["ids_UT"][medium][media.values["mask_UT"][medium]].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("image=0.5", Corruption(modality="image", level=0.5)),
        ("image:blur=1", Corruption(modality="image", kind="blur", level=1.0)),
        ("a:b:mask=0", Corruption(modality="a:b", kind="mask", level=0.0)),
    ],
)
def test_a_corruption_reads_as_it_is_written(text: str, wanted: Corruption) -> None:
    assert parse_corruption(text) == wanted
    assert parse_corruption(str(wanted)) == wanted


@pytest.mark.parametrize("text", ["image", "image=", "image=much", "image=1.5", "image=-0.1", "image=nan", "=0.5", ""])
def test_what_is_no_corruption_is_told_what_would_be(text: str) -> None:
    with pytest.raises(ConfigError, match=r"does not read MODALITY=LEVEL .* Use for example --corrupt image:blur=0.5"):
        parse_corruption(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"corruptions": [Corruption(modality="smell", level=1)]}, "corruption names 'smell', which is no modality"),
        ({"corruptions": [Corruption(modality="image", kind="mask", level=1)]}, "'mask' is no corruption of 'image'"),
        ({"corruptions": [Corruption(modality="image", level=1)] * 2}, "corruption names 'image' twice"),
        ({"corrupt": CorruptConfig(chance={"smell": 0.5})}, "corruption names 'smell'"),
        ({"corrupt": CorruptConfig(kinds={"image": ("mask",)})}, "'mask' is no corruption of 'image'. Use one of gau"),
        (
            {"corrupt": CorruptConfig(), "corruptions": [Corruption(modality="image", level=1)]},
            "corrupt and corruptions both say what is spoilt",
        ),
    ],
)
def test_what_cannot_take_effect_is_refused(preparation: Preparation, settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Collator(preparation, Path(), seed=0, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chance": 1.5}, r"1\.5 is no chance"),
        ({"chance": {"image": -1}}, r"-1\.0 is no chance"),
        ({"levels": (0.6, 0.2)}, r"is no range from weak to strong"),
        ({"levels": (0.0, 0.0)}, r"is no range from weak to strong"),
        ({"levels": (0.0, 2.0)}, r"2\.0 is no level"),
        ({"kinds": {"image": ()}}, "kinds of 'image' are none"),
        ({"chance": {"speech": 0.5}, "kinds": {"image": ("blur",)}}, "kinds of 'image' can take no effect"),
    ],
)
def test_settings_without_sense_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        CorruptConfig(**settings)


def test_for_fewer_modalities_the_rest_is_left_out() -> None:
    config = CorruptConfig(chance={"image": 0.5, "speech": 0.2}, kinds={"image": ("blur",)})
    assert config.only(("speech", "question")) == CorruptConfig(chance={"speech": 0.2})
    assert config.only(("question",)) is None
    assert CorruptConfig().only(("question",)) == CorruptConfig()


def test_a_weak_damage_that_changes_nothing_is_not_made_up_for_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def rarely(medium: Any, level: float, random: np.random.Generator) -> Any:
        return medium + 1 if level > random.random() else medium

    def never(medium: Any, level: float, random: np.random.Generator) -> Any:
        return medium

    class Thing:
        damages = {"one": rarely, "two": rarely, "three": rarely, "none": never}

    medium, random = np.zeros(3), np.random.default_rng(0)
    changed = sum(bool(corrupt(Thing(), medium, None, 0.1, random).any()) for _ in range(2000))  # type: ignore[arg-type]
    assert 0.07 < changed / 2000 < 0.13
