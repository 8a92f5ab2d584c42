"""Holds data/sources/speech.py to its promise: the same words sound the same, whenever and wherever."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from dougong.core.errors import DataError
from dougong.data.sources.speech import SILENCE, SpeechVoice, speak, speech_engine

QUESTION = "what color is the shape?"
VOICE = SpeechVoice(accent="en-us", variant="f3")

IN_ANOTHER_PROCESS = f"""
import hashlib
from dougong.data.sources.speech import SpeechVoice, speak
speak("something else first", SpeechVoice(variant="m7"), 16000)
samples = speak({QUESTION!r}, SpeechVoice(accent="en-us", variant="f3"), 8000)
print(hashlib.sha256(samples.tobytes()).hexdigest())
"""


def test_the_same_words_sound_the_same_whatever_was_said_before() -> None:
    first = speak(QUESTION, VOICE, 8000)
    for variant in ("m1", "f5"):
        speak("does the image contain a rectangle?", SpeechVoice(accent="en-029", variant=variant), 8000)
        np.testing.assert_array_equal(speak(QUESTION, VOICE, 8000), first)


def test_another_process_says_the_same() -> None:
    printed = subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS], capture_output=True, text=True, check=True
    ).stdout.strip()

    assert printed == hashlib.sha256(speak(QUESTION, VOICE, 8000).tobytes()).hexdigest()


def test_samples_are_mono_floats_within_full_scale_at_the_asked_rate() -> None:
    slow, fast = speak(QUESTION, VOICE, 8000), speak(QUESTION, VOICE, 16000)

    for samples in (slow, fast):
        assert samples.dtype == np.float32
        assert samples.ndim == 1
        assert 0.1 < np.abs(samples).max() <= 1.0
    assert len(fast) / 16000 == pytest.approx(len(slow) / 8000, abs=0.02)


def test_there_is_no_silence_before_or_after() -> None:
    samples = np.abs(speak(QUESTION, VOICE, 8000))

    assert samples[0] > SILENCE
    assert samples[-1] > SILENCE


def test_speed_pitch_accent_and_speaker_all_change_the_sound() -> None:
    voices = [
        VOICE,
        SpeechVoice(accent="en-us", variant="f3", words_per_minute=140),
        SpeechVoice(accent="en-us", variant="f3", pitch=80),
        SpeechVoice(accent="en-gb-scotland", variant="f3"),
        SpeechVoice(accent="en-us", variant="m2"),
    ]

    assert len({speak(QUESTION, voice, 8000).tobytes() for voice in voices}) == len(voices)
    assert len({voice.voice_id for voice in voices}) == len(voices)


def test_a_missing_engine_is_one_line_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)

    with pytest.raises(DataError) as caught:
        speak(QUESTION, VOICE, 8000)

    assert str(caught.value) == (
        "cannot speak text: the package espeakng-loader, which brings espeak-ng, is not installed. "
        "Run: pip install 'dougong[demo]'"
    )


def test_the_engine_says_its_version() -> None:
    name, version = speech_engine().split()

    assert name == "espeak-ng"
    assert version[0].isdigit()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "klatt2"}, "variant 'klatt2' .* Use one of m1, m2"),
        ({"variant": "f1", "words_per_minute": 20}, "words_per_minute=20 .* Use 80 to 450"),
        ({"variant": "f1", "pitch": 100}, "pitch=100 .* Use 0 to 99"),
    ],
)
def test_a_voice_that_makes_no_sense_is_refused_when_made(settings: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SpeechVoice(**settings)  # type: ignore[arg-type]  # settings as a user may write them


@pytest.mark.parametrize(
    ("text", "accent", "sample_rate", "message"),
    [
        ("  ", "en-us", 8000, "cannot speak '  '"),
        ("...", "en-us", 8000, "stayed silent on '...'"),
        ("yes", "klingon-hs", 8000, "no accent 'klingon-hs'"),
        ("yes", "en-us", 800, "sample_rate=800 is too low"),
    ],
)
def test_what_cannot_be_spoken_is_refused_in_one_line(text: str, accent: str, sample_rate: int, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        speak(text, SpeechVoice(accent=accent, variant="f1"), sample_rate)

    assert "\n" not in str(caught.value)
