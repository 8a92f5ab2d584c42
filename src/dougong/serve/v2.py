"""Open Inference Protocol v2 over HTTP: tensors in JSON or binary, as Triton's and KServe's clients speak it.

Here        read_request, write_response, metadata, Tensor, Inference; to_columns and from_outcomes, for gRPC too.
Elsewhere   what a value may be (columns.py); routes (app.py); the same over gRPC (grpc_server.py).
Promise     an input tensor of each column that the caller has, one row for each record; an absent modality is an absent
            tensor, and of one record an empty text or file, or NaN. Rows and sizes are checked before anything is made
            of them.

The protocol: https://github.com/kserve/open-inference-protocol, and its extension of binary data for HTTP (Triton's
protocol/extension_binary_data.md).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np

from dougong.core.signature import Signature
from dougong.data.columns import MEDIA
from dougong.serve.backend import Outcome
from dougong.serve.columns import BadRequest, Columns, array_file
from dougong.serve.v1 import load_json

NUMPY: Final = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
MOST_TENSORS: Final = 1024
MOST_NUMBERS: Final = 2**28
MOST_AXES: Final = 8


class Tensor(NamedTuple):
    """A tensor as the protocol has it."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Any
    """A NumPy array of `shape`; for BYTES a flat list of bytes (binary) or of str (JSON)."""


class Inference(NamedTuple):
    """A request."""

    id: str
    records: list[dict[str, Any]]
    outputs: list[tuple[str, bool]] | None
    """Those asked for, by name, and whether as binary; None: all."""

    binary: bool
    """Whether outputs go as binary where they do not say."""

    parameters: Mapping[str, Any]


def read_request(body: bytes, header_bytes: int | None, columns: Columns) -> Inference:
    """A request's body; `header_bytes` is what Inference-Header-Content-Length said.

    Raises:
        BadRequest: it is none, or its tensors are not this model's columns.
    """
    if header_bytes is not None and not 0 < header_bytes <= len(body):
        raise BadRequest("Inference-Header-Content-Length is not within the body", 400)
    document = load_json(body if header_bytes is None else body[:header_bytes])
    if not isinstance(document, dict):
        raise BadRequest("an inference request is an object", 400)
    rest = memoryview(b"" if header_bytes is None else body)[header_bytes or 0 :]
    given = document.get("inputs")
    if not isinstance(given, list) or len(given) > MOST_TENSORS:
        raise BadRequest("give 'inputs': a list of tensors", 400)
    tensors = []
    for one in given:
        tensor, rest = _read_tensor(one, rest)
        tensors.append(tensor)
    if len(rest):
        raise BadRequest(f"{len(rest)} bytes after the last binary tensor", 400)
    parameters = document.get("parameters", {})
    if not isinstance(parameters, dict):
        raise BadRequest("'parameters' is no object", 400)
    asked = document.get("id", "")
    binary = parameters.get("binary_data_output") is True
    return Inference(
        asked if isinstance(asked, str) else str(asked),
        to_columns(tensors, columns),
        _read_outputs(document.get("outputs"), binary),
        binary,
        parameters,
    )


def _read_outputs(given: Any, binary: bool) -> list[tuple[str, bool]] | None:
    if not given:
        return None
    if not isinstance(given, list) or not all(
        isinstance(one, dict) and isinstance(one.get("name"), str) for one in given
    ):
        raise BadRequest("'outputs' is no list of objects with names", 400)
    found = []
    for one in given:
        parameters = one.get("parameters", {})
        own = parameters.get("binary_data") if isinstance(parameters, dict) else None
        found.append((one["name"], binary if own is None else own is True))
    return found


def _read_tensor(given: Any, rest: memoryview) -> tuple[Tensor, memoryview]:
    if not isinstance(given, dict) or not isinstance(given.get("name"), str):
        raise BadRequest("an input tensor is an object with a name", 400)
    name, datatype, shape = given["name"], given.get("datatype"), given.get("shape")
    where = f"tensor {name[:40]!r}"
    if not isinstance(datatype, str) or (datatype != "BYTES" and datatype not in NUMPY):
        raise BadRequest(f"{where}: datatype is not one of BYTES, {', '.join(NUMPY)}", 400)
    if not isinstance(shape, list):
        raise BadRequest(f"{where}: shape is no list of sizes with the records first", 400)
    number = checked_number(shape, where)
    parameters = given.get("parameters", {})
    size = parameters.get("binary_data_size") if isinstance(parameters, dict) else None
    if size is not None:
        if type(size) is not int or not 0 <= size <= len(rest):
            raise BadRequest(f"{where}: binary_data_size is not within the body", 400)
        values = from_binary(datatype, rest[:size], number, where)
        return Tensor(name, datatype, tuple(shape), _shaped(values, shape)), rest[size:]
    return Tensor(name, datatype, tuple(shape), _from_json(given.get("data"), datatype, shape, where)), rest


