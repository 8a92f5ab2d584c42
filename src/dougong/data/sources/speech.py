"""Speaks text with espeak-ng, inside this process, the same way every time.

Here        SpeechVoice, speak, and the engine's name for provenance.
Elsewhere   who speaks what (data/sources/easy_vqa.py); recorded speech (data/sources/digits.py).
Promise     the same text, voice and rate give the same samples, in any order and any process;
            tests/data/sources/test_speech.py holds it to that. What it returns is synthetic and must be called so.
"""

import _ctypes
import ctypes
import importlib
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import soxr

from dougong.core.errors import DataError

# From espeak-ng's speak_lib.h (API of 1.52).
_AUDIO_OUTPUT_SYNCHRONOUS: Final = 2
_INITIALIZE_DONT_EXIT: Final = 0x8000
_CHARACTERS_UTF8: Final = 1
_POSITION_CHARACTER: Final = 1
_PARAMETER_RATE: Final = 1
_PARAMETER_PITCH: Final = 3
_SOUND_CALLBACK: Final = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

VARIANTS: Final = tuple(f"m{number}" for number in range(1, 9)) + tuple(f"f{number}" for number in range(1, 6))
"""espeak-ng's plain speakers. Its Klatt voices draw noise from the C library's `rand`, which others may disturb."""

LOWEST_RATE: Final = 4000
SILENCE: Final = 0.002
"""Samples below this, of a full scale of 1.0, are trimmed at both ends."""

# The library holds one utterance in global variables.
_one_at_a_time: Final = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class SpeechVoice:
    """One synthetic speaker and the way it speaks."""

    accent: str = "en-us"
    """An espeak-ng language, such as `en-us`, `en` (British), `en-gb-scotland` or `en-029` (Caribbean)."""

    variant: str
    """The speaker, one of `VARIANTS`. Two voices of one variant are the same speaker."""

    words_per_minute: int = 175
    """Speed of speech."""

    pitch: int = 50
    """0 is lowest, 99 is highest, 50 is the speaker's own."""

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise DataError(
                f"speech variant {self.variant!r} is not one of the reproducible speakers. "
                f"Use one of {', '.join(VARIANTS)}."
            )
        if not 80 <= self.words_per_minute <= 450:
            raise DataError(
                f"words_per_minute={self.words_per_minute} is outside what espeak-ng can speak. Use 80 to 450."
            )
        if not 0 <= self.pitch <= 99:
            raise DataError(f"pitch={self.pitch} is outside espeak-ng's scale. Use 0 to 99; 50 is the speaker's own.")

    @property
    def voice_id(self) -> str:
        """A name for files and tables that says everything about the voice."""
        return f"{self.accent}-{self.variant}-{self.words_per_minute}wpm-p{self.pitch}"


def speak(text: str, voice: SpeechVoice, sample_rate: int) -> npt.NDArray[np.float32]:
    """Speak `text` as mono samples within -1..1, without silence before and after."""
    if not text.strip() or "\0" in text:
        raise DataError(f"cannot speak {text!r}: there must be words, and no zero character. Give plain text.")
    if sample_rate < LOWEST_RATE:
        raise DataError(
            f"sample_rate={sample_rate} is too low for speech to be understood. "
            f"Use {LOWEST_RATE} or more, such as 8000."
        )
    pcm, own_rate = _synthesize(text, voice)
    samples = np.frombuffer(pcm, dtype=np.int16).astype(np.float32) / 32768
    if own_rate != sample_rate:
        samples = soxr.resample(samples, own_rate, sample_rate)
    loud = np.flatnonzero(np.abs(samples) > SILENCE)
    if loud.size == 0:
        raise DataError(f"espeak-ng stayed silent on {text!r}: it found nothing to pronounce. Give words or numbers.")
    # The resampler may overshoot full scale a little.
    return np.clip(samples[loud[0] : loud[-1] + 1], -1.0, 1.0).astype(np.float32)


def speech_engine() -> str:
    """Name and version of the engine, for provenance."""
    with _one_at_a_time, _fresh_library(_espeakng_loader()) as library:
        library.espeak_Info.restype = ctypes.c_char_p
        return f"espeak-ng {library.espeak_Info(None).decode()}"


def _synthesize(text: str, voice: SpeechVoice) -> tuple[bytes, int]:
    """16-bit samples in the engine's own rate, and that rate."""
    loader = _espeakng_loader()
    chunks: list[bytes] = []

    def collect(samples: Any, num_samples: int, _events: Any) -> int:
        if samples and num_samples > 0:
            chunks.append(ctypes.string_at(samples, num_samples * 2))
        return 0

    # Held in a name until the library is gone: ctypes keeps no reference to it.
    callback = _SOUND_CALLBACK(collect)
    with _one_at_a_time, _fresh_library(loader) as library:
        data_path = str(loader.get_data_path())
        own_rate = library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path.encode(), _INITIALIZE_DONT_EXIT)
        if own_rate <= 0:
            raise DataError(
                f"espeak-ng could not start from {data_path}: its data is missing there, or the path is too long. "
                "Reinstall espeakng-loader, in an environment with a short path."
            )
        try:
            # Breath and consonants are random noise; the engine would seed them with the time.
            library.espeak_ng_SetRandSeed(ctypes.c_long(1))
            library.espeak_SetSynthCallback(callback)
            if library.espeak_SetVoiceByName(f"{voice.accent}+{voice.variant}".encode()) != 0:
                raise DataError(
                    f"espeak-ng knows no accent {voice.accent!r}. "
                    "Use one of its languages, such as en-us or en-gb-x-rp."
                )
            # After the voice, which brings a speed and a pitch of its own.
            library.espeak_SetParameter(_PARAMETER_RATE, voice.words_per_minute, 0)
            library.espeak_SetParameter(_PARAMETER_PITCH, voice.pitch, 0)
            encoded = text.encode() + b"\0"
            status = library.espeak_Synth(
                encoded, ctypes.c_size_t(len(encoded)), 0, _POSITION_CHARACTER, 0, _CHARACTERS_UTF8, None, None
            )
            library.espeak_Synchronize()
        finally:
            library.espeak_Terminate()
    if status != 0:
        raise DataError(f"espeak-ng could not speak {text!r} (its status: {status}). Give shorter plain text.")
    return b"".join(chunks), own_rate


@contextmanager
def _fresh_library(loader: ModuleType) -> Iterator[ctypes.CDLL]:
    """The library as it is just after loading, unloaded again afterwards.

    The slow waver of the pitch runs on from utterance to utterance in a variable that neither the seed nor
    `espeak_Initialize` resets, so only a newly loaded library says the same thing twice. Loading costs about 4 ms.
    """
    library = ctypes.CDLL(str(loader.get_library_path()))
    try:
        yield library
    finally:
        if sys.platform == "win32":
            _ctypes.FreeLibrary(library._handle)
        else:
            _ctypes.dlclose(library._handle)


def _espeakng_loader() -> ModuleType:
    try:
        return importlib.import_module("espeakng_loader")
    except ImportError:
        raise DataError(
            "cannot speak text: the package espeakng-loader, which brings espeak-ng, is not installed. "
            "Run: pip install 'dougong[demo]'"
        ) from None
