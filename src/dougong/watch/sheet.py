"""The worst media of a table as one page.

Here        `write_sheet`: by modality and figure of quality, the records that stand at its worse end.
Elsewhere   which those are (data/worst.py); how the page looks (watch/sheet.html).
Promise     the page refers to nothing outside itself and runs no script; what comes from data is shown as text, never
            read as markup; a medium is shown as a model would get it, so that what resizing did is seen too.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import soundfile
from PIL import Image

from dougong.core.errors import ConfigError
from dougong.core.files import write_atomic
from dougong.data.batch import Array
from dougong.data.check import TableReport
from dougong.data.modality.array import SignalModality, VolumeModality
from dougong.data.modality.audio import KEPT_SCALE, AudioModality
from dougong.data.modality.image import ImageModality
from dougong.data.modality.medium import BadValue, Modality
from dougong.data.preparation import Preparation
from dougong.data.table import Table
from dougong.watch.pages import page_template

SHOWN: Final = 6
"""Media of each figure."""

LONGEST: Final = 240
"""Characters of a text."""

POINTS: Final = 160
"""Of a curve, from left to right."""


class SheetPart(NamedTuple):
    """One table that was read."""

    name: str
    table: Table
    report: TableReport


def check_sheet(path: Path) -> None:
    """Refuse what could not be written after all the reading.

    Raises:
        ConfigError: the path is of no page, or its folder is none.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--pictures {path} ends in {path.suffix!r}, and the sheet is a page. Use a name in .html.")
    if path.is_dir() or (path.parent.exists() and not path.parent.is_dir()):
        raise ConfigError(f"--pictures {path} is no place for a file. Name a file in a folder.")


def write_sheet(path: Path, name: str, parts: Sequence[SheetPart], preparation: Preparation) -> None:
    """Write the page."""
    page = page_template("sheet.html").render(name=Path(name).name, parts=[_part(part, preparation) for part in parts])
    write_atomic(path, page)


def _part(part: SheetPart, preparation: Preparation) -> dict[str, Any]:
    modalities = []
    for name, figures in part.report.quality.items():
        modality = preparation.modalities[name]
        rows = sorted({row for figure in figures for row, _ in figure.rows[:SHOWN]})
        records = part.table.records(rows, list(modality.columns))
        shown = {row: _shown(modality, record, part.table.folder) for row, record in zip(rows, records, strict=True)}
        modalities.append(
            {
                "name": name,
                "kind": modality.signature().kind,
                "figures": [
                    {
                        "name": figure.name,
                        "side": figure.side,
                        "median": f"{figure.median:.3f}",
                        "worst": f"{figure.worst:.3f}",
                        "media": [{"row": row, "value": f"{value:.3f}", **shown[row]} for row, value in worst],
                    }
                    for figure in figures
                    if (worst := figure.rows[:SHOWN])
                ],
            }
        )
    troubles = [
        {"modality": name, "name": trouble.name, "count": trouble.num_records, "rows": list(trouble.rows)}
        for name, own in part.report.troubles.items()
        for trouble in own
    ]
    return {"name": part.name, "rows": part.report.num_rows, "modalities": modalities, "troubles": troubles}


def _shown(modality: Modality, record: dict[str, Any], folder: Path) -> dict[str, Any]:
    cells = tuple(record[column] for column in modality.columns)
    try:
        medium = modality.decode(cells, folder)
    except BadValue as error:  # it was read before, but a file may have gone since
        return {"text": f"cannot be read any more: {error}"}
    if isinstance(modality, ImageModality):
        return {"picture": _picture(medium), "wide": medium.shape[1], "tall": medium.shape[0]}
    if isinstance(modality, AudioModality):
        return {"curve": _curve(medium), "sound": _sound(medium, modality.config.sample_rate)}
    if isinstance(modality, SignalModality):
        return {"curve": _curve(medium[0])}
    if isinstance(modality, VolumeModality):
        middle_HW = medium[len(medium) // 2]
        low, high = float(middle_HW.min()), float(middle_HW.max())
        return {
            "picture": _picture(((middle_HW - low) / max(high - low, 1e-6) * 255).astype(np.uint8)),
            "wide": middle_HW.shape[1],
            "tall": middle_HW.shape[0],
        }
    if len(cells) == 1 and isinstance(cells[0], str):
        return {"text": cells[0] if len(cells[0]) <= LONGEST else cells[0][: LONGEST - 3] + "..."}
    return {"pairs": [(column, "" if cell is None else str(cell)[:40]) for column, cell in record.items()]}


def _picture(pixels: Array) -> str:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return _inline(content, "image/png")


def _sound(samples: Array, sample_rate: int) -> str:
    content = io.BytesIO()
    loudest = max(float(np.abs(samples.astype(np.float32)).max()) / KEPT_SCALE, 1e-3)
    soundfile.write(content, samples / KEPT_SCALE / loudest * 0.9, sample_rate, format="WAV", subtype="PCM_16")
    return _inline(content, "audio/wav")


def _inline(content: io.BytesIO, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content.getvalue()).decode('ascii')}"


def _curve(samples: Array) -> str:
    """The outline, as points of an SVG polygon in a box of POINTS x 2: there the largest, back the smallest."""
    samples = samples.astype(np.float64)
    bounds = np.linspace(0, len(samples), min(POINTS, len(samples)) + 1).astype(np.int64)
    highest = np.maximum.reduceat(samples, bounds[:-1])
    lowest = np.minimum.reduceat(samples, bounds[:-1])
    most = max(float(np.abs(samples).max()), 1e-9)
    at = (np.arange(len(highest)) + 0.5) * POINTS / len(highest)
    there = [f"{x:.1f},{1 - y / most:.3f}" for x, y in zip(at, highest, strict=True)]
    # A line of its own width, also where largest and smallest are one.
    back = [f"{x:.1f},{1.02 - y / most:.3f}" for x, y in zip(at[::-1], lowest[::-1], strict=True)]
    return " ".join([*there, *back])
