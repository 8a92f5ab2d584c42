"""Holds data/modality/audio.py to its promise: mono, one rate, equally loud; what is not whole sound is refused."""

import time
import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import soundfile
from data_builders import HERE, claiming_flac, picture, sound, sound_of

from dougong.data.modality.audio import KEPT_SCALE, PAD_TO, AudioAugment, AudioConfig, AudioModality
from dougong.data.modality.medium import BadValue

RATE = 8000


def modality(**settings: Any) -> AudioModality:
    return AudioModality(AudioConfig(**{"column": "speech", "sample_rate": RATE, **settings}))


def decoded(content: bytes, **settings: Any) -> npt.NDArray[Any]:
    return modality(**settings).decode((content,), HERE)


def tone(seconds: float, rate: int = RATE, hertz: float = 440) -> npt.NDArray[np.float64]:
    return 0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize(
    ("form", "subtype", "reason"),
    [
        ("FLAC", "PCM_16", r"is not sound, or is cut short \(Error : flac decoder lost sync\)"),
        ("WAV", "PCM_16", r"is truncated: 1600 bytes of its samples are not there"),
        ("WAV", "FLOAT", r"is truncated: 1600 bytes of its samples are not there"),
        ("AIFF", "PCM_16", r"is truncated: 1600 bytes of its samples are not there"),
        ("OGG", "VORBIS", r"has no samples|is not sound, or is cut short"),
    ],
)
def test_truncated_sound_is_refused(form: str, subtype: str, reason: str) -> None:
    content = sound(form=form, subtype=subtype)
    assert len(decoded(content)) == 1600
    with pytest.raises(BadValue, match=f"^({reason})"):
        decoded(content[:-1600])


def test_sound_cut_beyond_what_is_kept_is_refused_as_well() -> None:
    content = sound(4.0)
    with pytest.raises(BadValue, match="is not sound, or is cut short"):
        decoded(content[: int(0.9 * len(content))], max_seconds=0.5)


def test_a_recorder_that_did_not_know_its_length_is_heard() -> None:
    content = bytearray(sound(form="WAV", subtype="PCM_16"))
    start = content.index(b"data")
    content[start + 4 : start + 8] = b"\xff\xff\xff\xff"
    assert len(decoded(bytes(content))) == 1600


def test_a_stream_that_was_never_closed_is_refused() -> None:
    with pytest.raises(BadValue, match="does not say how long it is, as a stream that was never closed"):
        decoded(claiming_flac(0))


def test_a_recording_of_many_blocks_is_heard_whole() -> None:
    there, want = (decoded(sound(70.0, form=form, subtype="PCM_16"), max_seconds=70) for form in ("FLAC", "WAV"))
    assert len(there) == 70 * RATE
    np.testing.assert_allclose(there, want, atol=2)


@pytest.mark.parametrize("content", [b"hello, I am no sound", b"RIFF\0\0\0\0WAVE", b"fLaC", b"\0" * 5000, picture()])
def test_bytes_that_are_no_sound_are_refused_in_words_that_repeat(content: bytes) -> None:
    reasons = set()
    for _ in range(2):
        with pytest.raises(BadValue) as caught:
            decoded(bytes(content))
        reasons.add(str(caught.value))
    assert len(reasons) == 1
    assert "object at 0x" not in reasons.pop()


def test_sound_that_claims_too_many_seconds_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("it was decoded"))
    with pytest.raises(BadValue, match="claims 4500000 seconds, over the limit of largest_seconds"):
        decoded(claiming_flac(36_000_000_000))


def test_a_claim_within_the_limit_takes_no_memory_before_it_is_true() -> None:
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(BadValue, match=r"is not sound, or is cut short|is truncated"):
        decoded(claiming_flac(3599 * RATE), max_seconds=0.1)
    seconds, (_, peak_bytes) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 1
    assert peak_bytes < 16 * 2**20


