"""A network of any kind and what feeds it, written as a bundle and read from one.

Here        `save_bundle`, `load_network`, `load_of_kind`, `load_settings`; names of the files that every bundle has.
Elsewhere   manifest and sums (core/bundle.py); what each kind of bundle is used for (model.py, aligner.py,
            generator.py, describer.py).
Promise     an older bundle at that place is replaced at once and whole, or stays. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from torch import nn

from dougong.core.bundle import Manifest, read_bundle, write_bundle
from dougong.core.config import ConfigT, parse
from dougong.core.errors import BundleError, CheckpointError, ConfigError
from dougong.core.files import write_atomic
from dougong.core.signature import Signature
from dougong.data.preparation import Preparation
from dougong.engine.weights import distinct_weights, mapped_weights, put_weights, write_weights

WEIGHTS: Final = "model.safetensors"
CARD: Final = "README.md"

NetworkT = TypeVar("NetworkT", bound=nn.Module)


def save_bundle(
    folder: str | Path,
    manifest: Manifest,
    preparation: Preparation,
    network: nn.Module,
    card: str,
    more: Mapping[str, str] | None = None,
) -> Path:
    """Write weights, preparation and card, and `more` texts by file name.

    Raises:
        BundleError: the folder holds something else.
    """
    folder = Path(folder)
    with write_bundle(folder, manifest) as building:
        preparation.save(building)
        write_weights(building / WEIGHTS, distinct_weights(network))
        for name, text in {CARD: card, **(more or {})}.items():
            write_atomic(building / name, text)
    return folder


def load_network(
    folder: Path, manifest: Manifest, build: Callable[[], NetworkT], more: Sequence[str] = ()
) -> tuple[Preparation, NetworkT]:
    """What `save_bundle` wrote, after its sums were checked (`read_bundle`). `more` files must be there too.

    Raises:
        BundleError: a file is not listed, or its parts do not fit each other.
    """
    unknown = [name for name in (WEIGHTS, *more, "preparation.json") if name not in manifest.files]
    if unknown:
        raise BundleError(f"{folder} does not list its file {unknown[0]!r}. Take the bundle from its source again.")
    preparation = Preparation.load(folder)
    if preparation.signature() != manifest.signature:
        raise BundleError(f"{folder}: its preparation makes other inputs than its signature says. Save it again.")
    try:
        network = build()
        put_weights(network, mapped_weights(folder / WEIGHTS), where=str(folder))
    except (ConfigError, CheckpointError) as error:
        raise _unfitting(folder, "weights", error) from None
    return preparation, network


def load_of_kind(
    folder: Path,
    kind: str,
    build: Callable[[Mapping[str, Any], Signature], NetworkT],
    more: Sequence[str],
    *,
    refusal: str,
) -> tuple[Manifest, Preparation, NetworkT]:
    """The same of a bundle whose model says its kind; sums are checked first. `build` gets the model's settings;
    `refusal` ends the line that names a bundle of another kind.

    Raises:
        BundleError: it is not a whole, unaltered bundle of this kind.
    """
    manifest = read_bundle(folder)
    settings = dict(manifest.model)
    if settings.pop("kind", None) != kind:
        raise BundleError(f"{folder} {refusal}")
    preparation, network = load_network(folder, manifest, lambda: build(settings, manifest.signature), more)
    return manifest, preparation, network


def load_settings(folder: Path, file: str, kind: type[ConfigT]) -> ConfigT:
    """Settings that stand in a bundle's file of their own.

    Raises:
        BundleError: they are none of that kind.
    """
    try:
        return parse(kind, json.loads((folder / file).read_text(encoding="utf-8")), where=file)
    except (ConfigError, ValueError) as error:
        raise _unfitting(folder, file, error) from None


def _unfitting(folder: Path, what: str, error: Exception) -> BundleError:
    first = str(error).splitlines()[0]
    return BundleError(f"{folder}: its {what} do not fit its model ({first}). Take it from its source again.")
