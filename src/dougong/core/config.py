"""The base of all settings, and their way to and from YAML.

Here        Config (frozen, keyword-only, unknown keys refused), `parse`, `override`, `to_yaml`, `from_yaml`.
Elsewhere   the settings themselves, each beside the code that obeys it.
Promise     a setting that cannot be obeyed is refused the moment it is made, in one line that names it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from dougong.core.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound="Config")


class Config(BaseModel):
    """A group of settings: frozen, and its attribute docstrings are its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def parse(kind: type[ConfigT], values: Mapping[str, Any], *, where: str) -> ConfigT:
    """Make a config of `kind`, or say in one line which key is wrong and what would work.

    Raises:
        ConfigError: a key is unknown, missing, of another type, or its value is refused.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            message = f"{where} has no setting {key!r}.{_nearest(kind, [str(p) for p in first['loc']])}"
        else:
            reason = first["msg"].removeprefix("Value error, ")
            given = "" if isinstance(first.get("input"), (dict, list)) else f" (given {first.get('input')!r})"
            message = f"{f'{where}: {key}' if key else where}: {reason}{given}"
        raise ConfigError(message) from None


def _nearest(kind: type[BaseModel], path: Sequence[str]) -> str:
    """The settings that stand where the unknown one was looked for, the most alike first."""
    fields = kind.model_fields
    for part in path[:-1]:
        annotation = fields[part].annotation if part in fields else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        inner = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if inner is None:
            return ""
        fields = inner.model_fields
    alike = difflib.get_close_matches(path[-1], fields, n=1)
    return f" Did you mean {alike[0]!r}?" if alike else f" Use one of {', '.join(fields)}."


def override(values: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Lay `a.b=value` settings over nested values; the value is read as YAML.

    Raises:
        ConfigError: a setting has no `=`, or walks into something that has no keys.
    """
    result: dict[str, Any] = _copy(values)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {setting!r} has no 'key=value'. Use for example --set train.steps=200.")
        *path, last = key.split(".")
        inner = result
        for part in path:
            if inner.get(part) is None:
                inner[part] = {}
            inner = inner[part]
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {setting!r}: {part!r} is a value, not a group of settings.")
        try:
            inner[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {setting!r}: {text!r} is not YAML. Quote it, as in key='\"a: b\"'.") from None
    return result


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    return list(value) if isinstance(value, list) else value


def to_yaml(config: Config) -> str:
    """The settings as YAML, in the order in which they are declared, defaults included."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def from_yaml(text: str, *, where: str) -> dict[str, Any]:
    """The nested values of a YAML document.

    Raises:
        ConfigError: it is not YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{where} is not YAML{line}: mend it there, or write it anew with to_yaml.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{where} holds {type(values).__name__}, not settings. Use lines such as 'name: value'.")
    return values
