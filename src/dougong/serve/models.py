"""The models that are served: their versions, and which request goes to which.

Here        Models (load, unload, direct, choose), Version, Traffic.
Elsewhere   one version at work (engine.py); being told to (app.py).
Promise     a version is warm before the first request goes to it, and answers the last one that it took before it ends:
            in a swap no request fails and none is answered by another version than the one that it says.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import field_validator

from dougong.core.bundle import bundle_in, kind_of, read_bundle
from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.core.files import inside
from dougong.core.signature import Signature
from dougong.serve.backend import WRITING_KINDS
from dougong.serve.columns import Columns
from dougong.serve.engine import BatchDone, Engine
from dougong.serve.settings import ServeConfig
from dougong.serve.workers import ProcessWorkers, Workers

NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

_log = logging.getLogger("dougong.serve")


class Wanted(NamedTuple):
    """A bundle to be served."""

    name: str
    version: str
    folder: Path


class Version(NamedTuple):
    """A version that is served."""

    name: str
    version: str
    columns: Columns
    signature: Signature | None
    """None: it writes words and decides nothing."""

    engine: Engine
    provenance: Mapping[str, Any]


class Traffic(Config):
    """Which versions of a model answer."""

    weights: dict[str, float]
    """By version: its share of requests that ask for none. One alone: all go there; small beside 1: a canary."""

    shadow: str | None = None
    """A version that gets a copy of each request, whose answers nobody waits for or sees; they are only compared."""

    @field_validator("weights")
    @classmethod
    def _some(cls, weights: dict[str, float]) -> dict[str, float]:
        if not weights or min(weights.values()) < 0 or not 0 < sum(weights.values()) < float("inf"):
            raise ValueError('weights must be 0 or more, and some above 0. Use for example {"1": 0.9, "2": 0.1}.')
        return weights


class Unknown(Exception):
    """No such model or version is served."""


class Models:
    """All that are served."""

    def __init__(
        self,
        config: ServeConfig,
        *,
        heard: Callable[[Version, BatchDone], None] | None = None,
        workers: Callable[[Wanted], Workers] | None = None,
    ) -> None:
        self.config = config
        self._heard = heard
        self._make_workers = workers or self._processes
        self._versions: dict[str, dict[str, Version]] = {}
        self._traffic: dict[str, Traffic] = {}
        self._dice = random.Random()  # noqa: S311, nothing secret depends on it
        self._changing = asyncio.Lock()
        self._ending: set[asyncio.Task[None]] = set()

    @property
    def names(self) -> list[str]:
        return list(self._versions)

    @property
    def all(self) -> list[Version]:
        return [version for versions in self._versions.values() for version in versions.values()]

    def index(self) -> list[dict[str, str]]:
        """What is served, as the protocol of repositories lists it."""
        return [
            {"name": each.name, "version": each.version, "state": "READY" if each.engine.ready else "UNAVAILABLE"}
            for each in self.all
        ]

    @property
    def ready(self) -> bool:
        """Whether every model can be asked."""
        return bool(self._versions) and all(version.engine.ready for version in self.all)

    def versions(self, name: str) -> dict[str, Version]:
        """Of one model.

        Raises:
            Unknown: it is not served.
        """
        if name not in self._versions:
            raise Unknown(f"no model is called {name[:60]!r}; served are {', '.join(self._versions) or 'none'}")
        return self._versions[name]

    def traffic(self, name: str) -> Traffic:
        """Of one model."""
        self.versions(name)
        return self._traffic[name]

    def choose(self, name: str | None, version: str | None) -> Version:
        """The version that is to answer. Where one model is served, it needs no name.

        Raises:
            Unknown: it is not served.
        """
        if name is None:
            if len(self._versions) != 1:
                raise Unknown(f"say which model: {', '.join(self._versions) or 'none is served'}")
            name = next(iter(self._versions))
        versions = self.versions(name)
        if version is not None:
            if version not in versions:
                raise Unknown(f"{name} has no version {version[:40]!r}; served are {', '.join(versions)}")
            return versions[version]
        weights = self._traffic[name].weights
        if len(weights) == 1:
            return versions[next(iter(weights))]
        return versions[self._dice.choices(list(weights), list(weights.values()))[0]]

    def shadow(self, chosen: Version) -> Version | None:
        """The version that is to be asked as well."""
        traffic = self._traffic.get(chosen.name)  # none where it is no longer served, and answers what it had taken
        if traffic is None or traffic.shadow is None or traffic.shadow == chosen.version:
            return None
        return self._versions[chosen.name].get(traffic.shadow)

    async def load(self, wanted: Wanted, *, take_over: bool = True) -> Version:
        """Serve a bundle, once it is warm. With `take_over` all of the model's traffic goes there, and versions without
        any end when they have answered; an equal version is replaced.

        Raises:
            DougongError: it is no bundle that can be served.
        """
        async with self._changing:
            loaded = await self._load(wanted)
            before = self._versions.get(wanted.name, {})
            replaced = before.get(wanted.version)
            self._versions.setdefault(wanted.name, {})[wanted.version] = loaded
            if take_over or not before:
                self._traffic[wanted.name] = Traffic(weights={wanted.version: 1.0})
            leaving = [replaced] if replaced is not None else []
            if take_over:
                leaving += [each for each in before.values() if each.version != wanted.version]
            for each in leaving:
                if self._versions[wanted.name].get(each.version) is each:
                    del self._versions[wanted.name][each.version]
                self._end(each)
            return loaded

    async def unload(self, name: str, version: str | None = None) -> None:
        """Serve it no longer; what it has taken is still answered.

        Raises:
            Unknown: it is not served.
            ConfigError: traffic goes to this version.
        """
        async with self._changing:
            versions = self.versions(name)
            if version is None:
                leaving = list(versions.values())
                del self._versions[name], self._traffic[name]
            else:
                if version not in versions:
                    raise Unknown(f"{name} has no version {version[:40]!r}; served are {', '.join(versions)}")
                traffic = self._traffic[name]
                if len(versions) > 1 and (traffic.weights.get(version) or traffic.shadow == version):
                    raise ConfigError(f"requests still go to version {version} of {name}: direct them elsewhere first.")
                leaving = [versions.pop(version)]
                if not versions:
                    del self._versions[name], self._traffic[name]
            for each in leaving:
                self._end(each)

    def direct(self, name: str, traffic: Traffic) -> None:
        """Say which versions answer from now on.

        Raises:
            Unknown: a version is not served.
        """
        versions = self.versions(name)
        for version in (*traffic.weights, *([traffic.shadow] if traffic.shadow is not None else [])):
            if version not in versions:
                raise Unknown(f"{name} has no version {version[:40]!r}; served are {', '.join(versions)}")
        self._traffic[name] = traffic

    def found(self, name: str, version: str) -> Wanted:
        """A bundle of the models' folder.

        Raises:
            ConfigError: there is no such folder, or it leads out of it.
        """
        root = self.config.models_folder
        if root is None:
            raise ConfigError("no bundle can be loaded: the server was started without --models FOLDER.")
        check_name(name)
        check_name(version)
        folder = inside(root, f"{name}/{version}")
        if folder is None or not folder.is_dir():
            raise ConfigError(f"there is no bundle {name}/{version} in the server's folder of models.")
        return Wanted(name, version, folder)

    async def drain(self, seconds: float) -> bool:
        """Wait until all is answered; False if that took longer."""
        return all(await asyncio.gather(*(version.engine.drain(seconds) for version in self.all)))

    async def close(self) -> None:
        """End everything."""
        await asyncio.gather(*(version.engine.close() for version in self.all), *self._ending)

    async def _load(self, wanted: Wanted) -> Version:
        check_name(wanted.name)
        check_name(wanted.version)
        folder = bundle_in(wanted.folder)
        kind = kind_of(folder)
        loop = asyncio.get_running_loop()
        # Sums too: what the columns are made of must be what the worker will load.
        manifest = await loop.run_in_executor(None, read_bundle, folder)
        columns = await loop.run_in_executor(
            None, Columns.of_bundle, folder, manifest, self.config.limits, self.config.fetch_from
        )
        loaded: list[Version] = []

        def heard(done: BatchDone) -> None:
            if self._heard is not None:
                self._heard(loaded[0], done)

        engine = Engine(self._make_workers(wanted), self.config.batching, replicas=self.config.replicas, heard=heard)
        signature = None if kind in WRITING_KINDS else manifest.signature
        version = Version(wanted.name, wanted.version, columns, signature, engine, manifest.provenance)
        loaded.append(version)
        try:
            await engine.start()
        except BaseException:
            await engine.close()
            raise
        _log.info("serving", extra={"model": wanted.name, "version": wanted.version})
        return version

    def _processes(self, wanted: Wanted) -> Workers:
        limits = self.config.limits
        return ProcessWorkers(
            {
                "folder": str(wanted.folder),
                "threads": self.config.threads,
                "most_pixels": limits.pixels,
                "most_audio_seconds": limits.audio_seconds,
            }
        )

    def _end(self, version: Version) -> None:
        async def end() -> None:
            await version.engine.drain(self.config.drain_seconds)
            await version.engine.close()
            _log.info("no longer serving", extra={"model": version.name, "version": version.version})

        task = asyncio.get_running_loop().create_task(end())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)


def check_name(name: str) -> None:
    """Raises:
    ConfigError: it cannot stand in an address."""
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{name[:60]!r} cannot name a model or version: use letters, digits, and . _ - after the first."
        )


def read_wanted(bundles: Sequence[str]) -> list[Wanted]:
    """From the command line: PATH, NAME=PATH or NAME:VERSION=PATH. A path alone has its manifest's name.

    Raises:
        BundleError: a path is no bundle.
        ConfigError: two are alike.
    """
    found: list[Wanted] = []
    for text in bundles:
        label, equals, path = text.partition("=")
        folder = bundle_in(Path(path if equals else text))
        kind_of(folder)
        if equals:
            name, _, version = label.partition(":")
        else:
            name, version = re.sub(r"[^A-Za-z0-9._-]+", "-", read_bundle(folder).name).strip("-._") or "model", ""
        version = version or str(1 + sum(each.name == name for each in found))
        check_name(name)
        check_name(version)
        if any((each.name, each.version) == (name, version) for each in found):
            raise ConfigError(f"{text}: {name} has a version {version} already. Write NAME:VERSION=PATH.")
        found.append(Wanted(name, version, folder))
    return found