def test_a_long_recording_takes_the_room_of_what_is_kept() -> None:
    content = sound_of(np.zeros(300 * RATE), subtype="PCM_U8")
    tracemalloc.start()
    assert len(decoded(content, max_seconds=1.0)) == RATE
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 300 * RATE * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_samples_that_are_not_numbers_are_refused(value: float) -> None:
    samples = tone(0.2)
    samples[100] = value
    with pytest.raises(BadValue, match="has samples that are not numbers"):
        decoded(sound_of(samples))


def test_opposite_infinities_of_two_channels_are_refused() -> None:
    with pytest.raises(BadValue, match="has samples that are not numbers"):
        decoded(sound_of([[np.inf, -np.inf]] * 100))


def test_the_loudest_and_the_softest_are_as_loud_as_every_other() -> None:
    loud, plain, soft = (decoded(sound_of(tone(0.5) * factor)) for factor in (1e38, 1.0, 0.01))
    np.testing.assert_allclose(loud, plain, atol=1)
    np.testing.assert_allclose(soft, plain, atol=1)
    assert abs(plain.std() / KEPT_SCALE - 1) < 1e-3
    assert abs(plain.mean()) < 1


def test_silence_stays_silent() -> None:
    assert (decoded(sound_of(np.zeros(800))) == 0).all()


def test_channels_become_one() -> None:
    both = np.stack([tone(0.2, hertz=440), tone(0.2, hertz=900)], axis=1)
    np.testing.assert_allclose(decoded(sound_of(both)), decoded(sound_of(both.mean(axis=1))), atol=1)


@pytest.mark.parametrize("rate", [4000, 11_025, 44_100])
def test_another_rate_becomes_the_rate_of_all(rate: int) -> None:
    there = decoded(sound_of(tone(1.0, rate), rate=rate)) / KEPT_SCALE
    want = decoded(sound_of(tone(1.0))) / KEPT_SCALE
    assert len(there) == RATE
    assert np.abs(there - want)[400:-400].max() < 0.02


def test_what_is_longer_is_cut_at_the_end() -> None:
    whole = decoded(sound_of(tone(1.0, 11_025), rate=11_025)) / KEPT_SCALE
    cut = decoded(sound_of(tone(1.0, 11_025), rate=11_025), max_seconds=0.5) / KEPT_SCALE
    assert len(cut) == 4000
    np.testing.assert_allclose(cut, whole[:4000], atol=0.01)


@pytest.mark.parametrize("num_samples", [1, 400])
def test_very_short_sound_fills_one_step_of_padding(num_samples: int) -> None:
    short = modality()
    stacked = short.stack([short.decode((sound_of(tone(num_samples / RATE)),), HERE)], None)
    assert stacked["samples_UT"].shape == (1, PAD_TO)
    assert stacked["mask_UT"].sum() == num_samples


def test_sound_of_no_sample_is_refused() -> None:
    with pytest.raises(BadValue, match="has no samples"):
        decoded(sound_of(np.zeros(0)))


def test_no_media_make_an_empty_batch() -> None:
    assert modality().stack([], np.random.default_rng(0))["samples_UT"].shape == (0, PAD_TO)


def test_augmenting_stays_within_the_signature_and_out_of_the_padding() -> None:
    altering = modality(max_seconds=0.2, augment=AudioAugment(gain_decibels=6, noise=0.5, shift_seconds=0.3))
    media = [altering.decode((sound(seconds),), HERE) for seconds in (0.05, 0.2)]
    stacked = altering.stack(media, np.random.default_rng(0))
    again = altering.stack(media, np.random.default_rng(0))
    plain = altering.stack(media, None)
    assert stacked["samples_UT"].shape[1] <= altering.signature().max_samples
    assert (stacked["samples_UT"][~stacked["mask_UT"]] == 0).all()
    np.testing.assert_array_equal(stacked["samples_UT"], again["samples_UT"])
    assert not np.array_equal(stacked["samples_UT"][:, :PAD_TO], plain["samples_UT"][:, :PAD_TO])
    np.testing.assert_array_equal(plain["samples_UT"], altering.stack(media, None)["samples_UT"])
