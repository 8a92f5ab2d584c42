"""Pictures.

Here        ImageConfig, ImageModality.
Elsewhere   fetching the file (medium.py); making tokens of pixels (model/encoders/image.py).
Promise     a picture is never decoded before its claimed size is found small enough, and a cut one is refused.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from dougong.core.config import Config
from dougong.core.signature import ImageInput
from dougong.data.batch import Array
from dougong.data.damage.damage import Damage
from dougong.data.damage.pictures import PICTURES
from dougong.data.modality.medium import BadValue, Modality, media_bytes, media_key
from dougong.data.quality import IMAGE, Quality, image_quality

FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Of Pillow's many. Some of the others start other programs on what the file says."""

TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation."""


class ImageAugment(Config):
    """Random changes that leave the answer as it is. Off unless a recipe knows that they do."""

    flip: bool = False
    """Mirror left and right, half the time."""

    shift_pixels: int = 0
    """Move by up to so many pixels each way; the border is repeated."""


class ImageConfig(Config):
    """How a picture becomes pixels."""

    kind: Literal["image"] = "image"
    column: str
    height: int = 64
    width: int = 64
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Per channel, of pixels between 0 and 1."""

    scale: tuple[float, float, float] = (0.5, 0.5, 0.5)
    """Divides what is left after the mean."""

    largest_pixels: int = 50_000_000
    """A picture that claims more is refused before decoding."""

    augment: ImageAugment = ImageAugment()


class ImageModality(Modality):
    """Kept decoded as bytes (H, W, 3), handed out as normalised floats (U, 3, H, W)."""

    quality_names = IMAGE

    def __init__(self, config: ImageConfig) -> None:
        self.config = config
        scale = np.array(config.scale, np.float32)
        self._multiply = (1 / 255 / scale)[:, None, None]
        self._subtract = (np.array(config.mean, np.float32) / scale)[:, None, None]

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.config.column,)

    def signature(self) -> ImageInput:
        return ImageInput(height=self.config.height, width=self.config.width)

    def key(self, cells: tuple[Any, ...]) -> Hashable:
        return media_key(cells[0])

    def decode(self, cells: tuple[Any, ...], folder: Path) -> Array:
        picture = open_picture(media_bytes(cells[0], folder), self.config.largest_pixels)
        if picture.size != (self.config.width, self.config.height):
            picture = picture.resize((self.config.width, self.config.height), Image.Resampling.BILINEAR)
        return np.asarray(picture)

    def stack(self, media: Sequence[Array], augment: np.random.Generator | None) -> dict[str, Array]:
        if not media:
            return {"pixels_UCHW": np.zeros((0, 3, self.config.height, self.config.width), np.float32)}
        pixels_UHWC = np.stack(media)
        if augment is not None:
            pixels_UHWC = self._alter(pixels_UHWC, augment)
        pixels_UCHW = np.ascontiguousarray(pixels_UHWC.transpose(0, 3, 1, 2)).astype(np.float32)
        pixels_UCHW *= self._multiply
        pixels_UCHW -= self._subtract
        return {"pixels_UCHW": pixels_UCHW}

    @property
    def damages(self) -> Mapping[str, Damage]:
        return PICTURES

    def quality(self, values: Mapping[str, Array]) -> Quality:
        return image_quality(values["pixels_UCHW"], self.config.mean, self.config.scale)

    def _alter(self, pixels_UHWC: Array, random: np.random.Generator) -> Array:
        if self.config.augment.flip:
            mirrored = random.random(len(pixels_UHWC)) < 0.5
            pixels_UHWC[mirrored] = pixels_UHWC[mirrored, :, ::-1]
        far = self.config.augment.shift_pixels
        if far:
            height, width = pixels_UHWC.shape[1:3]
            wide = np.pad(pixels_UHWC, ((0, 0), (far, far), (far, far), (0, 0)), mode="edge")
            corners = random.integers(0, 2 * far + 1, (len(pixels_UHWC), 2))
            for index, (top, left) in enumerate(corners):
                pixels_UHWC[index] = wide[index, top : top + height, left : left + width]
        return pixels_UHWC


def open_picture(content: bytes, largest_pixels: int) -> Image.Image:
    """An RGB picture, the first frame of a moving one, turned upright as its EXIF note asks.

    Raises:
        BadValue: not a picture, cut short, or larger than allowed.
    """
    try:
        with warnings.catch_warnings():
            # We draw the line of sizes ourselves, and an odd note beside good pixels is no matter.
            warnings.simplefilter("ignore")
            picture: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
            if picture.width * picture.height > largest_pixels:
                raise BadValue(
                    f"claims {picture.width} x {picture.height} pixels, over the limit of {largest_pixels:,} "
                    "(a decompression bomb, or raise largest_pixels)"
                )
            picture.load()
            return _rgb(_upright(picture))
    except BadValue:
        raise
    except Image.DecompressionBombError:
        raise BadValue("claims far more pixels than any camera takes (a decompression bomb)") from None
    except UnidentifiedImageError:
        raise BadValue("is not a picture") from None
    except Exception as error:  # Pillow's decoders raise whatever they meet in a broken file.
        raise BadValue(f"is a broken or truncated picture ({str(error)[:80]})") from None


def _upright(picture: Image.Image) -> Image.Image:
    try:
        orientation = picture.getexif().get(0x0112, 1)
    except Exception:  # a broken note, whatever Pillow makes of it, leaves the pixels as good as they are
        return picture
    turn = TURNS.get(orientation)
    return picture if turn is None else picture.transpose(turn)


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "F":
        raise BadValue("has pixels of floating point, of which none can say what is white. Store it as a volume")
    if picture.mode.startswith("I"):
        # 16 bits a pixel. Pillow's own conversion would make white of all above 255.
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 256).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        ground = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(ground, picture.convert("RGBA"))
    return picture.convert("RGB")
