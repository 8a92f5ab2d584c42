"""The entries of a registry, in MLflow's model registry.

Here        Entry, Index, `open_index`: in a folder by SQLite, or on a server by its URL.
Elsewhere   what an entry means (versions.py); the files (store.py).
Promise     each change is one transaction of MLflow's; what stands here is what MLflow's own page and client show.
            Reading a folder asks SQLite itself and loads no MLflow, which alone takes seconds to start.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from dougong.core.errors import ConfigError, RunError

DATABASE: Final = "mlflow.db"


_ENTRIES: Final = (
    "SELECT name, version FROM model_versions WHERE ? IS NULL OR name = ?",
    "SELECT name, version, key, value FROM model_version_tags WHERE ? IS NULL OR name = ?",
    "SELECT name, version, alias FROM registered_model_aliases WHERE ? IS NULL OR name = ?",
)


class Entry(NamedTuple):
    """One version, as it stands in the index."""

    name: str
    number: int
    tags: Mapping[str, str]
    aliases: tuple[str, ...]


class Index(ABC):
    """What a registry asks."""

    @abstractmethod
    def entries(self, name: str | None) -> list[Entry]:
        """Of one name, or of all."""

    @abstractmethod
    def tags(self, name: str) -> Mapping[str, str]:
        """What is written down of a name, whatever the version."""

    @abstractmethod
    def add(self, name: str, tags: Mapping[str, str], metrics: Mapping[str, Mapping[str, float]]) -> int:
        """A new version; its number."""

    @abstractmethod
    def point(self, name: str, alias: str, number: int) -> None:
        """Let an alias mean this version."""

    @abstractmethod
    def write(self, name: str, key: str, value: str) -> None: ...

    @abstractmethod
    def strike(self, name: str, key: str) -> None: ...


def open_index(folder: Path, server: str | None) -> Index:
    """
    Raises:
        ConfigError: the library is not installed, or the URL is none.
    """
    if server is not None:
        if not re.match(r"https?://", server):
            raise ConfigError(f"server {server!r} is no URL of an MLflow server. Use for example http://host:5000.")
        return _Mlflow(server)
    return _Folder(folder)


class _Mlflow(Index):
    """By MLflow's own client."""

    def __init__(self, uri: str) -> None:
        # Asked before it is loaded: it would otherwise tell its makers of every use.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("DO_NOT_TRACK", "true")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what its own parts no longer like is nothing a user can mend
                import mlflow  # noqa: F401, loads what the client needs
                from mlflow.exceptions import MlflowException
                from mlflow.tracking import MlflowClient
        except ImportError:
            raise ConfigError("the registry is kept by MLflow, which is not installed: dougong[continual].") from None
        for noisy in ("mlflow", "alembic"):  # only now: loading it sets its own level
            logging.getLogger(noisy).setLevel(logging.WARNING)
        self._error: type[Exception] = MlflowException
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._client: Any = _Quiet(MlflowClient(tracking_uri=uri, registry_uri=uri))

    def entries(self, name: str | None) -> list[Entry]:
        models = self._all(self._client.search_registered_models, None if name is None else f"name='{_quoted(name)}'")
        every: dict[tuple[str, int], list[str]] = {}
        for model in models:
            for alias, number in dict(model.aliases or {}).items():
                every.setdefault((model.name, int(number)), []).append(alias)
        found = self._all(self._client.search_model_versions, None if name is None else f"name='{_quoted(name)}'")
        return [
            Entry(
                each.name,
                int(each.version),
                dict(each.tags),
                tuple(sorted(every.get((each.name, int(each.version)), ()))),
            )
            for each in found
            if "dougong.tree" in each.tags
        ]

    def tags(self, name: str) -> Mapping[str, str]:
        try:
            return dict(self._client.get_registered_model(name).tags)
        except self._error:
            return {}

    def add(self, name: str, tags: Mapping[str, str], metrics: Mapping[str, Mapping[str, float]]) -> int:
        try:
            self._client.create_registered_model(name)
        except self._error:
            self._client.get_registered_model(name)  # it is there already, or this says what is wrong
        run = self._run(name, metrics)
        # One transaction, its tags included: with it the version is there, and before it is not.
        made = self._client.create_model_version(
            name, source=f"dougong:{tags['dougong.tree']}", run_id=run, tags=dict(tags)
        )
        return int(made.version)

    def _run(self, name: str, metrics: Mapping[str, Mapping[str, float]]) -> str:
        """Figures as a run of MLflow's, for its page to plot."""
        found = self._client.get_experiment_by_name(f"dougong/{name}")
        experiment = self._client.create_experiment(f"dougong/{name}") if found is None else found.experiment_id
        run = self._client.create_run(experiment, run_name=name)
        from mlflow.entities import Metric

        named = {
            re.sub(r"[^0-9A-Za-z_./ -]", "_", f"{condition}/{figure}"): float(value)
            for condition, figures in metrics.items()
            for figure, value in figures.items()
        }
        now = int(1000 * time.time())
        self._client.log_batch(run.info.run_id, metrics=[Metric(key, value, now, 0) for key, value in named.items()])
        self._client.set_terminated(run.info.run_id)
        return str(run.info.run_id)

    def point(self, name: str, alias: str, number: int) -> None:
        self._client.set_registered_model_alias(name, alias, str(number))

    def write(self, name: str, key: str, value: str) -> None:
        self._client.set_registered_model_tag(name, key, value)

    def strike(self, name: str, key: str) -> None:
        self._client.delete_registered_model_tag(name, key)

    def _all(self, search: Any, wanted: str | None) -> list[Any]:
        found: list[Any] = []
        token = None
        while True:
            page = search(filter_string=wanted, max_results=1000, page_token=token)
            found += page
            token = page.token
            if not token:
                return found


