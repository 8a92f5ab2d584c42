"""Holds data/quality.py to its formulas, and to its promise: each figure is its own medium's, finite, cheap."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from data_builders import array_cells, fitted, inline, npy, picture, rows, sound

from dougong.data.collate import Collator, Request
from dougong.data.corruption import Corruption
from dougong.data.modality.audio import KEPT_SCALE, AudioConfig, AudioModality
from dougong.data.modality.image import ImageConfig, ImageModality
from dougong.data.modality.medium import Modality
from dougong.data.preparation import Preparation
from dougong.data.quality import (
    AUDIO,
    IMAGE,
    SIGNAL,
    TABLE,
    TEXT,
    VOLUME,
    WORSE,
    signal_quality,
    table_quality,
    text_quality,
    text_troubles,
    troubled_share,
    volume_quality,
)

RATE = 8000
PICTURES = ImageModality(ImageConfig(column="image", height=48, width=40, mean=(0.4, 0.5, 0.6), scale=(0.2, 0.3, 0.25)))
SOUNDS = AudioModality(AudioConfig(column="speech", sample_rate=RATE, max_seconds=4.0))


def figures(modality: Modality, *media: Any) -> list[dict[str, float]]:
    found = modality.quality(modality.stack(media, None))
    assert found.dtype == np.float32
    return [dict(zip(modality.quality_names, row.tolist(), strict=True)) for row in found]


def grey(values: Any) -> npt.NDArray[np.uint8]:
    return np.broadcast_to(np.asarray(values)[..., None], (48, 40, 3)).astype(np.uint8)


def test_an_even_picture_has_the_figures_of_its_grey() -> None:
    (found,) = figures(PICTURES, grey(np.full((48, 40), 51)))
    assert found == pytest.approx(
        {"sharpness": 0, "exposure": 0.2, "contrast": 0, "clipped": 0, "noise": 0, "colour": 0, "flat": 1}, abs=1e-5
    )


def test_a_chessboard_has_the_figures_of_the_formulas() -> None:
    board = np.indices((48, 40)).sum(axis=0) % 2  # of the Laplacian -4 and 4, of Immerkaer's mask -16/4 and 16/4
    (found,) = figures(PICTURES, grey(51 + 51 * board))
    assert found["exposure"] == pytest.approx(0.3, abs=1e-5)
    assert found["contrast"] == pytest.approx(0.2, abs=1e-5)
    assert found["sharpness"] == pytest.approx(0.8 / (0.8 + 0.1), abs=1e-4)  # 4 x 0.2
    noise = np.sqrt(np.pi / 2) / 6 * 8 * 0.2 / 2 * 2 / 2  # |I * N| is 8 x half the step
    assert found["noise"] == pytest.approx(noise * 2 / (noise * 2 + 0.05), abs=1e-4)
    assert found["flat"] == 0


def test_black_and_white_are_clipped_and_colour_is_told() -> None:
    half = np.zeros((48, 40))
    half[:, 20:] = 255
    (found,) = figures(PICTURES, grey(half))
    assert found["clipped"] == 1
    assert found["contrast"] == pytest.approx(1, abs=1e-4)
    red = np.zeros((48, 40, 3), np.uint8)
    red[..., 0] = 255
    (found,) = figures(PICTURES, red)
    away = np.abs(np.array([1, 0, 0]) - 0.299).mean() * 2
    assert found["colour"] == pytest.approx(away, abs=1e-4)


@pytest.mark.parametrize("sigma", [5.0, 20.0])
def test_the_noise_of_a_slope_is_found(sigma: float) -> None:
    slope = np.linspace(80, 160, 40)[None] + np.random.default_rng(0).normal(0, sigma, (48, 40))
    (found,) = figures(PICTURES, grey(slope.round().clip(0, 255)))
    measured = 0.05 * found["noise"] / (1 - found["noise"])
    assert measured == pytest.approx(sigma / 255, rel=0.05)


def test_a_picture_too_small_for_a_laplacian_has_figures() -> None:
    tiny = ImageModality(ImageConfig(column="image", height=2, width=2))
    (found,) = figures(tiny, np.full((2, 2, 3), 128, np.uint8))
    assert np.isfinite(list(found.values())).all()


def speech(seconds: float = 2.0, noise: float = 0.0, *, seed: int = 0) -> npt.NDArray[np.int16]:
    """A tone with pauses, half of the time each."""
    t = np.arange(int(seconds * RATE)) / RATE
    samples = np.sin(2 * np.pi * 300 * t) * (np.floor(4 * t) % 2) * np.sqrt(2)
    samples = samples + noise * np.random.default_rng(seed).standard_normal(len(t))
    return (samples * KEPT_SCALE).clip(-32767, 32767).astype(np.int16)


@pytest.mark.parametrize("decibels", [10, 20, 30])
def test_the_distance_of_sound_and_noise_is_found(decibels: int) -> None:
    (found,) = figures(SOUNDS, speech(noise=10 ** (-decibels / 20)))
    # Loud frames hold sound and noise: 10 log10(1 + 10^(d/10)); quantiles of frames widen it a little.
    assert found["snr"] * 60 == pytest.approx(10 * np.log10(1 + 10 ** (decibels / 10)), abs=1.0)


def test_silence_length_and_clipping_are_shares() -> None:
    (found,) = figures(SOUNDS, speech())
    assert found["silence"] == pytest.approx(0.48)  # each pause is 12.5 frames long
    assert found["length"] == pytest.approx(0.5)
    flat = np.concatenate([np.full(1000, 8000), np.full(1000, -8000), np.full(2000, 100)]).astype(np.int16)
    assert figures(SOUNDS, flat)[0]["clipping"] == 0.5


def test_high_is_one_half_for_white_noise_and_follows_a_tone() -> None:
    white = (np.random.default_rng(0).standard_normal(16000) * KEPT_SCALE).astype(np.int16)
    assert figures(SOUNDS, white)[0]["high"] == pytest.approx(0.5, abs=0.02)
    for hertz in (500, 3000):
        tone = (np.sin(2 * np.pi * hertz * np.arange(16000) / RATE) * KEPT_SCALE).astype(np.int16)
        assert figures(SOUNDS, tone)[0]["high"] == pytest.approx(np.sin(np.pi * hertz / RATE) ** 2, abs=1e-3)


@pytest.mark.parametrize("samples", [np.zeros(500), np.ones(3), np.zeros(1)])
def test_a_sound_of_nothing_or_of_a_moment_has_figures(samples: Any) -> None:
    (found,) = figures(SOUNDS, samples.astype(np.int16))
    assert np.isfinite(list(found.values())).all()
    assert found["snr"] == 0


def test_a_sound_beside_a_longer_one_has_the_figures_it_has_alone() -> None:
    alone = figures(SOUNDS, speech(1.0, 0.1))[0]
    beside = figures(SOUNDS, speech(3.5, 0.3, seed=1), speech(1.0, 0.1))[1]
    assert beside == pytest.approx(alone, abs=1e-5)


def test_of_a_text_length_unknown_and_pieces_are_counted() -> None:
    ids_UT = np.array([[2, 5, 1, 6, 7, 3, 0, 0], [2, 5, 3, 0, 0, 0, 0, 0]])
    mask_UT = np.array([[1, 1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]], np.bool_)
    around_V = np.isin(np.arange(8), [0, 2, 3])
    piece_V = np.isin(np.arange(8), [6, 7])
    found = text_quality(ids_UT, mask_UT, max_tokens=16, unknown=1, around_V=around_V, piece_V=piece_V)
    np.testing.assert_allclose(found, [[4 / 16, 1 / 4, 2 / 4], [1 / 16, 0, 0]])


def test_of_a_row_what_is_known_and_how_far_off_it_is() -> None:
    numbers_UN = np.array([[3.0, -4.0, 0.0], [0.0, 0.0, 0.0]], np.float32)
    known_UN = np.array([[True, True, False], [False, False, False]])
    found = table_quality(numbers_UN, known_UN, np.array([[2], [0]]))
    spread = np.sqrt(12.5)
    np.testing.assert_allclose(found, [[3 / 4, 4 / 7, spread / (spread + 3)], [0, 0, 0]], rtol=1e-6)
    far = table_quality(np.full((1, 2), 3e38, np.float32), np.ones((1, 2), np.bool_), np.zeros((1, 0), np.int64))
    assert np.isfinite(far).all()


def test_of_a_signal_noise_standstill_and_distance() -> None:
    samples_UCT = np.zeros((2, 1, 6), np.float32)
    samples_UCT[0, 0, :4] = [1, -1, 1, -1]
    samples_UCT[1, 0] = [0, 0, 0, 0, 6, 0]
    mask_UT = np.array([[1, 1, 1, 1, 0, 0], [1] * 6], np.bool_)
    found = dict(zip(SIGNAL, signal_quality(samples_UCT, mask_UT, 12).T, strict=True))
    np.testing.assert_allclose(found["noise"], [12 / 16, 72 / 144])
    np.testing.assert_allclose(found["flat"], [0, 3 / 5])
    np.testing.assert_allclose(found["farthest"], [1 / 4, 6 / 9])
    np.testing.assert_allclose(found["spread"], [1 / 4, np.sqrt(6) / (np.sqrt(6) + 3)], rtol=1e-6)
    np.testing.assert_allclose(found["length"], [4 / 12, 6 / 12])


def test_of_a_volume_steps_and_distance() -> None:
    voxels = np.zeros((1, 1, 2, 2, 2), np.float32)
    voxels[0, 0, 1] = 3.0  # of 12 steps 4 are of 3
    found = dict(zip(VOLUME, volume_quality(voxels)[0], strict=True))
    assert found["sharpness"] == pytest.approx(np.sqrt(3) / (np.sqrt(3) + 0.1))
    assert found["flat"] == pytest.approx(8 / 12)
    assert found["farthest"] == 0.5
    assert found["spread"] == pytest.approx(np.sqrt(4.5) / (np.sqrt(4.5) + 3))


@pytest.fixture(scope="module")
def everything() -> Preparation:
    table = rows(
        image=[inline(picture(seed=row)) for row in range(8)],
        speech=[inline(sound(seed=row)) for row in range(8)],
        question=[f"is it number {row}" for row in range(8)],
        age=[float(row) for row in range(8)],
        ecg=array_cells(8),
        scan=[npy(np.random.default_rng(row).random((4, 5, 6))) for row in range(8)],
        label=["no", "yes"] * 4,
    )
    return fitted(table, {"question": "text", "scan": "volume"}, quality=True)


def test_every_figure_has_a_worse_side() -> None:
    assert set(WORSE) == {*IMAGE, *AUDIO, *TEXT, *TABLE, *SIGNAL, *VOLUME}


def test_where_there_is_no_medium_there_are_no_figures(everything: Preparation, tmp_path: Path) -> None:
    nothing: dict[str, list[Any]] = {column: [None] for column in everything.columns}
    media = Collator(everything, tmp_path, seed=0)(Request(np.arange(1), nothing, (0, 0))).media
    for name, modality in everything.modalities.items():
        if name != "table":  # a row is there, with nothing known
            assert media[name].quality_UQ is not None
            assert media[name].quality_UQ.shape == (0, len(modality.quality_names))


def test_what_went_wrong_with_letters_is_a_figure_though_tokens_hide_it(
    everything: Preparation, tmp_path: Path
) -> None:
    clean, lost, mixed = "is it number one", "is it number \ufffd one", "is it caf\u00c3\u00a9 one"
    cells: dict[str, list[Any]] = {column: [None] * 5 for column in everything.columns}
    cells["question"] = [lost, clean, None, lost, mixed]

    question = Collator(everything, tmp_path, seed=0)(Request(np.arange(5), cells, (0, 0))).media["question"]

    assert question.quality_UQ is not None
    trouble_U = question.quality_UQ[:, TEXT.index("trouble")]
    assert trouble_U[question.index_B[[0, 1, 3, 4]]] == pytest.approx([1 / 5, 0, 1 / 5, 1 / 4])
    # But for that the first two are one: what is lost is no token.
    np.testing.assert_array_equal(question.quality_UQ[0, :3], question.quality_UQ[1, :3])
    assert troubled_share("a\x00b") == 1.0
    assert troubled_share("\ufffd") == 1.0
    assert troubled_share(" ") == 0.0


def test_a_batch_has_quality_where_the_preparation_or_the_caller_asks(everything: Preparation, tmp_path: Path) -> None:
    cells = {
        "image": [inline(picture(seed=row)) for row in (0, 1, 0)],
        "speech": [inline(sound(seed=row)) for row in range(3)],
        "question": ["is it", None, "number"],
        "age": [1.0, 2.0, None],
        "ecg": array_cells(3),
        "scan": [None] * 3,
    }
    request = Request(np.arange(3), cells, (0, 0))
    media = Collator(everything, tmp_path, seed=0)(request).media
    for name, own in media.items():
        modality = everything.modalities[name]
        assert own.quality_UQ is not None
        assert own.quality_UQ.dtype == np.float32
        assert own.quality_UQ.shape[1] == len(everything.signature().inputs[name].quality)
        measured_UQ = modality.quality(own.values)
        np.testing.assert_array_equal(own.quality_UQ[:, : measured_UQ.shape[1]], measured_UQ)
    assert media["image"].quality_UQ is not None
    assert len(media["image"].quality_UQ) == 2

    everything.save(tmp_path)
    loaded = Preparation.load(tmp_path)
    assert loaded.signature() == everything.signature()
    assert loaded.only(("image",)).signature().inputs["image"].quality == IMAGE
    plain = Preparation(everything.modalities, everything.target)
    assert plain.signature().inputs["image"].quality == ()
    assert Collator(plain, tmp_path, seed=0)(request).media["image"].quality_UQ is None
    assert Collator(plain, tmp_path, seed=0, quality=True)(request).media["image"].quality_UQ is not None


@pytest.mark.parametrize(
    ("name", "kind", "figure", "rises"),
    [
        ("image", "gaussian", "noise", True),
        ("image", "blur", "sharpness", False),
        ("image", "occlusion", "flat", True),
        ("image", "contrast", "contrast", False),
        ("image", "saturation", "colour", False),
        ("image", "brightness", "clipped", True),
        ("speech", "clipping", "clipping", True),
        ("speech", "lowpass", "high", False),
        ("speech", "gaps", "silence", True),
        ("question", "mask", "unknown", True),
        ("question", "delete", "length", False),
        ("question", "typo", "pieces", True),
        ("table", "gaussian", "farthest", True),
        ("ecg", "spikes", "farthest", True),
        ("scan", "blur", "sharpness", False),
    ],
)
def test_what_was_spoilt_shows_in_the_figure_meant_for_it(
    everything: Preparation, name: str, kind: str, figure: str, rises: bool
) -> None:
    cells = {
        "image": [inline(picture(seed=row, width=24)) for row in range(8)],
        "speech": [inline(sound(seed=row)) for row in range(8)],
        "question": [f"is it number {row}" for row in range(8)],
        "age": [float(row) for row in range(8)],
        "ecg": array_cells(8),
        "scan": [npy(np.random.default_rng(row).random((4, 5, 6))) for row in range(8)],
    }
    request = Request(np.arange(8), cells, (0, 0))
    spoilt = [Corruption(modality=name, kind=kind, level=0.8)]
    column = everything.modalities[name].quality_names.index(figure)
    clean, bad = (
        Collator(everything, Path(), seed=0, corruptions=own)(request).media[name].quality_UQ for own in ((), spoilt)
    )
    assert clean is not None
    assert bad is not None
    assert (bad[:, column].mean() > clean[:, column].mean()) == rises
    assert bad[:, column].mean() != pytest.approx(clean[:, column].mean(), rel=0.02)


def test_measuring_costs_less_than_decoding() -> None:
    pictures = [np.random.default_rng(seed).integers(0, 256, (48, 40, 3), np.uint8) for seed in range(64)]
    encoded = [inline(picture(40, 48, seed=seed, form="JPEG")) for seed in range(64)]
    values = PICTURES.stack(pictures, None)
    measuring = _fastest(lambda: PICTURES.quality(values))
    assert measuring < _fastest(lambda: [PICTURES.decode((cell,), Path()) for cell in encoded])


def _fastest(what: Any) -> float:
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        what()
        taken.append(time.perf_counter() - started)
    return min(taken)


@pytest.mark.parametrize(
    ("text", "troubles"),
    [
        ("plain words\nand a line", []),
        ("café in São Paulo, naïve – “quoted” 你好", []),
        ("cafÃ©", ["misread"]),
        ("itâ€™s", ["misread"]),
        ("lost \ufffd letters", ["lost"]),
        ("bell\x07 and \x85", ["of control"]),
        ("fish &amp; chips<br/>", ["of markup"]),
        ("a < b & c > d", []),
        ("\ufffd cafÃ© &lt;\x00", ["lost", "misread", "of control", "of markup"]),
    ],
)
def test_troubles_of_letters_are_named(text: str, troubles: list[str]) -> None:
    assert text_troubles(text) == troubles


@pytest.mark.parametrize("text", ["voil\u00c3\u00a0 tout", "he said \u00e2\u20ac\u009d", "caf\u00c3\u00a9"])
def test_letters_that_were_misread_are_found_at_their_places_without_a_letter(text: str) -> None:
    assert "misread" in text_troubles(text)


@pytest.mark.parametrize("text", ["voil\u00e0 tout", "\u201cquoted\u201d", "\u65e5\u672c", "na\u00efve\u00a0caf\u00e9"])
def test_letters_that_were_read_well_are_none(text: str) -> None:
    assert "misread" not in text_troubles(text)
