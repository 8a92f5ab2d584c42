"""Holds data/modality/image.py to its promise: sizes are checked before decoding, and a cut picture is refused."""

import io
import time
import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from data_builders import HERE, claiming_picture, picture, png_chunk
from PIL import Image

from dougong.data.modality.image import ImageAugment, ImageConfig, ImageModality
from dougong.data.modality.medium import BadValue


def modality(**settings: Any) -> ImageModality:
    return ImageModality(ImageConfig(**{"column": "image", "height": 16, "width": 16, **settings}))


def decoded(content: bytes, **settings: Any) -> npt.NDArray[Any]:
    return modality(**settings).decode((content,), HERE)


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **options)
    return content.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_picture_is_refused(form: str, share: float) -> None:
    content = picture(40, 40, form=form)
    assert decoded(content, height=40, width=40).shape == (40, 40, 3)
    with pytest.raises(BadValue, match="is a broken or truncated picture"):
        decoded(content[: int(share * len(content))])


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_truncated_progressive_jpeg_is_refused(share: float) -> None:
    content = picture(200, 200, form="JPEG", progressive=True)
    with pytest.raises(BadValue, match="is a broken or truncated picture"):
        decoded(content[: int(share * len(content))])


@pytest.mark.parametrize("content", [b"hello, I am no picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\0" * 100])
def test_bytes_that_are_no_picture_are_refused(content: bytes) -> None:
    with pytest.raises(BadValue, match=r"is not a picture|is a broken or truncated picture"):
        decoded(content)


@pytest.mark.parametrize(
    ("side", "reason"),
    [
        (8000, r"claims 8000 x 8000 pixels, over the limit of 50,000,000 \(a decompression bomb, or raise"),
        (10_000, r"claims 10000 x 10000 pixels, over the limit of 50,000,000"),
        (60_000, r"claims far more pixels than any camera takes \(a decompression bomb\)"),
    ],
)
def test_a_decompression_bomb_is_refused_before_it_is_decoded(side: int, reason: str) -> None:
    bomb = claiming_picture(side, side)
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(BadValue, match=reason):
        decoded(bomb)
    seconds, (_, peak_bytes) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(bomb) < 200
    assert seconds < 1
    assert peak_bytes < 2**20


def test_a_bomb_never_reaches_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    # tracemalloc does not see what Pillow's C side holds.
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(BadValue, match="decompression bomb"):
        decoded(claiming_picture(8000, 8000))


def test_the_limit_of_pixels_is_a_setting() -> None:
    with pytest.raises(BadValue, match=r"claims 16 x 16 pixels, over the limit of 255 "):
        decoded(picture(), largest_pixels=255)
    assert decoded(picture(), largest_pixels=256).shape == (16, 16, 3)


def test_a_format_that_starts_other_programs_is_no_picture() -> None:
    with pytest.raises(BadValue, match="is not a picture"):
        decoded(saved(Image.new("RGB", (8, 8)), "EPS"))


@pytest.mark.parametrize("note", [b"x", b"garbage!!", b"II*\0\xff\xff\xff\xff"])
def test_a_broken_note_beside_good_pixels_costs_nothing(note: bytes) -> None:
    good = picture()
    start = good.index(b"IDAT") - 4
    noted = good[:start] + png_chunk(b"eXIf", note) + good[start:]
    np.testing.assert_array_equal(decoded(noted), decoded(good))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright_as_its_note_asks(orientation: int) -> None:
    upright = Image.open(io.BytesIO(picture(16, 16)))
    as_stored = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: np.rot90(p, 1),
        7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
        8: lambda p: np.rot90(p, -1),
    }[orientation](np.asarray(upright))
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decoded(saved(Image.fromarray(as_stored), exif=exif)), np.asarray(upright))


def test_sixteen_bits_a_pixel_keep_their_shades() -> None:
    shades = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    np.testing.assert_array_equal(decoded(saved(Image.fromarray(shades)))[:, :, 0], shades // 256)


def test_pixels_of_floating_point_are_refused() -> None:
    with pytest.raises(BadValue, match="has pixels of floating point"):
        decoded(saved(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"))


def test_what_shines_through_is_white() -> None:
    assert (decoded(saved(Image.new("RGBA", (16, 16), (255, 0, 0, 0)))) == 255).all()
    assert (decoded(saved(Image.new("RGBA", (16, 16), (255, 0, 0, 255)))) == [255, 0, 0]).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK"])
def test_every_kind_of_pixels_becomes_rgb(mode: str) -> None:
    form = "JPEG" if mode == "CMYK" else "PNG"
    assert (decoded(saved(Image.new("RGB", (50, 30), "white").convert(mode), form)) == 255).all()


def test_pixels_leave_with_the_learnt_mean_and_scale() -> None:
    settings = {"mean": (0.5, 0.25, 0.0), "scale": (0.5, 0.25, 1.0)}
    medium = decoded(saved(Image.new("RGB", (50, 50), "white")), **settings)
    stacked = modality(**settings).stack([medium, medium], None)
    assert stacked["pixels_UCHW"].dtype == np.float32
    want_C = np.array([1.0, 3.0, 1.0], np.float32)
    np.testing.assert_allclose(
        stacked["pixels_UCHW"], np.broadcast_to(want_C[:, None, None], (2, 3, 16, 16)), rtol=1e-6
    )


def test_no_media_make_an_empty_batch_of_the_right_shape() -> None:
    assert modality().stack([], np.random.default_rng(0))["pixels_UCHW"].shape == (0, 3, 16, 16)


def test_augmenting_mirrors_some_and_leaves_the_kept_medium_alone() -> None:
    flipping = modality(augment=ImageAugment(flip=True))
    kept = flipping.decode((picture(),), HERE)
    before = kept.copy()
    plain = flipping.stack([kept], None)["pixels_UCHW"][0]
    altered = flipping.stack([kept] * 20, np.random.default_rng(0))["pixels_UCHW"]
    mirrored = [np.array_equal(one, plain[:, :, ::-1]) for one in altered]
    assert all(same or np.array_equal(one, plain) for same, one in zip(mirrored, altered, strict=True))
    assert 0 < sum(mirrored) < 20
    np.testing.assert_array_equal(kept, before)


def test_a_shift_moves_by_no_more_than_asked() -> None:
    far = 2
    dot = Image.new("L", (16, 16))
    dot.putpixel((8, 8), 255)
    shifting = modality(augment=ImageAugment(shift_pixels=far), mean=(0, 0, 0), scale=(1, 1, 1))
    medium = shifting.decode((saved(dot),), HERE)
    altered = shifting.stack([medium] * 50, np.random.default_rng(0))["pixels_UCHW"][:, 0]
    moved = np.argwhere(altered == 1)[:, 1:] - 8
    assert len(moved) == 50
    assert np.abs(moved).max() == far
    assert len(np.unique(moved, axis=0)) > 10
