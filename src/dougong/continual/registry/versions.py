"""Versions of a bundle: registered once and never changed, with aliases that say which is in use.

Here        Registry, Version, Promotion.
Elsewhere   the files (store.py); MLflow, which keeps the entries (index.py); whether a version may be promoted
            (continual/suite/gate.py).
Promise     a process that is killed at any moment leaves the state before or after, never one between; two processes
            at once lose nothing of each other's; a version that was registered stays as it is.

Two things make it so. A version's entry is written in one transaction, after all of its files are on the disk. And a
promotion is first written down, with who was in use before, and then done by moving the alias, in one transaction too:
what was written down and not done is struck out by whoever changes anything next.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from dougong.continual.lock import locked
from dougong.continual.origin import program
from dougong.continual.registry.index import Entry, Index, open_index
from dougong.continual.registry.store import ObjectStore, differing
from dougong.core.bundle import Manifest, bundle_in, read_bundle
from dougong.core.config import Config, parse
from dougong.core.errors import ConfigError, RunError

Alias = Literal["candidate", "production"]
CANDIDATE: Final[Alias] = "candidate"
PRODUCTION: Final[Alias] = "production"
_TREE, _ABOUT, _MOVE = "dougong.tree", "dougong.about", "dougong.move."


class About(Config):
    """What a version's entry says besides its files."""

    registered: str
    """When, in UTC."""

    parent: int | None = None
    """The version it was made from."""

    metrics: dict[str, dict[str, float]] = {}
    tasks: tuple[str, ...] = ()
    data: str | None = None
    """A fingerprint of the records it was trained on, or their name and count."""

    code: str = ""
    """Dougong's version, and the commit where there is one."""

    environment: dict[str, str] = {}
    note: str = ""
    num_bytes: int = 0
    """Of the bundle; what it cost the registry may be far less."""


class Promotion(Config):
    """One move of an alias."""

    alias: Alias
    before: int | None
    after: int
    kind: Literal["promote", "rollback"]
    reason: str = ""
    verdict: str = ""
    """What the gate said: "passed", "overridden: ...", or nothing where none was asked."""

    when: str
    who: str = ""


class Version(NamedTuple):
    """One version."""

    name: str
    number: int
    tree: str
    about: About
    aliases: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "version": self.number,
            "aliases": list(self.aliases),
            "tree": self.tree,
            **self.about.model_dump(mode="json"),
        }


