"""How all pages here are made of their templates.

Here        `page_template`; `check_page`, of a place that a page is to be written to.
Elsewhere   what stands in each page, and the templates beside this file.
Promise     everything is escaped as it is put in, and a name that nobody gave is an error, not a blank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2

from dougong.core.errors import ConfigError
from dougong.watch import charts


@functools.cache
def page_template(name: str, **filters: Callable[..., Any]) -> jinja2.Template:
    """A template by its file's name; it may include others. `key` is a filter of all."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("dougong", "watch"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(key=charts.key, **filters)
    return made.get_template(name)


def check_page(path: Path) -> None:
    """
    Raises:
        ConfigError: it cannot be a page.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"--out {path} ends in {path.suffix!r}, and what is written is a page. Use a name in .html.")
    if path.is_dir() or (path.parent.exists() and not path.parent.is_dir()):
        raise ConfigError(f"--out {path} is no place for a file. Name a file in a folder.")
