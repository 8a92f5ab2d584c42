"""How a server is set up.

Here        ServeConfig, with Limits; `read_keys`.
Elsewhere   obeying it (app.py, access.py, server.py); what batching is told (batcher.py).
Promise     a server that others could reach has keys, or it does not start.
"""

from __future__ import annotations

import ipaddress
import json
from pathlib import Path
from typing import Final

from pydantic import field_validator, model_validator

from dougong.core.config import Config, parse
from dougong.core.errors import ConfigError
from dougong.serve.batcher import BatcherConfig

LOOPBACK: Final = "127.0.0.1"


class Limits(Config):
    """What a caller may send. What is beyond is refused before it is decoded."""

    body_bytes: int = 16 * 2**20
    """Of a request."""

    records: int = 256
    """Of a request."""

    pixels: int = 25_000_000
    """Of a picture, as its header claims."""

    audio_seconds: float = 120.0
    """Of a recording, as its header claims."""

    tokens: int = 4096
    """Of a text, counted as its characters divided by four, without decoding it."""

    body_seconds: float = 15.0
    """From a request's first byte to its last."""

    connections: int = 20_000
    """At once; further ones are answered 503 and closed."""


class KeyConfig(Config):
    """A caller who is let in."""

    name: str
    """Stands in logs and metrics, in place of the key."""

    sha256: str
    """Of the key, in hexadecimal digits: the key itself is nowhere on the server."""

    per_second: float | None = None
    """Requests that it may make a second, in the long run. None: no limit."""

    burst: int = 100
    """Requests that it may make at once, where `per_second` is set."""

    admin: bool = False
    """Whether it may load, unload and direct traffic."""

    @field_validator("sha256")
    @classmethod
    def _is_a_sum(cls, text: str) -> str:
        if len(text) != 64 or any(letter not in "0123456789abcdef" for letter in text):
            raise ValueError("a sha256 sum has 64 digits, 0-9 and a-f. Make one with: printf %s KEY | sha256sum")
        return text


class ServeConfig(Config):
    """A whole server."""

    host: str = LOOPBACK
    port: int = 8000
    grpc_port: int | None = None
    replicas: int = 1
    """Workers for each version of a model."""

    threads: int = 1
    """Processor cores that one worker may use."""

    batching: BatcherConfig = BatcherConfig()
    limits: Limits = Limits()
    keys: tuple[KeyConfig, ...] = ()
    """Who is let in. Empty: everybody who can reach the port."""

    cors_origins: tuple[str, ...] = ()
    """Pages of other origins that may call. Empty: none."""

    fetch_from: tuple[str, ...] = ()
    """Hosts from which a URL in a record is fetched. Empty: none is fetched."""

    models_folder: Path | None = None
    """Where bundles lie that may be loaded while the server runs: FOLDER/NAME/VERSION. None: none may."""

    certificate: Path | None = None
    certificate_key: Path | None = None
    log_requests: bool = True
    drain_seconds: float = 30.0
    """After SIGTERM, to answer what has come."""

    settle_seconds: float = 1.0
    """After SIGTERM, how long nothing must have come before the port is closed: callers learn of it meanwhile."""

    telemetry: bool = False
    """OpenTelemetry traces, sent where OTEL_EXPORTER_OTLP_ENDPOINT says."""

    @field_validator("replicas", "threads")
    @classmethod
    def _at_least_one(cls, number: int) -> int:
        if number < 1:
            raise ValueError(f"{number} must be 1 or more.")
        return number

    @model_validator(mode="after")
    def _safe(self) -> ServeConfig:
        if not self.keys and not _is_loopback(self.host):
            raise ValueError(
                f"host {self.host} can be reached from other machines, and nobody would need a key. Give --keys FILE, "
                f"or --host {LOOPBACK} behind a proxy that asks for one."
            )
        if (self.certificate is None) != (self.certificate_key is None):
            raise ValueError("a certificate and its key go together. Give both --certificate and --certificate-key.")
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_keys(path: Path) -> tuple[KeyConfig, ...]:
    """Keys from a JSON file: a list of {"name", "sha256", "per_second", "burst", "admin"}.

    Raises:
        ConfigError: it cannot be read, holds none, or a name twice.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--keys {path} cannot be read ({error.strerror}). Name a JSON file of keys.") from None
    except ValueError:
        raise ConfigError(f"--keys {path} is not JSON. {_EXAMPLE}") from None
    if not isinstance(values, list) or not values or not all(isinstance(value, dict) for value in values):
        raise ConfigError(f"--keys {path} holds no list of keys. {_EXAMPLE}")
    keys = tuple(parse(KeyConfig, value, where=f"--keys {path}") for value in values)
    for field in ("name", "sha256"):
        held = [getattr(key, field) for key in keys]
        twice = next((each for each in held if held.count(each) > 1), None)
        if twice is not None:
            raise ConfigError(f"--keys {path} has the {field} {twice!r} twice. Give each caller its own.")
    return keys


_EXAMPLE: Final = 'Use for example [{"name": "shop", "sha256": "(of the key)", "per_second": 50}].'
