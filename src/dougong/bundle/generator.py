"""A trained writer as its user has it: pictures to captions, texts to pictures, from a bundle and back into one.

Here        Generator (caption, draw, save), load_generator.
Elsewhere   a model that decides (bundle/model.py); the bundle's files and sums (core/bundle.py); training (recipes/).
Promise     the same bundle, input, settings and seed write the same; what is saved and loaded writes the same; an input
            that cannot be read is refused with its reason, before anything is written.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dougong.bundle.saving import load_of_kind, load_settings, save_bundle
from dougong.core.bundle import Manifest, bundle_in
from dougong.core.config import parse
from dougong.core.errors import DataError
from dougong.core.seeds import derive_seed
from dougong.core.signature import Signature
from dougong.data.collate import Collator, Request
from dougong.data.modality.image import ImageModality
from dougong.data.modality.text import TextModality
from dougong.data.preparation import Preparation
from dougong.engine.batches import to_tensors
from dougong.model.sampling import SamplingConfig, SamplingsConfig
from dougong.model.writer import Direction, Writer, WriterConfig
from dougong.nn.batch import Batch

KIND: Final = "writer"
SAMPLING: Final = "sampling.json"
AT_ONCE: Final = 64

Picture: TypeAlias = "str | Path | bytes | Image.Image"


class Generator:
    """A writer with the preparation that feeds it."""

    def __init__(
        self, network: Writer, preparation: Preparation, manifest: Manifest, sampling: SamplingsConfig | None = None
    ) -> None:
        self.network = network.eval()
        self.preparation = preparation
        self.manifest = manifest
        self.sampling = sampling or SamplingsConfig()
        """What is used where a caller gives no settings."""
        self._device = next(network.parameters()).device
        self._image = cast(ImageModality, preparation.modalities[network.picture])
        self._text = cast(TextModality, preparation.modalities[network.words])

    def __repr__(self) -> str:
        return f"<dougong.Generator {self.manifest.name!r}: {', '.join(self.network.config.directions)}>"

    def caption(
        self, pictures: Sequence[Picture], *, sampling: SamplingConfig | None = None, seed: int = 0
    ) -> list[str]:
        """Say what pictures show: files, their bytes, or Pillow's pictures.

        Raises:
            ConfigError: the model has not learnt it.
            DataError: a picture cannot be read.
        """
        captions: list[str] = self._written("caption", [picture_bytes(picture) for picture in pictures], sampling, seed)
        return captions

    def draw(self, texts: Sequence[str], *, sampling: SamplingConfig | None = None, seed: int = 0) -> list[Image.Image]:
        """Draw what texts say.

        Raises:
            ConfigError: the model has not learnt it.
            DataError: a text is empty.
        """
        pictures: list[Image.Image] = self._written("draw", texts, sampling, seed)
        return pictures

    def write(self, batch: Batch, direction: Direction, *, sampling: SamplingConfig | None = None, seed: int) -> Any:
        """The same for a batch that is at hand: captions, or pictures."""
        generator = torch.Generator(self._device).manual_seed(derive_seed(seed, direction))
        written = self.network.write(batch, direction, sampling or getattr(self.sampling, direction), generator)
        if direction == "caption":
            return [self.text(ids_N) for ids_N in written]
        return self.pictures(self.network.pictures(written))

    def write_ids(self, batch: Batch, *, sampling: SamplingConfig | None = None, seed: int = 0) -> Tensor:
        """Captions as token ids (B, N), from the one that begins; what is shorter is filled up with the end's."""
        generator = torch.Generator(self._device).manual_seed(derive_seed(seed, "caption"))
        ids_BN = self.network.write(batch, "caption", sampling or self.sampling.caption, generator)
        begin = int(self._text.tokenizer.encode("").ids[0])
        return torch.cat([torch.full_like(ids_BN[:, :1], begin), ids_BN], dim=1)

    @property
    def end(self) -> int:
        """The token id after a caption."""
        return self.network.config.end_of_words

    def text(self, ids_N: Tensor) -> str:
        """Token ids as words."""
        return self._text.tokenizer.decode(ids_N.tolist())

    def pictures(self, pixels_UCHW: Tensor) -> list[Image.Image]:
        """Normalised pixels as pictures."""
        return pictures_of(self._image, pixels_UCHW)

    def save(self, folder: str | Path) -> Path:
        """Write a bundle; an older bundle at that place is replaced at once and whole.

        Raises:
            BundleError: the folder holds something else.
        """
        sampling = self.sampling.model_dump_json(indent=2) + "\n"
        directions = f"{' and '.join(self.manifest.signature.inputs)}: {', '.join(self.network.config.directions)}"
        card = figures_card(
            self.manifest,
            f"Writes between {directions}.",
            'Use it with `dougong generate FOLDER --text "..." --out x.png` or `--image x.png`.',
        )
        return save_bundle(folder, self.manifest, self.preparation, self.network, card, {SAMPLING: sampling})

    def _written(self, direction: Direction, cells: Sequence[Any], sampling: SamplingConfig | None, seed: int) -> Any:
        found: list[Any] = []
        for start in range(0, len(cells), AT_ONCE):
            name, part = self.network.given[direction], list(cells[start : start + AT_ONCE])
            batch = batch_of_cells(self.preparation, name, part, start, self._device)
            found += self.write(batch, direction, sampling=sampling, seed=derive_seed(seed, "inputs", start))
        return found