class _Quiet:
    """MLflow's client without the warnings of its own parts, which a user cannot mend."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._client, name)

        def quietly(*given: Any, **named: Any) -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return call(*given, **named)

        return quietly


class _Folder(Index):
    """SQLite in a folder: read as it is, written by MLflow."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / DATABASE
        self._writer: _Mlflow | None = None

    def entries(self, name: str | None) -> list[Entry]:
        if not self._file.is_file():
            return []
        with self._read() as connection:
            versions, tags, aliases = (connection.execute(query, (name, name)).fetchall() for query in _ENTRIES)
        tags_of: dict[tuple[str, int], dict[str, str]] = {}
        for model, number, key, value in tags:
            tags_of.setdefault((model, int(number)), {})[key] = value
        aliases_of: dict[tuple[str, int], list[str]] = {}
        for model, number, alias in aliases:
            aliases_of.setdefault((model, int(number)), []).append(alias)
        return [
            Entry(
                model, int(number), tags_of[model, int(number)], tuple(sorted(aliases_of.get((model, int(number)), ())))
            )
            for model, number in versions
            if "dougong.tree" in tags_of.get((model, int(number)), {})
        ]

    def tags(self, name: str) -> Mapping[str, str]:
        if not self._file.is_file():
            return {}
        with self._read() as connection:
            rows = connection.execute("SELECT key, value FROM registered_model_tags WHERE name = ?", (name,)).fetchall()
        return dict(rows)

    def add(self, name: str, tags: Mapping[str, str], metrics: Mapping[str, Mapping[str, float]]) -> int:
        return self._mlflow().add(name, tags, metrics)

    def point(self, name: str, alias: str, number: int) -> None:
        self._mlflow().point(name, alias, number)

    def write(self, name: str, key: str, value: str) -> None:
        self._mlflow().write(name, key, value)

    def strike(self, name: str, key: str) -> None:
        self._mlflow().strike(name, key)

    def _read(self) -> _Reading:
        return _Reading(self._file)

    def _mlflow(self) -> _Mlflow:
        if self._writer is None:
            if not self._file.is_file():
                self._make()
            self._writer = _Mlflow(f"sqlite:///{self._file.resolve()}")
        return self._writer

    def _make(self) -> None:
        """An empty database, made elsewhere: its tables are made in many transactions, and a kill may come between."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=".making.") as making:
            file = Path(making) / DATABASE
            first = _Mlflow(f"sqlite:///{file.resolve()}")
            first.entries(None)
            first.tags("none")
            first._client.search_experiments()
            with sqlite3.connect(file) as connection:
                connection.execute("PRAGMA journal_mode=DELETE")
            file.replace(self._file)


class _Reading:
    """A connection that only reads."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> sqlite3.Connection:
        try:
            # May write, for SQLite alone: where a writer was killed, it is the next reader who takes back what was half
            # written (a hot journal). What is asked through this connection writes nothing.
            self._connection = sqlite3.connect(f"{self._file.resolve().as_uri()}?mode=rw", uri=True, timeout=60)
            self._connection.execute("PRAGMA query_only = ON")
        except sqlite3.Error as error:
            raise RunError(f"{self._file} cannot be read ({error}). Copy the registry from a backup.") from None
        return self._connection

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._connection.close()
        if isinstance(error, sqlite3.Error):
            raise RunError(
                f"{self._file} cannot be read as MLflow's registry ({error}). Use the mlflow that wrote it."
            ) from None


def _quoted(name: str) -> str:
    if "'" in name:
        raise ConfigError(f"{name!r} has a quote in it, which no registered name may have.")
    return name
