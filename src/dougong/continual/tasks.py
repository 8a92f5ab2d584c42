"""What tasks add to a bundle, as files: kilobytes beside the base's own.

Here        Task, Part; `read_parts`, `add_part`, `remove_task`, `merge_tasks`, `export_task`, `import_task`.
Elsewhere   learning one (continual/learn.py); asking them (continual/taught.py).
Promise     the base's files are never written: whoever loads the bundle as a plain model gets its old answers, bit for
            bit, and so does whoever asks an earlier task. A task appears and disappears whole, whenever the process is
            killed, and two processes never lose each other's.

A bundle that has been taught holds `tasks/NAME/NUMBER/` for each part of each task: task.json, adapter.safetensors and
traits.safetensors. Its manifest lists them as all other files. A task has a second part where it has met new classes,
another domain or another modality since: the first one stays as it was.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from dougong.continual.adapters import LowRank, TaskParts, layers_of
from dougong.continual.elastic import Elastic
from dougong.continual.extra import ExtraModality
from dougong.continual.lock import locked
from dougong.continual.prompt import PromptNetwork
from dougong.continual.recognition import Traits, joined
from dougong.core.bundle import MANIFEST, FileSum, Manifest, read_bundle, write_bundle
from dougong.core.config import Config, parse
from dougong.core.errors import BundleError, CheckpointError, ConfigError
from dougong.core.files import sha256_of, whole_file, whole_folder, write_json
from dougong.core.signature import Target
from dougong.data.preparation import ModalityConfig, Preparation
from dougong.engine.weights import distinct_weights, mapped_weights, put_weights, write_weights
from dougong.model.sandwich import EncoderConfig, Sandwich

TASKS: Final = "tasks"
TASK: Final = "task.json"
ADAPTER: Final = "adapter.safetensors"
TRAITS: Final = "traits.safetensors"
ORIGINAL: Final = "original"
"""What the base was made for, as a task's name."""

ORIGINAL_FILES: Final = (f"{TASKS}/{ORIGINAL}.json", f"{TASKS}/{ORIGINAL}.safetensors")
"""By which records of that are known."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Extra(Config):
    """A modality that the base lacks."""

    modality: Annotated[ModalityConfig, Field(discriminator="kind")]
    encoder: Annotated[EncoderConfig, Field(discriminator="kind")]
    tokenizer: str | None = None
    """Of a text, as its file would hold it."""


class Task(Config):
    """task.json: one part of a task."""

    name: str
    number: int = 1
    """Which part, from 1."""

    base: str
    """The sha256 of the base's weights, without which an adapter means nothing."""

    description: str = ""
    """What is asked, in words; it makes the prompts."""

    target: Target
    columns: dict[str, str] = {}
    """By the base's column, the task's own where it is called otherwise."""

    modalities: tuple[str, ...]
    """Those of the base that it reads."""

    extras: dict[str, Extra] = {}
    """Those that it alone reads, by name."""

    carrier: str | None = None
    """The modality whose place its prompts take."""

    rank: int
    prompts: int
    prompt_width: int
    num_parameters: int
    of_base: float
    """The same as a share of the base's."""

    metrics: dict[str, float] = {}
    """On held-out records, told the task."""

    records: int = 0
    """It was learnt from so many."""

    covers: tuple[int, ...] = ()
    """Earlier parts whose records it has met again: where it stands, they are not asked."""

    merged: tuple[str, ...] = ()
    """Tasks that it was made of. It is found by itself once one of them is gone: until then they are."""

    provenance: dict[str, Any] = {}
    trait_counts: dict[str, int] = {}
    patterns: dict[str, int] = {}
    sure: float = 0.0
    """These three: continual/recognition.py."""

    @property
    def key(self) -> str:
        """Its name in an Elastic."""
        return f"{self.name}/{self.number}"


class Part(NamedTuple):
    """A part as it is read."""

    task: Task
    weights: dict[str, Tensor]
    traits: Traits | None


