"""Holds data/damage/ to its promises: new arrays of the same kind, graded, and something left at the strongest."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from dougong.data.damage.damage import Damage, about
from dougong.data.damage.numbers import SIGNALS, VOLUMES, rows
from dougong.data.damage.pictures import PICTURES, blur_matrix
from dougong.data.damage.sounds import noise_decibels, sounds
from dougong.data.damage.words import Vocabulary, vocabulary_of, words
from dougong.data.modality.audio import KEPT_SCALE
from dougong.data.modality.text import learn_tokenizer

Array = npt.NDArray[Any]
RATE = 8000
SOUNDS = sounds(RATE, KEPT_SCALE)
TOKENIZER = learn_tokenizer(["what colour is the large circle in the picture", "is there a small blue square"], 300)
VOCABULARY = vocabulary_of(TOKENIZER)
WORDS = words(TOKENIZER, VOCABULARY)
ROWS = rows(3, (4, 5))


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def picture() -> Array:
    """Smooth colours and one edge."""
    y, x = np.mgrid[0:32, 0:40]
    pixels = np.stack([4 * y + 40, 5 * x + 20, np.where(x > 22, 200, 60)], axis=2)
    return pixels.astype(np.uint8)


def sound(seconds: float = 1.0) -> Array:
    """A tone that comes and goes, as decoding keeps it."""
    t = np.arange(int(seconds * RATE)) / RATE
    samples = np.sin(2 * np.pi * 440 * t) * (0.1 + np.square(np.sin(2 * np.pi * 2 * t)))
    return (samples / samples.std() * KEPT_SCALE).astype(np.int16)


def text() -> Array:
    return np.array(TOKENIZER.encode("what colour is the large circle in the picture").ids, np.int64)


def row() -> Array:
    return np.array([0.5, np.nan, -1.0, 2.0, 0.0])


def signal() -> Array:
    return np.sin(np.arange(400, dtype=np.float32) / 9).reshape(2, 200)


def volume() -> Array:
    return np.sin(np.arange(8 * 9 * 10, dtype=np.float32) / 7).reshape(8, 9, 10)


CASES: list[tuple[Mapping[str, Damage], Callable[[], Array]]] = [
    (PICTURES, picture),
    (SOUNDS, sound),
    (WORDS, text),
    (ROWS, row),
    (SIGNALS, signal),
    (VOLUMES, volume),
]
EACH = [pytest.param(known[name], make, id=f"{make.__name__}-{name}") for known, make in CASES for name in known]


@pytest.mark.parametrize(("damage", "make"), EACH)
def test_a_damage_gives_a_new_array_of_the_same_kind(damage: Damage, make: Callable[[], Array]) -> None:
    medium = make()
    medium.flags.writeable = False
    for level in (1e-3, 0.5, 1.0):
        spoilt = damage(medium, level, random())
        assert spoilt is not medium
        assert not np.shares_memory(spoilt, medium)
        assert spoilt.dtype == medium.dtype
        assert spoilt.ndim == medium.ndim
        if make is not text:
            assert spoilt.shape == medium.shape
    np.testing.assert_array_equal(medium, make())


@pytest.mark.parametrize(("damage", "make"), EACH)
def test_the_same_chance_gives_the_same_damage(damage: Damage, make: Callable[[], Array]) -> None:
    np.testing.assert_array_equal(damage(make(), 0.7, random(3)), damage(make(), 0.7, random(3)))


def distance(one: Array, other: Array) -> float:
    """Mean change; of texts the share of places, of rows with what is lost counted as far off."""
    if one.dtype == np.int64:
        size = max(len(one), len(other))
        return sum(a != b for a, b in zip(one, other, strict=False)) / size + abs(len(one) - len(other)) / size
    if one.dtype == np.float64:
        return float(np.abs(np.nan_to_num(one, nan=9.0) - np.nan_to_num(other, nan=9.0)).mean())
    return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).mean())


@pytest.mark.parametrize(("damage", "make"), EACH)
def test_a_stronger_damage_takes_a_medium_farther(damage: Damage, make: Callable[[], Array]) -> None:
    medium = make()
    far = [
        float(np.mean([distance(medium, damage(medium, level, random(seed))) for seed in range(40)]))
        for level in (0.1, 0.4, 1.0)
    ]
    assert 0 < far[0] < far[1] < far[2]


def test_about_has_the_mean_that_was_wanted() -> None:
    chance = random()
    drawn = [about(1.3, chance) for _ in range(4000)]
    assert set(drawn) == {1, 2}
    assert np.mean(drawn) == pytest.approx(1.3, abs=0.03)


# Pictures --------------------------------------------------------------------------------------------------------


def test_gaussian_noise_of_a_picture_has_the_stated_deviation() -> None:
    grey = np.full((64, 64, 3), 128, np.uint8)
    spoilt = PICTURES["gaussian"](grey, 0.25, random())
    assert spoilt.std() == pytest.approx(255 * 0.4 * 0.25, rel=0.02)


def test_blurring_keeps_the_sum_of_a_point_and_an_even_picture() -> None:
    matrix = blur_matrix(41, 2.0)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    assert matrix[20, 20] == pytest.approx(1 / (2.0 * np.sqrt(2 * np.pi)), rel=1e-3)
    assert matrix[20, 22] / matrix[20, 20] == pytest.approx(np.exp(-0.5), rel=1e-5)
    even = np.full((20, 30, 3), 77, np.uint8)
    np.testing.assert_array_equal(PICTURES["blur"](even, 1.0, random()), even)


def test_what_covers_a_picture_is_grey_and_has_the_stated_share() -> None:
    white = np.full((40, 60, 3), 255, np.uint8)
    for level in (0.2, 1.0):
        covered = (PICTURES["occlusion"](white, level, random()) == 127).all(axis=2)
        assert covered.mean() == pytest.approx(0.75 * level, abs=0.03)


def test_contrast_brightness_and_saturation_are_their_formulas() -> None:
    pixels = np.array([[[100, 100, 100], [140, 140, 140]]], np.uint8)
    assert PICTURES["contrast"](pixels, 1.0, random())[0, :, 0].tolist() == [118, 122]
    moved = PICTURES["brightness"](pixels, 0.5, random())[0, :, 0].astype(int) - pixels[0, :, 0]
    assert abs(moved[0]) == pytest.approx(255 * 0.3, abs=1)
    red = np.array([[[200, 0, 0]]], np.uint8)
    assert PICTURES["saturation"](red, 1.0, random()).tolist() == [[[60, 60, 60]]]
    assert PICTURES["saturation"](red, 0.5, random()).tolist() == [[[130, 30, 30]]]


def test_blocks_hold_the_mean_of_what_they_cover() -> None:
    pixels = np.arange(4 * 4, dtype=np.uint8).reshape(4, 4, 1).repeat(3, axis=2)
    spoilt = PICTURES["pixels"](pixels, 1.0, random())  # blocks of 2, since an eighth of 4 is less than 1
    assert spoilt[:2, :2, 0].tolist() == [[2, 2], [2, 2]]  # 0, 1, 4, 5: 2.5, to even
    assert spoilt[2:, 2:, 0].tolist() == [[12, 12], [12, 12]]  # 10, 11, 14, 15


# Sounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.01, 0.3, 0.6, 1.0])
@pytest.mark.parametrize("loudness", [0.02, 1.0])
def test_noise_stands_at_the_stated_distance_and_silences_nothing(level: float, loudness: float) -> None:
    medium = (sound(8.0) * loudness).astype(np.int16)
    spoilt = SOUNDS["noise"](medium, level, random()).astype(np.float64)

    # What is left of the sound in the noisy one: its projection; the rest is noise.
    own = medium.astype(np.float64) - medium.mean()
    kept = own * (spoilt @ own) / (own @ own)
    decibels = 10 * np.log10(np.square(kept).sum() / np.square(spoilt - kept).sum())
    assert decibels == pytest.approx(noise_decibels(level), abs=0.5)
    assert spoilt.std() == pytest.approx(KEPT_SCALE, rel=0.03)


def test_noise_falls_from_30_to_minus_10_decibels() -> None:
    assert [noise_decibels(level) for level in (0.0, 0.3, 1.0)] == [30.0, 18.0, -10.0]


@pytest.mark.parametrize("name", SOUNDS)
@pytest.mark.parametrize("seconds", [0.001, 0.05, 1.0])
def test_no_sound_falls_silent(name: str, seconds: float) -> None:
    rough = (random(5).standard_normal(max(8, int(seconds * RATE))) * KEPT_SCALE).astype(np.int16)
    for seed in range(5):
        assert SOUNDS[name](rough, 1.0, random(seed)).std() > 0.5 * KEPT_SCALE


@pytest.mark.parametrize("name", SOUNDS)
def test_silence_stays_silence(name: str) -> None:
    assert not SOUNDS[name](np.zeros(500, np.int16), 0.5, random()).any()


def test_clipping_flattens_the_stated_share() -> None:
    noise = (random(1).standard_normal(8000) * KEPT_SCALE).astype(np.int16)
    spoilt = np.abs(SOUNDS["clipping"](noise, 0.5, random()).astype(float))
    assert (spoilt > 0.97 * spoilt.max()).mean() == pytest.approx(0.45, abs=0.02)


def test_gaps_take_the_stated_share_and_leave_the_loudest_piece() -> None:
    noise = (random(1).standard_normal(8000) * KEPT_SCALE * 0.5).astype(np.int16)
    noise[3200:3520] *= 6  # the eleventh of 25 pieces of 40 ms
    for seed in range(5):
        pieces = SOUNDS["gaps"](noise, 1.0, random(seed)).reshape(25, 320).astype(float)
        lost = pieces.std(axis=1) == 0
        assert lost.sum() == 20
        assert not lost[10]


def test_lowpass_halves_the_power_at_its_corner() -> None:
    t = np.arange(RATE) / RATE
    level = np.log(0.25) / np.log(0.05)  # the corner at a quarter of half the rate: 1000 Hz
    tones = (np.sin(2 * np.pi * 200 * t) + np.sin(2 * np.pi * 1000 * t)) * 4000
    power = np.abs(np.fft.rfft(SOUNDS["lowpass"](tones.astype(np.int16), level, random()))) ** 2
    assert power[1000] / power[200] == pytest.approx(0.5, rel=0.01)


# Texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORDS)
def test_what_stands_around_a_text_stays_and_something_stands_between(name: str) -> None:
    for seed in range(10):
        for words_of in ("what colour", "is"):
            ids = np.array(TOKENIZER.encode(words_of).ids, np.int64)
            spoilt = WORDS[name](ids, 1.0, random(seed))
            assert (spoilt[0], spoilt[-1]) == (ids[0], ids[-1])
            assert len(spoilt) > 2


def test_masking_makes_the_stated_share_unknown() -> None:
    ids = np.concatenate([text()[:1], np.tile(text()[1:-1], 20), text()[-1:]])
    spoilt = WORDS["mask"](ids, 0.5, random())
    assert TOKENIZER.token_to_id("[UNK]") == VOCABULARY.unknown
    assert (spoilt == VOCABULARY.unknown).mean() == pytest.approx(0.45, abs=0.01)
    assert (spoilt[spoilt != VOCABULARY.unknown] == ids[spoilt != VOCABULARY.unknown]).all()


def test_where_everything_can_be_spelt_masking_puts_any_token() -> None:
    spells_all = words(TOKENIZER, Vocabulary(-1, VOCABULARY.around, VOCABULARY.size))
    spoilt = spells_all["mask"](text(), 1.0, random())
    assert ((spoilt >= 0) & (spoilt < VOCABULARY.size)).all()
    assert (spoilt != text()).sum() > 3


def test_swapping_keeps_the_tokens_and_deleting_their_order() -> None:
    swapped = WORDS["swap"](text(), 1.0, random())
    assert sorted(swapped.tolist()) == sorted(text().tolist())
    left = iter(text().tolist())
    assert all(token in left for token in WORDS["delete"](text(), 0.5, random()).tolist())


def test_typos_change_letters_not_everything() -> None:
    spoilt = TOKENIZER.decode(WORDS["typo"](text(), 0.3, random()).tolist())
    whole = TOKENIZER.decode(text().tolist())
    assert spoilt != whole
    assert abs(len(spoilt) - len(whole)) < 12


# Rows and arrays -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_what_a_row_lacks_it_still_lacks_and_something_stays_known(name: str) -> None:
    for seed in range(20):
        spoilt = ROWS[name](row(), 1.0, random(seed))
        assert np.isnan(spoilt[1])
        assert spoilt[4] == 0
        assert (~np.isnan(spoilt[:3])).sum() + (spoilt[3:] > 0).sum() >= 1


def test_a_mistaken_category_is_another_known_one() -> None:
    seen = {int(ROWS["mistaken"](row(), 1.0, random(seed))[3]) for seed in range(100)}
    assert seen == {1, 2, 3}  # 2 where chance left it as it was
    others = [int(ROWS["mistaken"](row(), 1.0, random(seed))[3]) for seed in range(400)]
    assert np.mean([other != 2 for other in others]) == pytest.approx(0.8, abs=0.06)


def test_only_what_a_row_has_can_be_spoilt() -> None:
    assert set(rows(0, (2,))) == {"dropped"}
    assert set(rows(0, (3,))) == {"mistaken", "dropped"}
    assert set(rows(2, ())) == {"gaussian", "drift", "spikes", "dropped"}


def test_drift_moves_all_numbers_alike_and_a_signal_from_beginning_to_end() -> None:
    moved = ROWS["drift"](row(), 0.5, random()) - row()
    assert abs(moved[0]) == 1.0
    assert moved[0] == moved[2]
    wandered = SIGNALS["drift"](signal(), 0.5, random()) - signal()
    np.testing.assert_allclose(np.abs(wandered[:, [0, -1]]), [[0, 2], [0, 2]], atol=1e-6)


def test_spikes_and_gaps_of_a_signal_have_the_stated_share() -> None:
    far = np.abs(SIGNALS["spikes"](signal(), 0.5, random()) - signal())
    assert (far > 1).mean() == 0.02
    assert far.max() == pytest.approx(4.0)
    lost = (SIGNALS["gaps"](signal() + 5, 0.5, random()) == 0).all(axis=0)
    assert lost.mean() == pytest.approx(0.4)


@pytest.mark.parametrize("size", [8, 16, 24, 64])
def test_blocks_grow_with_every_level_on_small_pictures_too(size: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3)).astype(np.uint8)
    levels = (0.1, 0.25, 0.5, 0.75, 1.0)
    moved = [np.abs(PICTURES["pixels"](pixels, level, random()).astype(int) - pixels).mean() for level in levels]
    assert moved == sorted(moved)
    assert len(set(moved)) == len(moved)
