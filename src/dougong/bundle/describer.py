"""A trained decoder as its user has it: what a record has, to words about it, from a bundle and back into one.

Here        Describer (caption, write, evaluate, save, export), load_describer; load_writing, of this kind or a
            generator.
Elsewhere   a model that draws too (bundle/generator.py); the bundle's files and sums (core/bundle.py); training
            (recipes/).
Promise     the same bundle, input, settings and seed write the same; what is saved and loaded writes the same; an input
            that cannot be read is refused with its reason, before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import torch
from PIL import Image
from torch import Tensor

from dougong.bundle.generator import (
    AT_ONCE,
    Generator,
    Picture,
    batch_of_cells,
    figures_card,
    load_generator,
    picture_bytes,
    pictures_of,
)
from dougong.bundle.saving import load_of_kind, load_settings, save_bundle
from dougong.core.bundle import Manifest, bundle_in, kind_of
from dougong.core.config import parse
from dougong.core.errors import ConfigError
from dougong.core.files import write_atomic
from dougong.core.seeds import derive_seed
from dougong.core.signature import ImageInput, Signature
from dougong.data.collate import View
from dougong.data.corruption import Corruption
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.modality.image import ImageModality
from dougong.data.modality.text import TextModality
from dougong.data.preparation import Preparation
from dougong.data.table import Table, open_table
from dougong.engine.words import WordsJudged, judge_words
from dougong.model.decoder import Decoder, DecoderConfig
from dougong.model.deepseek import write_deepseek
from dougong.model.sampling import SamplingConfig
from dougong.nn.batch import Batch, MediaBatch

KIND: Final = "decoder"
SAMPLING: Final = "sampling.json"
BATCH_SIZE: Final = 64


class Describer:
    """A decoder with the preparation that feeds it."""

    def __init__(
        self, network: Decoder, preparation: Preparation, manifest: Manifest, sampling: SamplingConfig | None = None
    ) -> None:
        self.network = network.eval()
        self.preparation = preparation
        self.manifest = manifest
        self.sampling = sampling or SamplingConfig(temperature=0)
        """What is used where a caller gives no settings."""
        self._device = next(network.parameters()).device
        self._text = cast(TextModality, preparation.modalities[network.writes])
        empty = self._text.tokenizer.encode("").ids
        self._begin, self._end = int(empty[0]), int(empty[-1])

    def __repr__(self) -> str:
        read = ", ".join(self.network.names)
        return f"<dougong.Describer {self.manifest.name!r}: {read or 'nothing'} -> {self.network.writes}>"

    def caption(
        self, pictures: Sequence[Picture], *, sampling: SamplingConfig | None = None, seed: int = 0
    ) -> list[str]:
        """Say what pictures show: files, their bytes, or Pillow's pictures.

        Raises:
            ConfigError: the model does not read one picture.
            DataError: a picture cannot be read.
        """
        inputs = self.preparation.signature().inputs
        shown = [name for name in self.network.names if isinstance(inputs[name], ImageInput)]
        if len(shown) != 1:
            read = ", ".join(self.network.names) or "nothing"
            raise ConfigError(f"the model reads {read}: that is not one picture. Judge it with: dougong evaluate.")
        found: list[str] = []
        for start in range(0, len(pictures), AT_ONCE):
            cells = [picture_bytes(picture) for picture in pictures[start : start + AT_ONCE]]
            batch = batch_of_cells(self.preparation, shown[0], cells, start, self._device)
            found += self.write(batch, sampling=sampling, seed=derive_seed(seed, "inputs", start))
        return found

    def write(self, batch: Batch, *, sampling: SamplingConfig | None = None, seed: int = 0) -> list[str]:
        """A text for each record of a batch that is at hand, from all but its own."""
        return [self.text(ids_N) for ids_N in self.write_ids(batch, sampling=sampling, seed=seed)[:, 1:]]

    def write_ids(self, batch: Batch, *, sampling: SamplingConfig | None = None, seed: int = 0) -> Tensor:
        """The same as token ids (B, N), from the one that begins; what is shorter is filled up with the end's."""
        index_B = torch.zeros(batch.num_records, dtype=torch.int64, device=self._device)
        begin = {
            "ids_UT": torch.tensor([[self._begin]], device=self._device),
            "mask_UT": torch.ones(1, 1, dtype=torch.bool, device=self._device),
        }
        begun = MediaBatch(begin, index_B, torch.ones_like(index_B, dtype=torch.bool))
        ids_BN = self.network.write(
            batch._replace(media={**batch.media, self.network.writes: begun}),
            most=self._text.config.max_tokens - 1,
            end=self._end,
            sampling=sampling or self.sampling,
            generator=torch.Generator(self._device).manual_seed(derive_seed(seed, "words")),
        )
        return torch.cat([torch.full_like(ids_BN[:, :1], self._begin), ids_BN], dim=1)

    @property
    def end(self) -> int:
        """The token id after a text."""
        return self._end

    def text(self, ids_N: Tensor) -> str:
        """Token ids as words."""
        return self._text.tokenizer.decode(ids_N.tolist())

    def pictures(self, name: str, pixels_UCHW: Tensor) -> list[Image.Image]:
        """Normalised pixels of one of the pictures that are read, as pictures."""
        return pictures_of(cast(ImageModality, self.preparation.modalities[name]), pixels_UCHW)

    def evaluate(
        self,
        table: Table | str | Path,
        *,
        keep: Sequence[str] | None = None,
        corruptions: Sequence[Corruption] = (),
        batch_size: int = BATCH_SIZE,
    ) -> WordsJudged:
        """Judge what would be written, given the true words before each, from the modalities `keep` (None: all)."""
        opened = table if isinstance(table, Table) else open_table(table)
        views = () if keep is None else (View(keep=tuple(dict.fromkeys([*keep, self.network.writes]))),)
        config = LoaderConfig(batch_size=batch_size, workers=0)
        loader = Loader(opened, self.preparation, config, views=views, corruptions=corruptions)
        return judge_words(self.network, loader, self.network.writes)

    def save(self, folder: str | Path) -> Path:
        """Write a bundle; an older bundle at that place is replaced at once and whole.

        Raises:
            BundleError: the folder holds something else.
        """
        about = (
            f"Writes {self.network.writes} from {', '.join(self.network.names) or 'nothing else'}.",
            "Use it with `dougong generate FOLDER --image x.png` or `dougong evaluate FOLDER --data TABLE`.",
        )
        sampling = self.sampling.model_dump_json(indent=2) + "\n"
        card = figures_card(self.manifest, *about)
        return save_bundle(folder, self.manifest, self.preparation, self.network, card, {SAMPLING: sampling})

    def export(self, folder: str | Path) -> Path:
        """Write the folder that transformers reads as DeepseekV3ForCausalLM, and the tokenizer beside it.

        Raises:
            ConfigError: the model reads other modalities, for which that format has no names.
        """
        folder = Path(folder)
        write_deepseek(self.network, folder)
        write_atomic(folder / "tokenizer.json", self._text.tokenizer.to_str(pretty=True))
        return folder


def load_writing(folder: str | Path) -> Generator | Describer:
    """A model that writes, of either kind, from its bundle or from the folder of its run.

    Raises:
        BundleError: it is not a whole, unaltered bundle of one.
    """
    found = bundle_in(Path(folder))
    return load_describer(found) if kind_of(found) == KIND else load_generator(found)


def load_describer(folder: str | Path) -> Describer:
    """A decoder from its bundle, or from the folder of its run; sums are checked first, and nothing is unpickled.

    Raises:
        BundleError: it is not a whole, unaltered bundle of a decoder.
    """
    folder = bundle_in(Path(folder))

    def build(settings: Mapping[str, Any], signature: Signature) -> Decoder:
        return parse(DecoderConfig, settings, where="the bundle's model").build(signature)

    refusal = "holds no decoder. Ask it with: dougong predict, or dougong generate."
    manifest, preparation, network = load_of_kind(folder, KIND, build, (SAMPLING,), refusal=refusal)
    return Describer(network, preparation, manifest, load_settings(folder, SAMPLING, SamplingConfig))