def check_name(name: str) -> str:
    """
    Raises:
        ConfigError: it cannot be a task's name.
    """
    if not _NAME.fullmatch(name) or name == ORIGINAL:
        raise ConfigError(
            f"task name {name!r} cannot be used: names are letters, digits, '.', '_' and '-', up to 64, and "
            f"{ORIGINAL!r} is what the bundle was made for. Use for example digits-2."
        )
    return name


def base_sum(manifest: Manifest) -> str:
    """By which an adapter knows its base."""
    return manifest.files["model.safetensors"].sha256


def tasks_in(manifest: Manifest) -> list[str]:
    """The folders of all parts, by task and number."""
    found = [name.rpartition("/")[0] for name in manifest.files if name.startswith(f"{TASKS}/") and name.endswith(TASK)]
    return sorted(found, key=lambda folder: (folder.split("/")[1], int(folder.split("/")[2])))


def read_parts(folder: Path, manifest: Manifest) -> list[Part]:
    """Every part of every task; the bundle's sums have been checked.

    Raises:
        BundleError: a part is not whole, or is of another base.
    """
    return [_read_part(folder / inner, base_sum(manifest)) for inner in tasks_in(manifest)]


def read_task(folder: Path) -> Task:
    """
    Raises:
        BundleError: it is none.
    """
    try:
        values = json.loads((folder / TASK).read_text(encoding="utf-8"))
        return parse(Task, values, where=TASK)
    except (OSError, ValueError, ConfigError) as error:
        raise BundleError(f"{folder} holds no readable task ({str(error).splitlines()[0]}). Export it again.") from None


def _read_part(folder: Path, base: str) -> Part:
    task = read_task(folder)
    if task.base != base:
        raise BundleError(
            f"task {task.name!r} was learnt on another base ({task.base[:12]}, and here is {base[:12]}): its adapter "
            "means nothing here. Add it to a bundle of its own base."
        )
    try:
        weights = {name: x.clone() for name, x in mapped_weights(folder / ADAPTER).items()}
        traits = None
        if (folder / TRAITS).exists():
            traits = Traits.read(
                {name: x.clone() for name, x in mapped_weights(folder / TRAITS).items()},
                count=task.trait_counts,
                patterns=task.patterns,
                sure=task.sure,
            )
    except (CheckpointError, KeyError) as error:
        raise BundleError(f"{folder} is not whole ({error}). Take the bundle from its source again.") from None
    return Part(task, weights, traits)


def build_parts(base: Sandwich, task: Task, extras: Mapping[str, ExtraModality] | None = None) -> TaskParts:
    """What the task adds, with weights drawn from torch's generator."""
    prompt = None
    if task.prompts and task.carrier is not None:
        prompt = PromptNetwork(
            width=base.width, num_prompts=task.prompts, hidden=task.prompt_width, description=task.description
        )
    if extras is None:
        extras = {
            name: ExtraModality(name, extra_modality(extra).signature(), base.width, extra.encoder)
            for name, extra in task.extras.items()
        }
    return TaskParts(
        layers_of(base, task.modalities),
        rank=task.rank,
        hidden=hidden_width(base),
        num_outputs=task.target.num_outputs,
        prompt=prompt,
        extras=extras,
    )


def hidden_width(base: Sandwich) -> int:
    """Channels that a task's output layer reads."""
    if base.only_votes:
        return base.width * len(base.names)
    return int(base.decision.out.in_features)


def extra_modality(extra: Extra) -> Any:
    """The modality as records are read by it."""
    from tempfile import TemporaryDirectory

    name = "extra"
    with TemporaryDirectory() as made:
        folder = Path(made)
        target = Target(name="none", task="regression")
        saved = {"modalities": {name: extra.modality.model_dump(mode="json")}, "target": target.model_dump(mode="json")}
        write_json(folder / "preparation.json", saved)
        if extra.tokenizer is not None:
            (folder / "tokenizer-0.json").write_text(extra.tokenizer, encoding="utf-8")
        return Preparation.load(folder).modalities[name]


