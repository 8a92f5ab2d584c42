"""Makes pictures of one shape and a sentence that names a colour: is it true? Neither alone says. Synthetic.

Here        prepare_xor.
Elsewhere   measuring fusion on it (benchmarks/xor.py); appearing whole or not at all (staging.py).
Promise     the answer is the exclusive or of what is shown and what is said, in every table all four pairs are equally
            frequent, so that neither alone tells it better than chance, and the same seed gives the same bytes;
            tests/data/sources/test_xor.py holds it to that.
"""

import io
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dougong.core.errors import DataError
from dougong.core.seeds import derive_seed
from dougong.data.sources.staging import MEDIA, is_prepared, staged_folder

NAME: Final = "xor"
SIDE: Final = 16
"""Height and width of a picture in pixels."""

SIZES: Final[dict[str, int]] = {"train": 2000, "validation": 400, "test": 400}
COLOURS: Final = {"red": (220, 50, 50), "blue": (50, 50, 220)}
SENTENCES: Final = ("it is {}", "this is {}", "the shape is {}", "here is a {} shape", "somebody drew it in {}")
SCHEMA: Final = pa.schema(
    [pa.field("image", MEDIA), pa.field("sentence", pa.string()), pa.field("answer", pa.string())]
)


def prepare_xor(folder: Path, *, seed: int = 0, sizes: dict[str, int] = SIZES) -> Path:
    """Write `train.parquet`, `validation.parquet`, `test.parquet` and `source.json` into `folder`, and return it.

    Columns: image (PNG of 16 x 16), sentence, answer (true or false). `sizes` is records by table, each a multiple of
    4. A folder prepared before with the same settings is returned as it is.

    Raises:
        DataError: a size is no multiple of 4.
    """
    for side, size in sizes.items():
        if size < 4 or size % 4:
            raise DataError(
                f"{size} {side} records cannot share out the 4 pairs of picture and word. Use a multiple of 4."
            )
    settings = {"seed": seed, "sizes": sizes}
    if is_prepared(folder, name=NAME, settings=settings):
        return folder
    source = {
        "name": NAME,
        "about": "Synthetic: pictures of a red or a blue shape, and a sentence that says which it is; is it true?",
        "licences": {"all": "ours"},
        "splits": {side: {"rows": size} for side, size in sizes.items()},
        "settings": settings,
    }
    with staged_folder(folder, source) as building:
        for side, size in sizes.items():
            _write_table(building / f"{side}.parquet", size, np.random.default_rng(derive_seed(seed, NAME, side)))
    return folder


def _write_table(path: Path, size: int, random: np.random.Generator) -> None:
    # Whatever else varies is drawn with no regard to the pair.
    pairs = random.permutation(np.arange(size) % 4)
    shown, said = pairs // 2, pairs % 2
    names = list(COLOURS)
    table = pa.table(
        {
            "image": [{"bytes": _picture(names[colour], random), "path": None} for colour in shown],
            "sentence": [SENTENCES[random.integers(len(SENTENCES))].format(names[word]) for word in said],
            "answer": ["false" if differ else "true" for differ in shown ^ said],
        },
        schema=SCHEMA,
    )
    pq.write_table(table, path, row_group_size=500, compression="zstd")


def _picture(colour: str, random: np.random.Generator) -> bytes:
    """A circle or a square of this colour somewhere on a grey ground, with noise."""
    reach = random.uniform(3.5, 5.5)
    away_2HW = np.abs(np.mgrid[:SIDE, :SIDE] - random.uniform(reach, SIDE - 1 - reach, (2, 1, 1)))
    distance_HW = np.hypot(*away_2HW) if random.random() < 0.5 else away_2HW.max(axis=0)
    ground_C = np.full(3, random.uniform(0, 120))
    colour_C = np.array(COLOURS[colour]) + random.uniform(-30, 30, 3)
    pixels_HWC = np.where(distance_HW[..., None] < reach, colour_C, ground_C) + random.normal(0, 8, (SIDE, SIDE, 3))
    content = io.BytesIO()
    Image.fromarray(pixels_HWC.round().clip(0, 255).astype(np.uint8)).save(content, "PNG")
    return content.getvalue()