def checked_number(shape: Sequence[Any], where: str) -> int:
    """How many values a tensor of this shape has. Sizes are looked at before they are multiplied: long ones of many
    axes take minutes.

    Raises:
        BadRequest: it is no shape, or of more than anybody sends.
    """
    if not 0 < len(shape) <= MOST_AXES or not all(type(size) is int and size >= 0 for size in shape):
        raise BadRequest(f"{where}: shape is no list of 1 to {MOST_AXES} sizes with the records first", 400)
    if max(shape) > MOST_NUMBERS or math.prod(shape) > MOST_NUMBERS:
        raise BadRequest(f"{where}: too many values", 413)
    return math.prod(shape)


def from_binary(datatype: str, content: memoryview | bytes, number: int, where: str) -> Any:
    """The values of a tensor's bytes: flat.

    Raises:
        BadRequest: they are not so many.
    """
    if datatype != "BYTES":
        if len(content) != number * NUMPY[datatype].itemsize:
            raise BadRequest(f"{where}: {len(content)} bytes are not {number} of {datatype}", 400)
        return np.frombuffer(content, NUMPY[datatype])
    found: list[bytes] = []
    at = 0
    while at < len(content):
        if at + 4 > len(content):
            raise BadRequest(f"{where}: cut short", 400)
        (size,) = struct.unpack_from("<I", content, at)
        at += 4
        if at + size > len(content):
            raise BadRequest(f"{where}: cut short", 400)
        found.append(bytes(content[at : at + size]))
        at += size
    if len(found) != number:
        raise BadRequest(f"{where}: {len(found)} values are not {number}", 400)
    return found


def _shaped(values: Any, shape: Sequence[int]) -> Any:
    return values if isinstance(values, list) else values.reshape(shape)


def _from_json(data: Any, datatype: str, shape: Sequence[int], where: str) -> Any:
    if not isinstance(data, list):
        raise BadRequest(f"{where}: has neither 'data' nor a binary_data_size", 400)
    if datatype == "BYTES":
        flat: list[Any] = []
        _flatten(data, flat)
        if len(flat) != math.prod(shape) or not all(isinstance(value, str) for value in flat):
            raise BadRequest(f"{where}: data is not {math.prod(shape)} texts", 400)
        return flat
    try:
        with np.errstate(all="ignore"):
            array = np.asarray(data, dtype=NUMPY[datatype])
        return array.reshape(shape)
    except (ValueError, TypeError, OverflowError):
        raise BadRequest(f"{where}: data is not {math.prod(shape)} numbers of {datatype}", 400) from None


def _flatten(data: list[Any], into: list[Any]) -> None:
    for value in data:
        if isinstance(value, list):
            _flatten(value, into)
        else:
            into.append(value)


def to_columns(tensors: Sequence[Tensor], columns: Columns) -> list[dict[str, Any]]:
    """The records that tensors hold.

    Raises:
        BadRequest: a tensor is no column's, or they do not have one row for each record.
    """
    if not tensors:
        raise BadRequest("no input tensor: nothing says how many records there are", 400)
    numbers = {tensor.shape[0] for tensor in tensors}
    if len(numbers) != 1:
        raise BadRequest("the input tensors differ in their first size, the number of records", 400)
    (number,) = numbers
    if not 0 < number <= columns.limits.records:
        raise BadRequest(f"{number} records: give 1 to {columns.limits.records}", 413 if number else 400)
    if len({tensor.name for tensor in tensors}) != len(tensors):
        raise BadRequest("two input tensors have one name", 400)
    rows: list[dict[str, Any]] = [{} for _ in range(number)]
    for tensor in tensors:
        column = columns.by_name.get(tensor.name)
        if column is None:
            known = ", ".join(columns.by_name)
            raise BadRequest(f"no input is called {tensor.name[:40]!r}; the model reads {known}", 400)
        if isinstance(tensor.values, list):
            if len(tensor.values) != number:
                raise BadRequest(f"tensor {tensor.name!r}: one value for each record, as shape [{number}]", 400)
            for row, value in zip(rows, tensor.values, strict=True):
                row[tensor.name] = _of_bytes(value, column.kind, tensor.name)
        elif column.kind in ("signal", "volume"):
            for row, array in zip(rows, tensor.values, strict=True):
                row[tensor.name] = array_file(array)
        elif tensor.values.size != number or column.kind not in ("number", "category"):
            raise BadRequest(f"tensor {tensor.name!r}: give BYTES of shape [{number}]", 400)
        else:
            for row, value in zip(rows, tensor.values.reshape(-1).tolist(), strict=True):
                row[tensor.name] = None if isinstance(value, float) and math.isnan(value) else value
    return [columns.record(row) for row in rows]


