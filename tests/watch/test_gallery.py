"""The page shows what was written beside the truth, and runs nothing that comes from data."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dougong.core.errors import RunError
from dougong.core.events import Announcer, Evaluated, EventFile, StepDone
from dougong.core.files import write_json
from dougong.watch.gallery import write_gallery

HOSTILE = '<script>alert(1)</script>" onload="x'


def fake_run(folder: Path) -> Path:
    folder.mkdir()
    (folder / "gallery").mkdir()
    Image.new("RGB", (4, 4), "red").save(folder / "gallery" / "0-drawn.png")
    (folder / "run.yaml").write_text(f"name: small\nabout: {HOSTILE!r}\n")
    write_json(
        folder / "evaluation.json",
        {
            "data": {"name": "t", "rows": {"train": 3, "validation": 2, "test": 1}, "notes": [HOSTILE]},
            "directions": {"draw": {"metrics": {"bits": 1.23456}, "num_records": 1}},
        },
    )
    samples = [
        {"row": 0, "caption": HOSTILE, "written": "a red circle", "drawn": "gallery/0-drawn.png"},
        {"row": 1, "picture": "../../etc/passwd"},
    ]
    write_json(folder / "gallery" / "samples.json", samples)
    file = EventFile(folder / "events.jsonl")
    announce = Announcer(file)
    for step in range(1, 6):
        loss = float("nan") if step == 2 else 1 / step
        announce(
            StepDone(
                step=step,
                loss=loss,
                grad_norm=1.0,
                learning_rate=0.1,
                num_records=2,
                epoch=0,
                seconds=0.1,
                wait_seconds=0,
            )
        )
    announce(Evaluated(step=5, split="validation", condition="draw", metrics={"bits": 2.0}, num_records=2, seconds=1))
    file.close()
    return folder


def test_the_page_shows_pictures_captions_and_figures(tmp_path: Path) -> None:
    page = write_gallery(fake_run(tmp_path / "run")).read_text()

    assert "data:image/png;base64," in page
    assert "a red circle" in page
    assert "1.2346" in page
    assert "training loss" in page
    assert "validation: bits" in page


def test_nothing_from_data_is_markup_and_no_file_outside_is_read(tmp_path: Path) -> None:
    page = write_gallery(fake_run(tmp_path / "run")).read_text()

    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "its path leads out of the run" in page
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")


def test_a_folder_without_figures_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing to report"):
        write_gallery(tmp_path)
    write_json(tmp_path / "evaluation.json", {"conditions": {}})
    with pytest.raises(RunError, match="is of no writer"):
        write_gallery(tmp_path)