def elastic_of(base: Sandwich, parts: Sequence[Part]) -> Elastic:
    """The base with all of them.

    Raises:
        BundleError: a part's numbers do not fit its description.
    """
    built = {}
    for part in parts:
        module = build_parts(base, part.task)
        try:
            put_weights(module, part.weights, where=f"task {part.task.name!r}")
        except CheckpointError as error:
            raise BundleError(f"{error} Take the bundle from its source again.") from None
        built[part.task.key] = module
    return Elastic(base, built, carriers={part.task.key: part.task.carrier for part in parts}).eval()


# Changing a bundle -------------------------------------------------------------------------------------------


def copy_bundle(source: Path, out: Path) -> None:
    """The same bundle in another place, to be taught there."""
    manifest = read_bundle(source)
    with write_bundle(out, manifest) as building:
        for name in manifest.files:
            (building / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, building / name)


def add_part(bundle: Path, task: Task, weights: Mapping[str, Tensor], traits: Traits | None) -> Task:
    """Write a part; it gets the next number of its task. The bundle is whole at every moment.

    Raises:
        BundleError: the bundle changed its base meanwhile.
    """
    with _changing(bundle):
        manifest = read_bundle(bundle)
        if task.base != base_sum(manifest):
            raise BundleError(f"{bundle} is of another base than the one that task {task.name!r} was learnt on.")
        numbers = [int(inner.split("/")[2]) for inner in tasks_in(manifest) if inner.split("/")[1] == task.name]
        # What a killed process left there is in nobody's manifest, and is replaced.
        task = task.model_copy(update={"number": max(numbers, default=0) + 1})
        folder = bundle / TASKS / task.name / str(task.number)
        with whole_folder(folder) as building:
            write_part(building, task, weights, traits)
        files = {
            f"{TASKS}/{task.name}/{task.number}/{path.name}": FileSum(
                sha256=sha256_of(path), num_bytes=path.stat().st_size
            )
            for path in sorted(folder.iterdir())
        }
        _write_manifest(bundle, manifest, {**manifest.files, **files})
    return task


def write_part(folder: Path, task: Task, weights: Mapping[str, Tensor], traits: Traits | None) -> None:
    """The files of a part."""
    write_json(folder / TASK, task.model_dump(mode="json"))
    write_weights(folder / ADAPTER, dict(weights))
    if traits is not None:
        write_weights(folder / TRAITS, traits.tensors())


class _OriginalTraits(Config):
    """original.json."""

    trait_counts: dict[str, int]
    patterns: dict[str, int]
    sure: float


def add_original(bundle: Path, traits: Traits) -> None:
    """Keep by what records of the original task are known."""
    with _changing(bundle):
        manifest = read_bundle(bundle)
        (bundle / TASKS).mkdir(exist_ok=True)
        about = _OriginalTraits(trait_counts=traits.count, patterns=traits.patterns, sure=traits.sure)
        write_json(bundle / ORIGINAL_FILES[0], about.model_dump(mode="json"))
        with whole_file(bundle / ORIGINAL_FILES[1]) as temporary:
            write_weights(temporary, traits.tensors())
        files = {
            name: FileSum(sha256=sha256_of(bundle / name), num_bytes=(bundle / name).stat().st_size)
            for name in ORIGINAL_FILES
        }
        _write_manifest(bundle, manifest, {**manifest.files, **files})


