"""The dashboard and the pages in a real browser, where there is one and playwright to drive it.

Views are compared with pictures of them in tests/watch/screens, a quarter as large, where some are kept. What is drawn
depends on the browser's fonts, so only shapes and colours of some size are compared. DOUGONG_SCREENS=FOLDER keeps this
run's pictures whole, as artifacts; DOUGONG_SCREENS=renew writes those of tests/watch/screens anew, to be looked at
before they are committed.
"""

import io
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dougong.cli.main import main
from dougong.watch.dashboard import build_app

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
driver = pytest.importorskip("playwright.sync_api")

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium here")]

VIEWS = {"diagnosis": "What is wrong", "curves": "Curves", "flow": "Gradient flow", "contribution": "contributes"}


SCREENS = Path(__file__).with_name("screens")
SMALLER = 4
BLOCK = 8
"""Pixels of a smaller picture whose mean is compared: letters and single figures may differ."""


def compare(name: str, shot: bytes) -> None:
    """A view with its kept picture."""
    asked = os.environ.get("DOUGONG_SCREENS", "")
    now = Image.open(io.BytesIO(shot)).convert("RGB")
    kept = SCREENS / f"{name}.png"
    if asked == "renew":
        SCREENS.mkdir(exist_ok=True)
        now.resize((now.width // SMALLER, now.height // SMALLER), Image.Resampling.BOX).save(kept, optimize=True)
    elif asked:
        Path(asked).mkdir(parents=True, exist_ok=True)
        now.save(Path(asked) / f"{name}.png")
    if not kept.is_file():
        pytest.skip(f"no picture of {name} is kept: DOUGONG_SCREENS=renew makes them, to be looked at and committed")
    before = Image.open(kept).convert("RGB")
    assert now.width // SMALLER == before.width
    assert abs(now.height - before.height * SMALLER) < 0.15 * now.height
    height = min(now.height // SMALLER, before.height) // BLOCK * BLOCK
    far = np.abs(blocks(now, height) - blocks(before, height)).max(axis=2)
    assert float((far > 48).mean()) < 0.06, f"{name} does not look like {kept}"


def blocks(picture: Image.Image, height: int) -> Any:
    """Mean colours, (rows, columns, 3), of the topmost pixels."""
    width = picture.width if picture.width < 390 else picture.width // SMALLER
    ratio = width / picture.width
    small = picture.resize((width, round(picture.height * ratio)), Image.Resampling.BOX).crop((0, 0, width, height))
    few = small.resize((width // BLOCK, height // BLOCK), Image.Resampling.BOX)
    return np.asarray(few, dtype=np.float64)


def test_a_view_that_lacks_a_part_is_not_like_its_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SCREENS", tmp_path)

    def shot(*, panel: bool) -> bytes:
        page = Image.new("RGB", (1280, 800), "white")
        page.paste("black", (40, 40, 1200, 60))
        if panel:
            page.paste((40, 90, 200), (40, 100, 700, 500))
        written = io.BytesIO()
        page.save(written, "png")
        return written.getvalue()

    monkeypatch.setenv("DOUGONG_SCREENS", "renew")
    compare("view", shot(panel=True))
    monkeypatch.delenv("DOUGONG_SCREENS")
    compare("view", shot(panel=True))
    with pytest.raises(AssertionError, match="does not look like"):
        compare("view", shot(panel=False))


@pytest.fixture(scope="module")
def address(colour_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("runs")
    for name in ("colours", "again"):
        shutil.copytree(colour_run, root / name)
    server = uvicorn.Server(uvicorn.Config(build_app(root), port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    for _ in range(200):
        if server.started:
            break
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with driver.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """A page that must ask nobody else, and whose script must not fail."""
    opened = browser.new_page(viewport={"width": 1280, "height": 900})
    asked: list[str] = []
    wrong: list[str] = []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    yield opened
    assert [url for url in asked if not url.startswith((address, "data:", "file:"))] == []
    assert [text for text in wrong if "favicon" not in text and "404" not in text] == []
    opened.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("part", list(VIEWS))
def test_every_view_is_reached_by_a_link_and_fits(page: Any, address: str, part: str, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(f"{address}/#run=colours&part={part}&with=colours|again")
    page.wait_for_selector("#compare-chart polyline >> nth=1", state="attached")

    assert VIEWS[part] in page.inner_text(f"#{part} h2")
    assert page.inner_text("#count") == "2 runs"
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    compare(f"{part}-{width}", page.screenshot(full_page=True))


def test_keys_choose_runs_and_parts_and_the_theme(page: Any, address: str) -> None:
    page.goto(f"{address}/#run=again")
    page.wait_for_selector("#view section")
    page.keyboard.press("j")
    page.wait_for_function("location.hash.includes('run=colours')")
    page.keyboard.press("x")
    assert page.is_checked("input[aria-label='compare colours']")
    page.keyboard.press("3")
    page.wait_for_function("document.activeElement.id === 'flow'")
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.keyboard.press("t")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.keyboard.press("5")
    page.frame_locator("#records-frame iframe").locator("h1").wait_for()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_serious_barrier_is_found_by_axe(
    browser: Any, address: str, colour_run: Path, colour_table: Path, tmp_path: Path, scheme: str
) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    inside, summary = tmp_path / "inside.html", tmp_path / "summary.html"
    data = ["--data", str(colour_table), "--record", "3"]
    assert main(["watch", str(colour_run), *data, "--out", str(inside)]) == 0
    assert main(["watch", str(colour_run), "--out", str(summary)]) == 0
    context = browser.new_context(color_scheme=scheme, bypass_csp=True)
    opened = context.new_page()
    for where in (f"{address}/#run=colours", inside.as_uri(), summary.as_uri()):
        opened.goto(where)
        opened.wait_for_selector("h2")
        found = axe.run(opened).response["violations"]
        serious = [
            (each["id"], each["nodes"][0]["html"][:120]) for each in found if each["impact"] in ("serious", "critical")
        ]
        assert serious == [], where
    context.close()


def test_pages_that_are_written_fit_a_phone(page: Any, colour_run: Path, colour_table: Path, tmp_path: Path) -> None:
    inside = tmp_path / "inside.html"
    data = ["--data", str(colour_table), "--record", "3", "--record", "4"]
    assert main(["watch", str(colour_run), *data, "--out", str(inside)]) == 0
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        page.goto(inside.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.locator("article").count() == 2
        assert re.search(r"Record 3: \w+", page.inner_text("article >> nth=0"))