def _of_bytes(value: bytes | str, kind: str, name: str) -> Any:
    if isinstance(value, str) or kind in MEDIA:
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise BadRequest(f"tensor {name!r}: is not UTF-8", 400) from None


def from_outcomes(outcomes: Sequence[Outcome], signature: Signature | None) -> dict[str, Tensor]:
    """All output tensors of answers.

    Raises:
        BadRequest: a record was not answered: the protocol has no way to say so of one alone.
    """
    for place, outcome in enumerate(outcomes):
        if outcome.status != 200:
            reason = json.loads(outcome.body)["error"]
            raise BadRequest(f"record {place}: {reason}" if len(outcomes) > 1 else reason, outcome.status)
    answers = [json.loads(outcome.body) for outcome in outcomes]
    number = len(answers)
    found: dict[str, Tensor] = {}
    task = None if signature is None else signature.target.task
    if task == "regression":
        values = np.array([answer["answer"] for answer in answers], np.float64)
        found["answer"] = Tensor("answer", "FP64", (number,), values)
    else:
        texts = [answer["answer"] for answer in answers]
        flat = [text if isinstance(text, str) else json.dumps(text, ensure_ascii=False) for text in texts]
        found["answer"] = Tensor("answer", "BYTES", (number,), flat)
    if signature is None:
        return found
    if task == "single_label":
        confidence = np.array([answer["confidence"] for answer in answers], np.float32)
        found["confidence"] = Tensor("confidence", "FP32", (number,), confidence)
    for name, keys in (("probabilities", signature.target.labels), ("gate", tuple(signature.inputs))):
        if keys and all(answer.get(name) for answer in answers):
            array = np.array([[answer[name][key] for key in keys] for answer in answers], np.float32)
            found[name] = Tensor(name, "FP32", array.shape, array)
    return found


def write_response(
    inference: Inference, model: str, version: str, outputs: Mapping[str, Tensor]
) -> tuple[bytes, int | None]:
    """Body, and the length of its JSON where binary data follows it.

    Raises:
        BadRequest: an output that was asked for is none of this model's.
    """
    wanted = inference.outputs if inference.outputs is not None else [(name, inference.binary) for name in outputs]
    listed, blobs = [], []
    for name, binary in wanted:
        tensor = outputs.get(name)
        if tensor is None:
            raise BadRequest(f"no output is called {name[:40]!r}; the model gives {', '.join(outputs)}", 400)
        one: dict[str, Any] = {"name": name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if binary:
            blobs.append(to_binary(tensor))
            one["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            one["data"] = tensor.values if isinstance(tensor.values, list) else tensor.values.reshape(-1).tolist()
        listed.append(one)
    document = {"model_name": model, "model_version": version, "id": inference.id, "outputs": listed}
    head = json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")
    return (head + b"".join(blobs), len(head)) if blobs else (head, None)


def to_binary(tensor: Tensor) -> bytes:
    """A tensor's values as the protocol sends them."""
    if tensor.datatype != "BYTES":
        return np.ascontiguousarray(tensor.values, NUMPY[tensor.datatype]).tobytes()
    encoded = [value if isinstance(value, bytes) else value.encode("utf-8", "replace") for value in tensor.values]
    return b"".join(struct.pack("<I", len(value)) + value for value in encoded)


INPUT_TYPES: Final = {"number": "FP64"}


def metadata(name: str, versions: Sequence[str], columns: Columns, signature: Signature | None) -> dict[str, Any]:
    """What the protocol says of a model."""
    inputs = [
        {
            "name": column.name,
            "datatype": INPUT_TYPES.get(column.kind, "BYTES"),
            "shape": [-1],
            "parameters": {"kind": column.kind, "modality": column.modality},
        }
        for column in columns.by_name.values()
    ]
    outputs: list[dict[str, Any]] = [
        {
            "name": "answer",
            "datatype": "FP64" if signature is not None and signature.target.task == "regression" else "BYTES",
            "shape": [-1],
        }
    ]
    if signature is not None:
        target = signature.target
        if target.task == "single_label":
            outputs.append({"name": "confidence", "datatype": "FP32", "shape": [-1]})
        if target.labels:
            shape = [-1, len(target.labels)]
            labels = {"labels": list(target.labels)}
            outputs.append({"name": "probabilities", "datatype": "FP32", "shape": shape, "parameters": labels})
        outputs.append(
            {
                "name": "gate",
                "datatype": "FP32",
                "shape": [-1, len(signature.inputs)],
                "parameters": {"modalities": list(signature.inputs)},
            }
        )
    return {"name": name, "versions": list(versions), "platform": "dougong", "inputs": inputs, "outputs": outputs}