def read_original(folder: Path, manifest: Manifest) -> Traits | None:
    """What `add_original` kept; None where nothing is known of it.

    Raises:
        BundleError: it cannot be read.
    """
    if not all(name in manifest.files for name in ORIGINAL_FILES):
        return None
    try:
        values = json.loads((folder / ORIGINAL_FILES[0]).read_text(encoding="utf-8"))
        about = parse(_OriginalTraits, values, where=ORIGINAL_FILES[0])
        tensors = {name: x.clone() for name, x in mapped_weights(folder / ORIGINAL_FILES[1]).items()}
        return Traits.read(tensors, count=about.trait_counts, patterns=about.patterns, sure=about.sure)
    except (OSError, ValueError, KeyError, ConfigError, CheckpointError) as error:
        raise BundleError(f"{folder}: {ORIGINAL_FILES[0]} cannot be read ({error}). Copy the bundle again.") from None


def remove_task(bundle: Path, name: str, *, last_part: bool = False, number: int | None = None) -> list[str]:
    """Forget a task on purpose, or what it learnt last, or one part; says which parts went.

    Raises:
        ConfigError: there is no such task.
    """
    with _changing(bundle):
        manifest = read_bundle(bundle)
        parts = [inner for inner in tasks_in(manifest) if inner.split("/")[1] == name]
        if not parts:
            raise ConfigError(f"{bundle} has no task {name!r}. {known_tasks(manifest)}")
        going = parts[-1:] if last_part else parts
        if number is not None:
            going = [inner for inner in parts if int(inner.split("/")[2]) == number]
        kept = {file: value for file, value in manifest.files.items() if file.rpartition("/")[0] not in going}
        _write_manifest(bundle, manifest, kept)  # first: from here on nobody looks for them
        for inner in going:
            shutil.rmtree(bundle / inner, ignore_errors=True)
        for empty in (bundle / TASKS / name, bundle / TASKS):
            if empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()
    return going


def known_tasks(manifest: Manifest) -> str:
    """For an error: what would work."""
    names = sorted({inner.split("/")[1] for inner in tasks_in(manifest)})
    return f"It has {', '.join(names)}." if names else "It has been taught none: use dougong learn."


def export_task(bundle: Path, name: str, out: Path) -> int:
    """A task alone, without its base, as a folder; its bytes.

    Raises:
        ConfigError: there is no such task, or `out` holds something.
    """
    manifest = read_bundle(bundle)
    parts = [inner for inner in tasks_in(manifest) if inner.split("/")[1] == name]
    if not parts:
        raise ConfigError(f"{bundle} has no task {name!r}. {known_tasks(manifest)}")
    if out.exists():
        raise ConfigError(f"{out} is there already. Name a folder that is not.")
    with whole_folder(out) as building:
        for inner in parts:
            shutil.copytree(bundle / inner, building / inner.split("/")[2])
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def import_task(bundle: Path, exported: Path) -> list[Task]:
    """Add what `export_task` wrote.

    Raises:
        BundleError: it is none, or of another base.
        ConfigError: the bundle has a task of that name.
    """
    folders = sorted((path for path in exported.glob("*") if (path / TASK).is_file()), key=lambda path: int(path.name))
    if not folders:
        raise BundleError(f"{exported} holds no task: it has no 1/{TASK}. Give the folder that an export wrote.")
    manifest = read_bundle(bundle)
    parts = [_read_part(folder, base_sum(manifest)) for folder in folders]
    name = check_name(parts[0].task.name)
    if any(inner.split("/")[1] == name for inner in tasks_in(manifest)):
        raise ConfigError(f"{bundle} has a task {name!r} already. Remove that one first.")
    return [add_part(bundle, part.task, part.weights, part.traits) for part in parts]