def load_generator(folder: str | Path) -> Generator:
    """A writer from its bundle, or from the folder of its run; sums are checked first, and nothing is unpickled.

    Raises:
        BundleError: it is not a whole, unaltered bundle of a writer.
    """
    folder = bundle_in(Path(folder))

    def build(settings: Mapping[str, Any], signature: Signature) -> Writer:
        if settings.get("align") and "learn_temperature" not in settings:
            # Written when a writer's temperature was not learnt: it holds none.
            settings = {**settings, "learn_temperature": False}
        return parse(WriterConfig, settings, where="the bundle's model").build(signature)

    refusal = "holds a model that decides, not one that writes. Ask it with: dougong predict."
    manifest, preparation, network = load_of_kind(folder, KIND, build, (SAMPLING,), refusal=refusal)
    return Generator(network, preparation, manifest, load_settings(folder, SAMPLING, SamplingsConfig))


def batch_of_cells(preparation: Preparation, name: str, cells: list[Any], start: int, device: torch.device) -> Batch:
    """Records that have one modality alone; `start` is the number of the first.

    Raises:
        DataError: a cell is empty or cannot be read.
    """
    modality = preparation.modalities[name]
    missing = [place for place, cell in enumerate(cells) if modality.key((cell,)) is None]
    if missing:
        raise DataError(f"input {start + missing[0]} is empty: there is nothing to write about.")
    columns = {column: [None] * len(cells) for column in preparation.columns}
    rows = np.arange(start, start + len(cells))
    collator = Collator(preparation, Path("."), seed=0)
    arrays = collator(Request(rows, {**columns, modality.columns[0]: cells}, (0, 0)))
    if arrays.bad:
        raise DataError(f"input {arrays.bad[0].row} {arrays.bad[0].reason}.")
    return to_tensors(arrays, device)


def pictures_of(image: ImageModality, pixels_UCHW: Tensor) -> list[Image.Image]:
    """Normalised pixels as pictures."""
    scale, mean = (np.array(figures, np.float32)[:, None, None] for figures in (image.config.scale, image.config.mean))
    shown_UCHW = (pixels_UCHW.float().cpu().numpy() * scale + mean).clip(0, 1) * 255
    return [Image.fromarray(each) for each in shown_UCHW.round().astype(np.uint8).transpose(0, 2, 3, 1)]


def picture_bytes(picture: Picture) -> bytes:
    """A picture as a table would hold it.

    Raises:
        DataError: the file cannot be read.
    """
    if isinstance(picture, Image.Image):
        content = io.BytesIO()
        picture.save(content, format="PNG")
        return content.getvalue()
    if isinstance(picture, bytes):
        return picture
    try:
        return Path(picture).read_bytes()
    except OSError as error:
        raise DataError(f"{picture} cannot be read ({error.strerror}). Name a picture's file.") from None


def figures_card(manifest: Manifest, what: str, use: str) -> str:
    """What the model is, and its measured figures, for people."""
    lines = [
        f"# {manifest.name}",
        "",
        what,
        "",
        use,
        "",
        "## Measured",
        "",
    ]
    lines += [
        f"- {condition}: " + ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        for condition, metrics in manifest.metrics.items()
    ] or ["Nothing was measured."]
    lines += ["", "## Where it comes from", ""]
    lines += [
        f"- {key}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}"
        for key, value in manifest.provenance.items()
    ]
    return "\n".join(lines) + "\n"
