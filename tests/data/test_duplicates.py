"""Holds data/duplicates.py to its promise: copies are found in whatever form, different media are not called alike."""

import io
import math
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
from data_builders import inline, npy, rows, sound_of
from PIL import Image, ImageEnhance

from dougong.data.columns import infer_roles
from dougong.data.duplicates import (
    Fingerprint,
    _cosines,
    find_duplicates,
    fingerprint_array,
    fingerprint_image,
    fingerprint_row,
    fingerprint_sound,
    fingerprint_text,
    near_pairs,
)
from dougong.data.table import Table


def scene(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    return Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    picture.save(content, form, **options)
    return content.getvalue()


def tune(seed: int, rate: int = 8000) -> Any:
    """A few notes, different by seed."""
    random = np.random.default_rng(seed)
    seconds = np.arange(int(0.08 * rate)) / rate
    drawn = random.uniform([150, 0.2], [3000, 1], (8, 2))
    notes = [np.sin(2 * np.pi * hertz * seconds) * level for hertz, level in drawn]
    return 0.5 * np.concatenate(notes)


@pytest.mark.parametrize(
    "change",
    [
        lambda picture: Image.open(io.BytesIO(encoded(picture, "JPEG", quality=60))).convert("RGB"),
        lambda picture: picture.resize((40, 40), Image.Resampling.BILINEAR),
        lambda picture: ImageEnhance.Brightness(picture).enhance(1.04),
    ],
)
def test_a_picture_is_found_in_another_form(change: Any) -> None:
    pictures = [scene(seed) for seed in range(60)]
    prints = [fingerprint_image(picture) for picture in (*pictures, *map(change, pictures[:20]))]

    pairs = {tuple(pair) for pair in near_pairs(prints, "image").tolist()}

    assert len(pairs & {(seed, 60 + seed) for seed in range(20)}) >= 19
    assert pairs <= {(seed, 60 + seed) for seed in range(20)}


@pytest.mark.parametrize(
    "change",
    [
        lambda samples: 0.2 * samples,
        lambda samples: samples + np.random.default_rng(0).normal(0, 0.01, len(samples)),
        lambda samples: np.concatenate([np.zeros(800), samples, np.zeros(400)]),
    ],
)
def test_a_sound_is_found_in_another_form(change: Any) -> None:
    tunes = [tune(seed) for seed in range(40)]
    prints = [fingerprint_sound(samples, 8000) for samples in (*tunes, *map(change, tunes[:20]))]

    pairs = {tuple(pair) for pair in near_pairs(prints, "audio").tolist()}

    assert len(pairs & {(seed, 40 + seed) for seed in range(20)}) >= 18
    assert pairs <= {(seed, 40 + seed) for seed in range(20)}


def test_a_sound_is_found_at_another_rate() -> None:
    samples = tune(3)

    prints = [fingerprint_sound(samples, 8000), fingerprint_sound(soxr.resample(samples, 8000, 16000), 16000)]

    assert len(near_pairs(prints, "audio")) == 1


def test_a_text_is_found_with_other_letters_and_one_more_word() -> None:
    story = "The patient came in with a cough that had lasted for three weeks and a slight fever at night"
    others = [f"Report number {n} of the {word} ward says nothing of interest" for n, word in enumerate("abcdefgh")]
    prints = [fingerprint_text(text) for text in (story, f"{story.upper()}!  ", f"{story} again", *others[:1], "")]

    assert near_pairs(prints, "text").tolist() == [[0, 1], [0, 2], [1, 2]]


def test_minhash_agrees_as_often_as_the_sets_overlap() -> None:
    """Two runs of letters that share 60 of 80 + 80 - 60 fives: 0.6."""
    letters = np.random.default_rng(0).permutation(np.repeat([chr(97 + n) for n in range(26)], 6))
    whole = "".join(letters)
    one, other = whole[:84], whole[20:104]
    pieces = [{text[i : i + 5] for i in range(80)} for text in (one, other)]
    overlap = len(pieces[0] & pieces[1]) / len(pieces[0] | pieces[1])

    agree = (fingerprint_text(one).check == fingerprint_text(other).check).mean()

    assert overlap == pytest.approx(0.6)
    assert agree == pytest.approx(overlap, abs=3 * np.sqrt(0.6 * 0.4 / 64))


def test_rows_of_numbers_are_near_across_a_rounding_edge() -> None:
    cells = [(1.23399, 20.0, "a"), (1.23401, 20.0, "a"), (1.3, 20.0, "a"), (1.23399, 20.0, "b")]
    prints = [fingerprint_row(row) for row in cells]

    assert near_pairs(prints, "table").tolist() == [[0, 1]]


def test_the_cosine_transform_is_orthonormal_and_has_the_known_first_rows() -> None:
    waves = _cosines(8)

    np.testing.assert_allclose(waves @ waves.T, np.eye(8), atol=1e-12)
    np.testing.assert_allclose(waves[0], np.full(8, 1 / np.sqrt(8)))
    np.testing.assert_allclose(waves[1], 0.5 * np.cos(np.pi * np.array([1, 3, 5, 7, 9, 11, 13, 15]) / 16))


def test_many_that_share_a_band_cost_no_square() -> None:
    """5000 in one band: only neighbours are compared, and the two that are alike are neighbours."""
    random = np.random.default_rng(0)
    checks = random.standard_normal((5000, 8)).astype(np.float32)
    checks[4321] = checks[17]
    checks /= np.linalg.norm(checks, axis=1, keepdims=True)
    prints = [Fingerprint(np.array([7], np.uint64), check) for check in checks]

    pairs = near_pairs(prints, "signal").tolist()

    assert [17, 4321] in pairs


def parts() -> tuple[dict[str, Table], Any]:
    random = np.random.default_rng(0)

    def part(seeds: list[int], last: bytes) -> Table:
        return rows(
            photo=[*(inline(encoded(scene(seed))) for seed in seeds), inline(last)],
            remark=[f"scene {seed} of the long series that we drew" for seed in range(len(seeds) + 1)],
            wave=[npy(random.standard_normal(64)) for _ in range(len(seeds) + 1)],
            label=["no", "yes"] * ((len(seeds) + 1) // 2),
        )

    train = part([*range(38), 0], encoded(scene(100)))
    test = part([*range(50, 68), 5], encoded(scene(100), "JPEG", quality=70))
    return {"train": train, "test": test}, infer_roles(train, target="label", named={"remark": "text"})


def test_what_stands_twice_is_counted_by_part() -> None:
    found = {one.column: one for one in find_duplicates(*parts())}

    photo = found["photo"]
    assert photo.num_rows == {"train": 40, "test": 20}
    assert photo.num_media == 58
    assert (photo.num_repeats, photo.num_exact_across) == (2, 1)
    assert (photo.num_near, photo.num_near_across, photo.num_near_rows_across) == (1, 1, 2)
    assert photo.groups[0].rows == {"train": (39,), "test": (19,)}
    assert {tuple(group.rows["train"]) for group in photo.groups} == {(39,), (5,)}
    assert found["remark"].num_exact_across == 20
    assert (found["wave"].num_repeats, found["wave"].num_near) == (0, 0)


def test_of_many_media_a_share_is_looked_at_and_all_exact_copies_are_found() -> None:
    both, roles = parts()

    photo = find_duplicates(both, roles, most_media=20)[0]

    assert photo.num_compared == 20
    assert photo.num_exact_across == 1


def test_different_recordings_and_broken_ones_are_no_duplicates() -> None:
    clips = [inline(sound_of(tune(seed))) for seed in range(30)]
    clips[7] = inline(b"no sound at all")
    one = rows(clip=clips, label=["no", "yes"] * 15)

    (found,) = find_duplicates({"train": one}, infer_roles(one, target="label", named={"clip": "audio"}))

    assert (found.num_repeats, found.num_near) == (0, 0)
    assert found.num_compared == 29
    assert soundfile.info(io.BytesIO(clips[0]["bytes"])).samplerate == 8000


def test_rows_with_numbers_that_are_none_are_compared_like_others() -> None:
    cells = [(math.nan, 1.0, 2.0), (math.inf, 1.0, 2.0), (1e-320, 0.0, -5.0), (10**400, 1.0, 2.0), (9.99996, 1.0, 2.0)]
    found = [fingerprint_row(each) for each in cells]
    assert len({tuple(each.keys.tolist()) for each in found}) == len(cells)
    assert fingerprint_row((10.0, 1.0, 2.0)).keys[1] == found[-1].keys[1]
    assert not set(fingerprint_row((1.5, 1.0)).keys.tolist()) & set(fingerprint_row((15.0, 1.0)).keys.tolist())


def test_a_check_lists_a_number_that_is_none_and_goes_on() -> None:
    random = np.random.default_rng(0)
    values = {name: random.standard_normal(60).tolist() for name in "abc"}
    values["a"][7], values["b"][9] = math.nan, math.inf
    table = rows(**values, label=["x", "y"] * 30)
    roles = infer_roles(table, target="label", named={})
    (found,) = find_duplicates({"train": table}, roles)
    assert (found.kind, found.num_repeats, found.num_near) == ("table", 0, 0)


def test_a_signal_with_time_first_costs_no_more_than_its_first_channels() -> None:
    tall = np.random.default_rng(0).standard_normal((200_000, 1))
    assert len(fingerprint_array(tall).check) <= 8 * 128
