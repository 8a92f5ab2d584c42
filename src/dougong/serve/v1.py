"""The plain protocol: a record in JSON or as a form of files, its answer in JSON.

Here        read_json, read_form, answers_json.
Elsewhere   what a value may be (columns.py); routes (app.py); Open Inference Protocol (v2.py).
Promise     a body that is no request is refused with a line that says where; reading takes memory in proportion to the
            body, whatever it claims.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import Any, Final

from dougong.serve.backend import Outcome
from dougong.serve.columns import BadRequest, Columns

MOST_PARTS: Final = 256
DEEPEST: Final = 64


class Asked:
    """What a request asks."""

    __slots__ = ("many", "records")

    def __init__(self, records: list[dict[str, Any]], *, many: bool) -> None:
        self.records = records
        self.many = many
        """Whether a list was asked for, and is to be answered."""


def load_json(body: bytes) -> Any:
    """JSON of a caller.

    Raises:
        BadRequest: it is none.
    """
    try:
        return json.loads(body)
    except RecursionError:
        raise BadRequest("the JSON is nested too deeply", 400) from None
    except ValueError as error:
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise BadRequest(f"the body is not JSON{where}", 400) from None


def read_json(body: bytes, columns: Columns) -> Asked:
    """A record by column, or {"records": [...]}.

    Raises:
        BadRequest: it is neither.
    """
    values = load_json(body)
    if not isinstance(values, dict):
        raise BadRequest('give an object: a value by column, or {"records": [...]}')
    if "records" in values and "records" not in columns.by_name:
        many = values["records"]
        if set(values) != {"records"} or not isinstance(many, list) or not many:
            raise BadRequest('give either one record\'s columns, or {"records": [...]} with at least one')
        if len(many) > columns.limits.records:
            raise BadRequest(f"over {columns.limits.records} records at once: send them in several requests", 413)
        records = []
        for place, one in enumerate(many):
            if not isinstance(one, dict):
                raise BadRequest(f"record {place} is no object")
            try:
                records.append(columns.record(one))
            except BadRequest as error:
                raise BadRequest(f"record {place}: {error.reason}", error.status) from None
        return Asked(records, many=True)
    return Asked([columns.record(values)], many=False)


def read_form(body: bytes, content_type: str, columns: Columns) -> Asked:
    """One record as multipart/form-data: a part of each column, files as they are.

    Raises:
        BadRequest: it is no form.
    """
    from python_multipart.exceptions import FormParserError
    from python_multipart.multipart import MultipartParser, parse_options_header

    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if not boundary:
        raise BadRequest("the form has no boundary", 400)
    parts = _Parts()
    try:
        parser = MultipartParser(boundary, parts.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError:
        raise BadRequest("the body is no multipart form", 400) from None
    if not parts.ended:
        raise BadRequest("the form is cut short", 400)
    values: dict[str, Any] = {}
    for headers, content in parts.found:
        disposition, about = parse_options_header(headers.get(b"content-disposition", b""))
        name = about.get(b"name", b"").decode("utf-8", "replace")
        if disposition != b"form-data" or not name:
            raise BadRequest("a part of the form has no name", 400)
        if name in values:
            raise BadRequest(f"the form has two parts for one column ({name[:40]!r})", 400)
        column = columns.by_name.get(name)
        is_file = b"filename" in about or (column is not None and column.kind in ("image", "audio"))
        if is_file and column is not None and column.kind not in ("text", "number", "category"):
            values[name] = bytes(content)
        else:
            try:
                values[name] = content.decode("utf-8")
            except UnicodeDecodeError:
                raise BadRequest("a text part of the form is not UTF-8", 400) from None
    return Asked([columns.record(values)], many=False)


class _Parts:
    """Gathers what the parser finds."""

    def __init__(self) -> None:
        self.found: list[tuple[dict[bytes, bytes], bytearray]] = []
        self.ended = False
        self._field = bytearray()
        self._value = bytearray()

    def callbacks(self) -> Any:
        return {
            "on_part_begin": self._begin,
            "on_part_data": self._data,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        if len(self.found) >= MOST_PARTS:
            raise BadRequest(f"the form has over {MOST_PARTS} parts", 413)
        self.found.append(({}, bytearray()))

    def _data(self, data: bytes, start: int, end: int) -> None:
        self.found[-1][1].extend(memoryview(data)[start:end])

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if len(self._field) + len(self._value) > 8192:
            raise BadRequest("a part of the form has too long a header", 400)
        self.found[-1][0][bytes(self._field).lower()] = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def _end(self) -> None:
        self.ended = True


def answers_json(model: str, version: str, asked: Asked, outcomes: Sequence[Outcome]) -> tuple[int, bytes]:
    """Status and body. Answers are passed on as the worker wrote them."""
    head = _head(model, version)
    if not asked.many:
        outcome = outcomes[0]
        if outcome.status != 200:
            return outcome.status, outcome.body
        return 200, head + outcome.body[1:]
    return 200, head + b'"answers":[' + b",".join(outcome.body for outcome in outcomes) + b"]}"


@functools.lru_cache
def _head(model: str, version: str) -> bytes:
    return f'{{"model":{json.dumps(model)},"version":{json.dumps(version)},'.encode()