class Registry:
    """A folder, or a folder of files beside a remote MLflow server."""

    def __init__(self, folder: Path, server: str | None = None) -> None:
        """`server` is the URL of an MLflow server that keeps the entries; None keeps them in the folder, by SQLite.

        Raises:
            ConfigError: the library for it is not installed.
        """
        self.folder = folder
        self.store = ObjectStore(folder)
        self._server = server
        self._index: Index | None = None

    # Reading ---------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """What is registered."""
        return sorted({entry.name for entry in self._entries(None)})

    def versions(self, name: str | None = None) -> list[Version]:
        """All versions, by name and number.

        Raises:
            ConfigError: nothing has that name.
        """
        found = [_version(entry) for entry in self._entries(name)]
        if name is not None and not found:
            known = ", ".join(self.names()) or "nothing yet: use dougong registry add"
            raise ConfigError(f"{self.folder} has nothing named {name!r}. It has {known}.")
        return sorted(found, key=lambda version: (version.name, version.number))

    def version(self, name: str, which: int | str) -> Version:
        """By its number, or by an alias.

        Raises:
            ConfigError: there is no such version.
        """
        versions = self.versions(name)
        for version in versions:
            if str(version.number) == str(which) or which in version.aliases:
                return version
        aliases = sorted({alias for version in versions for alias in version.aliases})
        raise ConfigError(
            f"{name} has no version {which!r}. It has 1 to {versions[-1].number}"
            f"{', and ' + ', '.join(aliases) if aliases else ', and no alias yet'}."
        )

    def production(self, name: str) -> Version | None:
        """The version in use, if there is one."""
        return next((version for version in self.versions(name) if PRODUCTION in version.aliases), None)

    def history(self, name: str) -> list[Promotion]:
        """Every move of an alias that was done, in order."""
        return [move for _, move in self._moves(name)]

    def lineage(self, name: str, which: int | str) -> list[Version]:
        """A version, what it was made from, and so on.

        Raises:
            ConfigError: there is no such version.
        """
        by_number = {version.number: version for version in self.versions(name)}
        chain = [self.version(name, which)]
        while (parent := chain[-1].about.parent) is not None and parent in by_number and len(chain) <= len(by_number):
            chain.append(by_number[parent])
        return chain

    def diff(self, name: str, old: int | str, new: int | str) -> dict[str, Any]:
        """What differs between two versions: files, tasks, figures, data, code, environment.

        Raises:
            ConfigError: there is no such version.
        """
        first, second = self.version(name, old), self.version(name, new)
        before, after = first.about, second.about
        conditions = sorted({*before.metrics, *after.metrics})
        figures: dict[str, dict[str, list[float | None]]] = {}
        for condition in conditions:
            ours, theirs = before.metrics.get(condition, {}), after.metrics.get(condition, {})
            changed = {
                figure: [ours.get(figure), theirs.get(figure)]
                for figure in sorted({*ours, *theirs})
                if ours.get(figure) != theirs.get(figure)
            }
            if changed:
                figures[condition] = changed
        return {
            "old": first.number,
            "new": second.number,
            "files": differing(self.store.tree(first.tree), self.store.tree(second.tree)),
            "tasks": {
                "added": sorted(set(after.tasks) - set(before.tasks)),
                "removed": sorted(set(before.tasks) - set(after.tasks)),
            },
            "metrics": figures,
            **{
                what: [getattr(before, what), getattr(after, what)]
                for what in ("data", "code", "environment")
                if getattr(before, what) != getattr(after, what)
            },
        }

    def restore(self, name: str, which: int | str, out: Path) -> Version:
        """Write a version's bundle, byte for byte as it was registered.

        Raises:
            ConfigError: there is no such version.
            RunError: one of its objects is missing or altered.
        """
        version = self.version(name, which)
        self.store.restore(version.tree, out)
        return version

    # Changing --------------------------------------------------------------------------------------------------

    def register(
        self, bundle: Path, name: str | None = None, *, parent: int | str | None = None, note: str = ""
    ) -> Version:
        """Keep a bundle as a new version, which becomes the candidate. The same bundle again is the version it is.

        Raises:
            BundleError: it is no whole bundle.
            ConfigError: `parent` is no version.
        """
        bundle = bundle_in(bundle)
        manifest = read_bundle(bundle)
        name = name or manifest.name
        with self._changing():
            index = self._opened()
            self.store.clear_leftovers()
            tree = self.store.put_bundle(bundle)
            known = {entry.number: entry for entry in index.entries(name)}
            same = next((entry for entry in known.values() if entry.tags.get(_TREE) == tree), None)
            if same is not None:
                return _version(same)
            if parent is not None:
                origin: int | None = self.version(name, parent).number
            else:
                origin = _likely_parent(self.store, self.store.tree(tree), known)
            about = _about(bundle, manifest, origin, note)
            number = index.add(name, {_TREE: tree, _ABOUT: about.model_dump_json()}, about.metrics)
            index.point(name, CANDIDATE, number)
        return self.version(name, number)

    def promote(
        self, name: str, which: int | str = CANDIDATE, *, verdict: str = "", reason: str = "", alias: Alias = PRODUCTION
    ) -> Promotion:
        """Put a version in use. The gate is asked before, by the caller; what it said is recorded.

        Raises:
            ConfigError: there is no such version, or it is in use already.
        """
        with self._changing():
            self._strike_out(name)
            after = self.version(name, which)
            before = next((v.number for v in self.versions(name) if alias in v.aliases), None)
            if before == after.number:
                raise ConfigError(f"{name} {after.number} is in {alias} already. Nothing is changed.")
            return self._move(name, alias, before, after.number, "promote", reason, verdict)

    def rollback(self, name: str, *, reason: str = "") -> Promotion:
        """Put the version in use that was before this one.

        Raises:
            ConfigError: there was none.
        """
        with self._changing():
            self._strike_out(name)
            now = self.production(name)
            if now is None:
                raise ConfigError(f"nothing of {name} is in production. Promote a version first.")
            before = _before(self.history(name), now.number)
            if before is None:
                raise ConfigError(f"{name} {now.number} is the first that was in production: nothing was before it.")
            return self._move(name, PRODUCTION, now.number, before, "rollback", reason, "")

    def _move(
        self,
        name: str,
        alias: Alias,
        before: int | None,
        after: int,
        kind: Literal["promote", "rollback"],
        reason: str,
        verdict: str,
    ) -> Promotion:
        index = self._opened()
        move = Promotion(
            alias=alias,
            before=before,
            after=after,
            kind=kind,
            reason=reason,
            verdict=verdict,
            when=_now(),
            who=os.environ.get("USER", ""),
        )
        number = max((number for number, _ in self._written(name)), default=0) + 1
        index.write(name, f"{_MOVE}{number:09d}", move.model_dump_json())
        index.point(name, alias, after)
        return move

    def _strike_out(self, name: str) -> None:
        """Forget a move that was written down and not done."""
        written = self._written(name)
        done = {number for number, _ in self._moves(name)}
        for number, _ in written:
            if number not in done:
                self._opened().strike(name, f"{_MOVE}{number:09d}")

    def _written(self, name: str) -> list[tuple[int, Promotion]]:
        tags = self._tags(name)
        found = [(int(key.removeprefix(_MOVE)), value) for key, value in tags.items() if key.startswith(_MOVE)]
        return [(number, parse(Promotion, json.loads(value), where=_MOVE)) for number, value in sorted(found)]

    def _moves(self, name: str) -> list[tuple[int, Promotion]]:
        """Those that were done: all but a last one whose alias stands where it stood before."""
        written = self._written(name)
        if written:
            _, last = written[-1]
            now = next((v.number for v in self.versions(name) if last.alias in v.aliases), None)
            if now != last.after:
                return written[:-1]
        return written

    def _changing(self) -> Any:
        return locked(self.folder / "lock.db", what=str(self.folder))

    def _opened(self) -> Index:
        if self._index is None:
            self._index = open_index(self.folder, self._server)
        return self._index

    def _entries(self, name: str | None) -> list[Entry]:
        if self._server is None and not self.folder.is_dir():
            raise RunError(f"{self.folder} is no registry yet. Make it by dougong registry add BUNDLE.")
        return self._opened().entries(name)

    def _tags(self, name: str) -> Mapping[str, str]:
        return self._opened().tags(name)


