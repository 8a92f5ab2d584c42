"""What each column of a table means.

Here        Role, infer_roles, infer_role, and the words it explains its choice with; `names_target`.
Elsewhere   reading tables (data/table.py); settings of each modality, learnt from the values (data/preparation.py).
Promise     every column gets a role and a reason that can be printed; a role that the user names always wins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Final, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa

from dougong.core.errors import ConfigError, DataError
from dougong.data.table import MEDIA_ENDINGS, Table, cells_of

Role = Literal["text", "image", "audio", "signal", "volume", "number", "category", "target", "ignore"]
ROLES: Final = get_args(Role)
MEDIA: Final[tuple[Role, ...]] = ("image", "audio", "signal", "volume")
"""Roles of columns of files, or of what stands in files elsewhere."""

LOOKED_AT: Final = 1000
TARGET_NAMES: Final = ("target", "label", "answer", "class", "y")
FEW_CATEGORIES: Final = 50


class ColumnRole(NamedTuple):
    """What a column is for, and why it is thought so."""

    role: Role
    reason: str


def infer_roles(
    table: Table, *, target: str | None, named: Mapping[str, str], decides: bool = True
) -> dict[str, ColumnRole]:
    """A role for each column. `named` gives roles by column name, `target` the column to predict.

    Where nothing is decided, a target is a column that is named so and read by nobody; there need not be one.

    Raises:
        ConfigError: a named column or role does not exist.
        DataError: no column can be the target, or nothing is left to predict from.
    """
    names = table.schema.names
    for column, role in named.items():
        if column not in names:
            raise ConfigError(f"column {column!r} is not in {table.path.name}. It has {', '.join(names)}.")
        if role not in ROLES:
            raise ConfigError(f"column {column!r}: {role!r} is not a role. Use one of {', '.join(ROLES)}.")
        if column == target and role != "target":
            raise ConfigError(f"column {column!r} is named as target and as {role}: it can be one of them.")
    target = _find_target(names, target, named, table, decides=decides)
    sample = table.head(LOOKED_AT)
    roles: dict[str, ColumnRole] = {}
    for name in names:
        if name == target:
            roles[name] = ColumnRole("target", "named so" if named.get(name) != "target" else "named in the recipe")
        elif name in named:
            roles[name] = ColumnRole(named[name], "named in the recipe")  # type: ignore[arg-type]
        else:
            roles[name] = infer_role(sample.column(name), name)
    if all(found.role in ("ignore", "target") for found in roles.values()):
        what = f"nothing to predict {target!r} from: every other column" if decides else "nothing to read: every column"
        raise DataError(
            f"{table.path.name} leaves {what} is ignored. Name a role, for example columns: {{review: text}}."
        )
    return roles


def names_target(table: Table, target: str | None, named: Mapping[str, str]) -> bool:
    """Whether a column to predict is named, or one is called as such columns are."""
    return target is not None or "target" in named.values() or _usual_target(table.schema.names, named) is not None


def _usual_target(names: Sequence[str], named: Mapping[str, str]) -> str | None:
    return next((name for name in names if name.lower() in TARGET_NAMES and name not in named), None)


def _find_target(
    names: list[str], target: str | None, named: Mapping[str, str], table: Table, *, decides: bool
) -> str | None:
    chosen = list(dict.fromkeys([*([target] if target is not None else []), *_named_targets(named)]))
    if len(chosen) > 1:
        raise ConfigError(f"{', '.join(chosen)} are all named as target: a model here has one.")
    if not chosen and not decides:
        return None
    if not chosen:
        usual = _usual_target(names, named)
        chosen = [] if usual is None else [usual]
    if not chosen or chosen[0] not in names:
        given = f"target {chosen[0]!r} is not a column" if chosen else "no column is named as the target"
        raise DataError(f"{given} of {table.path.name}. Name one of {', '.join(names)} as target.")
    return chosen[0]


def _named_targets(named: Mapping[str, str]) -> list[str]:
    return [name for name, role in named.items() if role == "target"]


def infer_role(column: pa.ChunkedArray, name: str) -> ColumnRole:
    """From the type, then from the values."""
    kind = column.type
    values = [value for value in cells_of(column) if value is not None]
    if not values:
        return ColumnRole("ignore", "it is empty")
    if pa.types.is_struct(kind) and {"bytes", "path"} >= {field.name for field in kind}:
        return _infer_media(values)
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return _infer_media([{"bytes": value} for value in values])
    if pa.types.is_boolean(kind):
        return ColumnRole("category", "true or false")
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return _infer_number(values, name, whole=pa.types.is_integer(kind))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        depth = _depth(kind)
        if depth is None:
            return ColumnRole("ignore", f"lists of {kind.value_type} are no modality")
        return ColumnRole("volume", "3 nested lists") if depth == 3 else ColumnRole("signal", "lists of numbers")
    if _is_string(kind) or pa.types.is_dictionary(kind):
        return _infer_string([str(value) for value in values])
    return ColumnRole("ignore", f"{kind} is no modality")


def _infer_media(values: list[dict[str, Any]]) -> ColumnRole:
    heads = [value["bytes"][:16] for value in values if isinstance(value.get("bytes"), bytes)]
    if heads:
        by_content = [kind for kind in ("image", "audio", "array") if any(_looks_like(head, kind) for head in heads)]
        if by_content:
            return _media_role(by_content[0], "by its first bytes")
    by_name = _ending_kind([value["path"] for value in values if isinstance(value.get("path"), str)])
    return _media_role(by_name, "by its file names") if by_name else ColumnRole("ignore", "bytes of no known kind")


def _looks_like(head: bytes, kind: str) -> bool:
    if kind == "image":
        return head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*")) or (
            head.startswith(b"RIFF") and head[8:12] == b"WEBP"
        )
    if kind == "audio":
        return head.startswith((b"fLaC", b"OggS", b"ID3", b"\xff\xfb", b"FORM")) or (
            head.startswith(b"RIFF") and head[8:12] == b"WAVE"
        )
    return head.startswith(b"\x93NUMPY")


def _media_role(kind: str, reason: str) -> ColumnRole:
    # A .npy file's dimensions are seen only when it is read; a signal is the commoner case.
    return ColumnRole("signal" if kind == "array" else kind, reason)  # type: ignore[arg-type]


def _ending_kind(names: list[str]) -> str | None:
    """What most of the names end like, if nearly all of them do."""
    for kind, endings in MEDIA_ENDINGS.items():
        fitting = sum(PurePosixPath(name).suffix.lower() in endings for name in names)
        if names and fitting >= 0.9 * len(names):
            return kind
    return None


def _infer_number(values: list[Any], name: str, *, whole: bool) -> ColumnRole:
    lowered = name.lower()
    if whole and (lowered == "id" or lowered.endswith("_id")):
        return ColumnRole("ignore", "whole numbers named as an id")
    if whole and len(values) >= 50 and len(set(values)) == len(values):
        steps = np.diff(np.array(values[:100], np.float64))
        if (steps == 1).all():
            return ColumnRole("ignore", "it counts the rows")
    return ColumnRole("number", "numbers")


def _infer_string(values: list[str]) -> ColumnRole:
    kind = _ending_kind(values)
    if kind:
        return _media_role(kind, "paths, by their endings")
    distinct = len(set(values))
    words = float(np.mean([len(value.split()) for value in values]))
    if words < 2 and distinct == len(values) and len(values) > FEW_CATEGORIES:
        return ColumnRole("ignore", "one word, different in every row: a name")
    if words < 3 and distinct <= FEW_CATEGORIES and distinct < 0.5 * len(values):
        return ColumnRole("category", f"{distinct} short values that repeat")
    return ColumnRole("text", f"text of {words:.0f} words on average")


def _is_string(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _depth(kind: pa.DataType) -> int | None:
    depth = 0
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    return depth if pa.types.is_integer(kind) or pa.types.is_floating(kind) else None
