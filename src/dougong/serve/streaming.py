"""Words while they are written, and pictures.

Here        words_as_written, drawn.
Elsewhere   writing (bundle/describer.py, bundle/generator.py); sending them on (app.py).
Promise     the pieces put together are what `caption` would have given with the same settings and seed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from dougong.bundle.describer import Describer
from dougong.bundle.generator import Generator, picture_bytes
from dougong.core.config import parse
from dougong.core.errors import ConfigError
from dougong.model.sampling import SamplingConfig


class _GoneError(Exception):
    """Whoever read has stopped: writing on would be for nobody."""


def words_as_written(model: Describer | Generator, picture: bytes, options: Mapping[str, Any]) -> Iterator[str]:
    """Pieces of what is written about a picture; options are those of sampling, and `seed`.

    The model looks up each token that it has chosen before it chooses the next: that is where they are read off, so
    that no model has to know of this.

    Raises:
        ConfigError: an option is unknown, or the model does not read one picture.
        DataError: the picture cannot be read.
    """
    sampling, seed = _settings(model.sampling if isinstance(model, Describer) else model.sampling.caption, options)
    looked_up: nn.Module = model.network.words if isinstance(model, Describer) else model.network.vocabulary
    pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()
    stopped = threading.Event()
    written: list[int] = []
    said = ""

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal said
        if stopped.is_set():
            raise _GoneError
        token_BN = inputs[0]
        if not isinstance(token_BN, Tensor) or token_BN.numel() != 1:
            return  # the beginning, not one token
        written.append(int(token_BN.reshape(-1)[0]))
        text = _text(model, written)
        if text.startswith(said) and text != said:
            pieces.put(text[len(said) :])
            said = text

    def write() -> None:
        try:
            (whole,) = model.caption([picture], sampling=sampling, seed=seed)
            # The last token is never looked up; and what was said cannot be unsaid.
            if whole.startswith(said) and whole != said:
                pieces.put(whole[len(said) :])
            pieces.put(None)
        except _GoneError:
            pieces.put(None)
        except BaseException as error:
            pieces.put(error)

    handle = looked_up.register_forward_hook(note)
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        stopped.set()
        thread.join()
        handle.remove()


def drawn(model: Describer | Generator, text: str, options: Mapping[str, Any]) -> bytes:
    """A picture of what a text says, as a PNG file; options are those of sampling, and `seed`.

    Raises:
        ConfigError: an option is unknown, or the model draws nothing.
        DataError: the text is empty.
    """
    if isinstance(model, Describer):
        raise ConfigError("this model writes words and draws nothing. Send it a picture at /v1/predict.")
    sampling, seed = _settings(model.sampling.draw, options)
    (picture,) = model.draw([text], sampling=sampling, seed=seed)
    return picture_bytes(picture)


def _settings(usual: SamplingConfig, options: Mapping[str, Any]) -> tuple[SamplingConfig, int]:
    given = dict(options)
    seed = given.pop("seed", 0)
    if type(seed) is not int:
        raise ConfigError(f"seed {seed!r} is no whole number. Use for example 0.")
    return parse(SamplingConfig, {**usual.model_dump(), **given}, where="options"), seed


def _text(model: Describer | Generator, tokens: list[int]) -> str:
    from torch import tensor

    return model.text(tensor(tokens))
