"""What a run that draws modalities together has found, as one page.

Here        write_retrieval_report: the figures of a run's folder, and queries with what was found, as report.html.
Elsewhere   what the folder holds (recipes/align.py); how the page looks (watch/retrieval.html); the page of a run that
            decides (watch/report.py).
Promise     the page refers to nothing outside itself and runs no script; what comes from data is shown as text, never
            read as markup; pictures come from the run's folder alone.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import jinja2

from dougong.core.config import from_yaml
from dougong.core.errors import RunError
from dougong.core.events import read_events
from dougong.core.files import write_atomic
from dougong.watch.cards import Media
from dougong.watch.pages import page_template

REPORT: Final = "report.html"
RETRIEVALS: Final = "retrievals.json"
MOST_FOUND: Final = 10
"""Shown of each query, best first."""


def write_retrieval_report(run: Path) -> Path:
    """Write `report.html` into the folder of a run, from what lies there.

    Raises:
        RunError: the folder holds no judged run, or a file of it is damaged.
    """
    evaluation, retrievals = _read(run / "evaluation.json"), _read(run / RETRIEVALS)
    settings_file, events_file = run / "run.yaml", run / "events.jsonl"
    yaml = settings_file.read_text(encoding="utf-8") if settings_file.is_file() else ""
    settings = from_yaml(yaml, where=str(settings_file)) if yaml else {}
    events = read_events(events_file) if events_file.is_file() else []
    media = Media(run)
    entries = [
        {
            **entry,
            "query": _shown(entry["query"], media),
            "found": [{**_shown(each, media), "right": bool(each["right"])} for each in entry["found"]],
        }
        for entry in retrievals["entries"]
    ]
    page = _template().render(
        name=settings.get("name") or run.resolve().name,
        about=settings.get("about") or "",
        evaluation=evaluation,
        retrievals=retrievals,
        groups=[(group, list(each)) for group, each in itertools.groupby(entries, key=lambda entry: entry["group"])],
        judged=[event for event in events if event["kind"] == "Evaluated"],
        num_left_out=media.num_left_out,
        yaml=yaml,
    )
    write_atomic(run / REPORT, page.encode("utf-8", "replace"))
    return run / REPORT


def _shown(item: Mapping[str, Any], media: Media) -> dict[str, str]:
    if "file" not in item:
        return {"text": str(item.get("text", ""))}
    return media.take(str(item["file"]), "image")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} is missing or not JSON ({type(error).__name__}). Finish the run with --resume: it writes it anew."
        ) from None


def _template() -> jinja2.Template:
    return page_template("retrieval.html", words=_words)


def _words(name: str) -> str:
    return name.replace("_", " ")