def merge_tasks(bundle: Path, base: Sandwich, names: Sequence[str], into: str, weights: Sequence[float] = ()) -> Task:
    """One task of several that ask the same of the same modalities: the mean of their changes, of the first one's rank.

    The mean of products is no product of so few numbers: it is cut to the nearest one by its singular values (as
    Stoica et al. 2024, arXiv:2410.19735, align adapters by one decomposition before they are averaged; here only the
    mean itself is decomposed). What it lost is to be measured by its user; the tasks stay.

    Raises:
        ConfigError: fewer than two, or they differ in labels or modalities.
    """
    check_name(into)
    manifest = read_bundle(bundle)
    if any(inner.split("/")[1] == into for inner in tasks_in(manifest)):
        raise ConfigError(f"{bundle} has a task {into!r} already. Choose another name for what is merged.")
    found = read_parts(bundle, manifest)
    chosen: list[Part] = []
    for name in names:
        last = [part for part in found if part.task.name == name]
        if not last:
            raise ConfigError(f"{bundle} has no task {name!r}. {known_tasks(manifest)}")
        chosen.append(last[-1])
    if len(chosen) < 2:
        raise ConfigError(f"merging needs two tasks or more, and {len(chosen)} is named.")
    first = chosen[0].task
    for part in chosen[1:]:
        for what, own, other in (
            ("labels", first.target.labels, part.task.target.labels),
            ("kinds of target", first.target.task, part.task.target.task),
            ("modalities", first.modalities, part.task.modalities),
            ("modalities of their own", tuple(first.extras), tuple(part.task.extras)),
        ):
            if own != other:
                raise ConfigError(
                    f"{first.name!r} and {part.task.name!r} have other {what} ({own} and {other}): only tasks that ask "
                    "the same can be merged. Keep them side by side."
                )
    shares = list(weights) or [1.0] * len(chosen)
    if len(shares) != len(chosen) or min(shares) < 0 or sum(shares) <= 0:
        raise ConfigError(f"weights {shares} must be one number of 0 or more for each of the {len(chosen)} tasks.")
    shares = [share / sum(shares) for share in shares]
    modules = []
    for part in chosen:
        module = build_parts(base, part.task)
        put_weights(module, part.weights, where=part.task.name)
        modules.append(module)
    merged = build_parts(base, first)
    with torch.no_grad():
        for name, x in distinct_weights(merged).items():
            like = [distinct_weights(module).get(name) for module in modules]
            same = [each for each in like if each is not None and each.shape == x.shape]
            if len(same) == len(modules):
                x.copy_(torch.stack([share * each for share, each in zip(shares, same, strict=True)]).sum(dim=0))
        for name in merged.layer_names:
            changes = [module.change(name) for module in modules]
            mean_OI = torch.stack(
                [share * (up @ down) for share, (down, up) in zip(shares, filter(None, changes), strict=True)]
            ).sum(dim=0)
            left, size, right = torch.linalg.svd(mean_OI, full_matrices=False)
            change = merged.changes[name]
            assert isinstance(change, LowRank)
            keep = min(first.rank, len(size))
            change.up_OR.zero_()
            change.down_RI.zero_()
            change.up_OR[:, :keep] = left[:, :keep] * size[:keep].sqrt()
            change.down_RI[:keep] = size[:keep, None].sqrt() * right[:keep]
    known = [part.traits for part in chosen if part.traits is not None]
    traits = joined(known) if len(known) == len(chosen) else None
    task = first.model_copy(
        update={
            "name": into,
            "metrics": {},
            "records": sum(part.task.records for part in chosen),
            "covers": (),
            "merged": tuple(part.task.name for part in chosen),
            "provenance": {"merged from": [part.task.key for part in chosen], "weights": shares},
            "trait_counts": {} if traits is None else traits.count,
            "patterns": {} if traits is None else traits.patterns,
            "sure": 0.0 if traits is None else traits.sure,
        }
    )
    return add_part(bundle, task, distinct_weights(merged), traits)


def _write_manifest(bundle: Path, manifest: Manifest, files: Mapping[str, FileSum]) -> None:
    write_json(bundle / MANIFEST, manifest.model_copy(update={"files": dict(files)}).model_dump(mode="json"))


def _changing(bundle: Path) -> Any:
    place = bundle.resolve()
    return locked(place.parent / f".{place.name}.lock", what=str(bundle))
