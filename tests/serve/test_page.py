"""The page in a real browser: skipped where playwright or Chromium is not installed."""

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import Slow, serving

from dougong.serve.backend import Outcome
from dougong.serve.models import Wanted
from dougong.serve.workers import ThreadWorkers

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Seeing(Slow):
    """Says what it got, and where it looked."""

    def explain(self, record: Mapping[str, Any]) -> Outcome:
        photo, clip = record.get("photo"), record.get("clip")
        size = Image.open(io.BytesIO(photo["bytes"])).size if photo else None
        heard = len(clip["bytes"]) if clip else 0
        answer = {
            "answer": f"{size} {heard > 5000} {record.get('remark')}",
            "confidence": 0.9,
            "probabilities": {"red": 0.9, "blue": 0.1},
            "gate": {"photo": 0.7, "remark": 0.3},
            "attention": {
                "photo": {"weights": [0.1, 0.2, 0.3, 0.4], "grid": [2, 2]},
                "remark": {"weights": [0.5, 0.5], "tokens": ["is", "red"]},
            },
        }
        return Outcome(200, json.dumps(answer).encode())


@pytest.mark.slow
def test_a_person_drops_a_picture_records_a_sound_types_and_sees(hollow_bundle: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    content = io.BytesIO()
    Image.new("RGB", (24, 20), (200, 30, 30)).save(content, format="PNG")
    asked: list[str] = []
    wanted = [Wanted("colours", "1", hollow_bundle)]
    flags = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--no-sandbox"]
    with (
        serving(wanted, workers=lambda _: ThreadWorkers(Seeing), batching={"slo_seconds": 1.0}) as server,
        playwright.sync_playwright() as driver,
    ):
        if CHROMIUM is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip("no Chromium is installed")
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        mistakes: list[str] = []
        page.on("pageerror", lambda error: mistakes.append(str(error)))
        page.goto(server.url)
        page.wait_for_selector("#c-photo-drop")

        numbers = list(content.getvalue())
        drop = page.evaluate_handle(
            """numbers => { const held = new DataTransfer();
               held.items.add(new File([new Uint8Array(numbers)], "a.png", { type: "image/png" })); return held; }""",
            numbers,
        )
        page.dispatch_event("#c-photo-drop", "drop", {"dataTransfer": drop})
        page.click("#c-clip-record")
        page.wait_for_timeout(600)
        page.click("#c-clip-record")
        page.wait_for_selector("#c-clip-drop audio")
        page.fill("#c-remark", "is it red?")
        page.click("#ask")
        page.wait_for_selector("#heat")

        assert page.inner_text("#answer") == "(24, 20) True is it red? (90.0 %)"
        assert "How much each modality counted" in page.inner_text("#more")
        drawn = page.evaluate("document.getElementById('heat').getContext('2d').getImageData(300, 300, 1, 1).data[0]")
        assert drawn > 150
        page.set_input_files("#c-photo", {"name": "b.png", "mimeType": "image/png", "buffer": b"none"})
        browser.close()

    assert mistakes == []
    assert all(url.startswith((server.url, "blob:")) for url in asked)