def _version(entry: Entry) -> Version:
    about = parse(About, json.loads(entry.tags[_ABOUT]), where="the version's entry")
    return Version(entry.name, entry.number, entry.tags[_TREE], about, entry.aliases)


def _before(history: list[Promotion], now: int) -> int | None:
    """Who was in use before, as promotions push and rollbacks pop."""
    stack: list[int | None] = []
    for move in (each for each in history if each.alias == PRODUCTION):
        if move.kind == "promote":
            stack.append(move.before)
        elif stack:
            stack.pop()
    return stack[-1] if stack else None


def _likely_parent(store: ObjectStore, tree: Mapping[str, str], known: Mapping[int, Entry]) -> int | None:
    """The newest version with the same base's weights, if there is one."""
    weights = tree.get("model.safetensors")
    for number in sorted(known, reverse=True):
        if store.tree(known[number].tags[_TREE]).get("model.safetensors") == weights:
            return number
    return None


def _about(bundle: Path, manifest: Manifest, parent: int | None, note: str) -> About:
    from importlib.metadata import PackageNotFoundError, version

    environment = {"python": platform.python_version(), "machine": platform.machine()}
    for package in ("torch", "transformers", "numpy"):
        try:
            environment[package] = version(package)
        except PackageNotFoundError:
            continue
    tasks = sorted(
        {name.split("/")[1] for name in manifest.files if name.startswith("tasks/") and name.count("/") == 3}
    )
    metrics = dict(manifest.metrics)
    for name in tasks:
        numbers = [int(each.split("/")[2]) for each in manifest.files if each.startswith(f"tasks/{name}/")]
        task = json.loads((bundle / "tasks" / name / str(max(numbers)) / "task.json").read_text(encoding="utf-8"))
        metrics[f"task {name}"] = {key: float(value) for key, value in task.get("metrics", {}).items()}
    data = manifest.provenance.get("data fingerprint", manifest.provenance.get("trained on"))
    return About(
        registered=_now(),
        parent=parent,
        metrics=metrics,
        tasks=tuple(tasks),
        data=None if data is None else str(data),
        code=program(),
        environment=environment,
        note=note,
        num_bytes=sum(found.num_bytes for found in manifest.files.values()),
    )


def _now() -> str:
    return datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds")
