"""Open Inference Protocol v2 over gRPC, beside HTTP.

Here        start_grpc; `messages`, the protocol's messages, made when they are first needed.
Elsewhere   what tensors mean (v2.py); models (models.py).
Promise     the same answers, refusals, keys and limits as over HTTP; Triton's and KServe's clients work unchanged.

The messages are described here, field by field, with the numbers of the protocol's own file
(https://github.com/kserve/open-inference-protocol, specification/protocol/open_inference_grpc.proto): generated code
would tie us to one version of protobuf.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from dougong.core.errors import ConfigError, DougongError, RunError
from dougong.serve.app import Request, plain_number
from dougong.serve.columns import BadRequest
from dougong.serve.models import Version
from dougong.serve.openapi import VERSION
from dougong.serve.settings import ServeConfig
from dougong.serve.v2 import (
    MOST_AXES,
    NUMPY,
    Tensor,
    checked_number,
    from_binary,
    from_outcomes,
    metadata,
    to_binary,
    to_columns,
)

if TYPE_CHECKING:
    from dougong.serve.app import App

PACKAGE: Final = "inference"
SERVICE: Final = f"{PACKAGE}.GRPCInferenceService"
CONTENTS: Final = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}

# Message: fields as "name number type", where a type is a scalar's, a message's, or a map's value; + repeats it.
_MESSAGES: Final[Mapping[str, Sequence[str]]] = {
    "ServerLiveRequest": (),
    "ServerLiveResponse": ("live 1 bool",),
    "ServerReadyRequest": (),
    "ServerReadyResponse": ("ready 1 bool",),
    "ModelReadyRequest": ("name 1 string", "version 2 string"),
    "ModelReadyResponse": ("ready 1 bool",),
    "ServerMetadataRequest": (),
    "ServerMetadataResponse": ("name 1 string", "version 2 string", "extensions 3 +string"),
    "ModelMetadataRequest": ("name 1 string", "version 2 string"),
    "TensorMetadata": ("name 1 string", "datatype 2 string", "shape 3 +int64"),
    "ModelMetadataResponse": (
        "name 1 string",
        "versions 2 +string",
        "platform 3 string",
        "inputs 4 +TensorMetadata",
        "outputs 5 +TensorMetadata",
    ),
    "InferParameter": ("bool_param 1 bool", "int64_param 2 int64", "string_param 3 string"),
    "InferTensorContents": (
        "bool_contents 1 +bool",
        "int_contents 2 +int32",
        "int64_contents 3 +int64",
        "uint_contents 4 +uint32",
        "uint64_contents 5 +uint64",
        "fp32_contents 6 +float",
        "fp64_contents 7 +double",
        "bytes_contents 8 +bytes",
    ),
    "InferInputTensor": (
        "name 1 string",
        "datatype 2 string",
        "shape 3 +int64",
        "parameters 4 {InferParameter",
        "contents 5 InferTensorContents",
    ),
    "InferRequestedOutputTensor": ("name 1 string", "parameters 2 {InferParameter"),
    "InferOutputTensor": (
        "name 1 string",
        "datatype 2 string",
        "shape 3 +int64",
        "parameters 4 {InferParameter",
        "contents 5 InferTensorContents",
    ),
    "ModelInferRequest": (
        "model_name 1 string",
        "model_version 2 string",
        "id 3 string",
        "parameters 4 {InferParameter",
        "inputs 5 +InferInputTensor",
        "outputs 6 +InferRequestedOutputTensor",
        "raw_input_contents 7 +bytes",
    ),
    "ModelInferResponse": (
        "model_name 1 string",
        "model_version 2 string",
        "id 3 string",
        "parameters 4 {InferParameter",
        "outputs 5 +InferOutputTensor",
        "raw_output_contents 6 +bytes",
    ),
    "ModelStreamInferResponse": ("error_message 1 string", "infer_response 2 ModelInferResponse"),
    "ModelRepositoryParameter": (
        "bool_param 1 bool",
        "int64_param 2 int64",
        "string_param 3 string",
        "bytes_param 4 bytes",
    ),
    "RepositoryIndexRequest": ("repository_name 1 string", "ready 2 bool"),
    "ModelIndex": ("name 1 string", "version 2 string", "state 3 string", "reason 4 string"),
    "RepositoryIndexResponse": ("models 1 +ModelIndex",),
    "RepositoryModelLoadRequest": (
        "repository_name 1 string",
        "model_name 2 string",
        "parameters 3 {ModelRepositoryParameter",
    ),
    "RepositoryModelLoadResponse": (),
    "RepositoryModelUnloadRequest": (
        "repository_name 1 string",
        "model_name 2 string",
        "parameters 3 {ModelRepositoryParameter",
    ),
    "RepositoryModelUnloadResponse": (),
}
_CHOICES: Final = ("InferParameter", "ModelRepositoryParameter")
"""Messages of which one field is set."""

_METHODS: Final = (
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
)
MOST_AHEAD: Final = 256
"""Requests of one stream that are read before the first of them is answered: the caller waits with the next."""


@functools.cache
def messages() -> Mapping[str, Any]:
    """The protocol's messages by name."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="dougong_open_inference_grpc.proto", package=PACKAGE, syntax="proto3"
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for text in fields:
            label, number, kind = text.split()
            field = message.field.add(name=label, number=int(number))
            field.label = kinds.LABEL_REPEATED if kind[0] in "+{" else kinds.LABEL_OPTIONAL
            plain = kind.lstrip("+{")
            if kind[0] == "{":
                entry = message.nested_type.add(name=f"{label.title().replace('_', '')}Entry")
                entry.options.map_entry = True
                entry.field.add(name="key", number=1, label=kinds.LABEL_OPTIONAL, type=kinds.TYPE_STRING)
                entry.field.add(
                    name="value",
                    number=2,
                    label=kinds.LABEL_OPTIONAL,
                    type=kinds.TYPE_MESSAGE,
                    type_name=f".{PACKAGE}.{plain}",
                )
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".{PACKAGE}.{name}.{entry.name}"
            elif plain in _MESSAGES:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".{PACKAGE}.{plain}"
            else:
                field.type = getattr(kinds, f"TYPE_{plain.upper()}")
            if name in _CHOICES:
                field.oneof_index = 0
        if name in _CHOICES:
            message.oneof_decl.add(name="parameter_choice")
    # A pool of its own: a client in the same process has the same names in the common one.
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in _MESSAGES
    }


async def start_grpc(config: ServeConfig, app: App) -> Any:
    """A server that listens; `port` is its `.port`.

    Raises:
        ConfigError: gRPC is not installed, or the port is taken.
    """
    try:
        import grpc
        from grpc import aio
    except ImportError as error:
        raise ConfigError(f"--grpc-port needs {error.name}. Use: pip install 'dougong[serve]'") from None
    most = config.limits.body_bytes
    server = aio.server(
        options=[("grpc.max_receive_message_length", most), ("grpc.so_reuseport", 0)],
        maximum_concurrent_rpcs=config.batching.max_queue,
    )
    service = _Service(app, grpc)
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            service.handler(name),
            request_deserializer=messages()[f"{name}Request"].FromString,
            response_serializer=messages()[f"{name}Response"].SerializeToString,
        )
        for name in _METHODS
    }
    handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
        service.stream,
        request_deserializer=messages()["ModelInferRequest"].FromString,
        response_serializer=messages()["ModelStreamInferResponse"].SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    address = f"{config.host}:{config.grpc_port}"
    try:
        if config.certificate is not None and config.certificate_key is not None:
            pair = (config.certificate_key.read_bytes(), config.certificate.read_bytes())
            server.port = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
        else:
            server.port = server.add_insecure_port(address)
    except (RuntimeError, OSError):
        raise ConfigError(f"cannot listen on {address} for gRPC. Use another --grpc-port.") from None
    await server.start()
    return server


class _Call:
    """One request, streamed or not."""

    __slots__ = ("about", "context", "status")

    def __init__(self, about: Request, context: Any) -> None:
        self.about = about
        self.context = context
        self.status = 200


class _Service:
    def __init__(self, app: App, grpc: Any) -> None:
        self._app = app
        self._codes = {
            400: grpc.StatusCode.INVALID_ARGUMENT,
            401: grpc.StatusCode.UNAUTHENTICATED,
            403: grpc.StatusCode.PERMISSION_DENIED,
            404: grpc.StatusCode.NOT_FOUND,
            413: grpc.StatusCode.RESOURCE_EXHAUSTED,
            422: grpc.StatusCode.INVALID_ARGUMENT,
            429: grpc.StatusCode.RESOURCE_EXHAUSTED,
            500: grpc.StatusCode.INTERNAL,
            503: grpc.StatusCode.UNAVAILABLE,
            504: grpc.StatusCode.DEADLINE_EXCEEDED,
        }

    def handler(self, name: str) -> Any:
        """One method, with its refusals as statuses."""
        method = getattr(self, name)

        async def handle(request: Any, context: Any) -> Any:
            with self._call(name, context) as call:
                try:
                    if name not in ("ServerLive", "ServerReady"):
                        self._admit(call, admin=name in ("RepositoryModelLoad", "RepositoryModelUnload"))
                    return await method(request, call)
                except Exception as error:
                    reason = self._refusal(error, call)
            await context.abort(self._codes.get(call.status, self._codes[500]), reason)
            raise AssertionError("abort raises")

        return handle

    @contextlib.contextmanager
    def _call(self, name: str, context: Any) -> Iterator[_Call]:
        """Counted and logged as a request over HTTP is, and waited for where the server ends."""
        app = self._app
        started, headers = app.began(), _headers(context)
        about = Request("POST", f"/{SERVICE}/{name}", b"", _address(context), headers, app.request_id(headers))
        about.route = f"grpc/{name}"
        call = _Call(about, context)
        try:
            yield call
        except (asyncio.CancelledError, GeneratorExit):
            call.status = 499  # the caller has gone
            raise
        finally:
            app.ended(about, about.id, call.status, started)

    async def stream(self, requests: Any, context: Any) -> Any:
        """Triton's streams: requests are answered in their order, and batched among themselves; of a model that writes,
        each piece of text is an answer, and the last one, which says that it is, has none. A refusal is an answer with
        `error_message`, and the stream goes on."""
        ahead: asyncio.Queue[Any] = asyncio.Queue(MOST_AHEAD)
        tasks: set[asyncio.Task[Any]] = set()

        async def read() -> None:
            async for request in requests:
                task = asyncio.create_task(self._one_of_many(request, context))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                await ahead.put(task)
            await ahead.put(None)

        reading = asyncio.create_task(read())
        try:
            while (task := await ahead.get()) is not None:
                found = await task
                if not hasattr(found, "__aiter__"):
                    yield found
                    continue
                async for piece in found:
                    yield piece
        finally:
            for task in (reading, *tasks):
                task.cancel()

    async def _one_of_many(self, request: Any, context: Any) -> Any:
        with self._call("ModelStreamInfer", context) as call:
            try:
                self._admit(call)  # before anything is told of what is served
                version = self._app.models.choose(request.model_name, request.model_version or None)
                if version.signature is not None:
                    return messages()["ModelStreamInferResponse"](infer_response=await self.ModelInfer(request, call))
            except Exception as error:
                return messages()["ModelStreamInferResponse"](error_message=self._refusal(error, call))
        return self._words(request, version, call)

    async def _words(self, request: Any, version: Version, asked: _Call) -> Any:
        """Counted by themselves: how long they take says nothing of other requests, and they may never be begun."""
        with self._call("words", asked.context) as call:
            call.about.caller = asked.about.caller
            async for response in self._written(request, version, call):
                yield response

    async def _written(self, request: Any, version: Version, call: _Call) -> Any:
        about = {"model_name": version.name, "model_version": version.version, "id": request.id}
        call.about.model, call.about.version = version.name, version.version
        try:
            records = to_columns(list(_tensors(request)), version.columns)
            if len(records) != 1:
                raise BadRequest("words are written about one record at a time", 400)
            options = {
                name: getattr(value, value.WhichOneof("parameter_choice") or "", None)
                for name, value in request.parameters.items()
            }
            for name, value in options.items():  # the protocol's first version has no fractions but as text
                if isinstance(value, str):
                    options[name] = plain_number(name, value)
            async for piece in version.engine.write(records[0], options):
                text = to_binary(Tensor("text", "BYTES", (1,), [piece.encode()]))
                response = messages()["ModelInferResponse"](
                    **about, outputs=[{"name": "text", "datatype": "BYTES", "shape": [1]}], raw_output_contents=[text]
                )
                yield messages()["ModelStreamInferResponse"](infer_response=response)
        except RunError as error:
            call.status = 500
            yield messages()["ModelStreamInferResponse"](error_message=str(error))
            return
        except DougongError as error:
            call.status = 422
            yield messages()["ModelStreamInferResponse"](error_message=str(error))
            return
        except Exception as error:
            yield messages()["ModelStreamInferResponse"](error_message=self._refusal(error, call))
            return
        last = messages()["ModelInferResponse"](**about, parameters={"triton_final_response": {"bool_param": True}})
        yield messages()["ModelStreamInferResponse"](infer_response=last)

    def _admit(self, call: _Call, *, admin: bool = False) -> None:
        self._app.admit(call.about, admin=admin)

    def _refusal(self, error: Exception, call: _Call) -> str:
        reply = self._app.refusal(error, call.about.id)
        call.status = reply.status
        return str(json.loads(reply.body)["error"])

    async def ServerLive(self, request: Any, call: _Call) -> Any:
        return messages()["ServerLiveResponse"](live=True)

    async def ServerReady(self, request: Any, call: _Call) -> Any:
        return messages()["ServerReadyResponse"](ready=self._app.models.ready and not self._app.draining)

    async def ModelReady(self, request: Any, call: _Call) -> Any:
        version = self._app.models.choose(request.name, request.version or None)
        return messages()["ModelReadyResponse"](ready=version.engine.ready)

    async def ServerMetadata(self, request: Any, call: _Call) -> Any:
        return messages()["ServerMetadataResponse"](name="dougong", version=VERSION, extensions=["model_repository"])

    async def ModelMetadata(self, request: Any, call: _Call) -> Any:
        models = self._app.models
        version = models.choose(request.name, request.version or None)
        about = metadata(version.name, list(models.versions(version.name)), version.columns, version.signature)
        for one in about["inputs"] + about["outputs"]:
            one.pop("parameters", None)
        return messages()["ModelMetadataResponse"](**about)

    async def RepositoryIndex(self, request: Any, call: _Call) -> Any:
        listed = [each for each in self._app.models.index() if not request.ready or each["state"] == "READY"]
        return messages()["RepositoryIndexResponse"](models=listed)

    async def RepositoryModelLoad(self, request: Any, call: _Call) -> Any:
        take_over = not ("take_over" in request.parameters and request.parameters["take_over"].bool_param is False)
        await self._app.load(request.model_name, _version_of(request) or "1", take_over=take_over)
        return messages()["RepositoryModelLoadResponse"]()

    async def RepositoryModelUnload(self, request: Any, call: _Call) -> Any:
        await self._app.unload(request.model_name, _version_of(request))
        return messages()["RepositoryModelUnloadResponse"]()

    async def ModelInfer(self, request: Any, call: _Call) -> Any:
        version = self._app.models.choose(request.model_name, request.model_version or None)
        call.about.model, call.about.version = version.name, version.version
        records = to_columns(list(_tensors(request)), version.columns)
        remaining = call.context.time_remaining()
        within = None if remaining is None or remaining > 1e6 else max(0.001, remaining)
        named, who = bool(request.model_version), call.about
        version, outcomes = await self._app.answer(
            version, records, within, who.caller.name, named=named, request_id=who.id
        )
        outputs = from_outcomes(outcomes, version.signature)
        wanted = [output.name for output in request.outputs] or list(outputs)
        strange = next((name for name in wanted if name not in outputs), None)
        if strange is not None:
            raise BadRequest(f"no output is called {strange[:40]!r}; the model gives {', '.join(outputs)}", 400)
        chosen = [outputs[name] for name in wanted]
        return messages()["ModelInferResponse"](
            model_name=version.name,
            model_version=version.version,
            id=request.id,
            outputs=[{"name": each.name, "datatype": each.datatype, "shape": each.shape} for each in chosen],
            raw_output_contents=[to_binary(each) for each in chosen],
        )


def _version_of(request: Any) -> str | None:
    return request.parameters["version"].string_param or None if "version" in request.parameters else None


def _tensors(request: Any) -> Any:
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise BadRequest("raw_input_contents does not have one part for each input", 400)
    for place, given in enumerate(request.inputs):
        where, shape = f"tensor {given.name[:40]!r}", tuple(given.shape[: MOST_AXES + 1])
        if given.datatype != "BYTES" and given.datatype not in NUMPY:
            raise BadRequest(f"{where}: datatype is not one of BYTES, {', '.join(NUMPY)}", 400)
        number = checked_number(shape, where)
        if raw:
            values = from_binary(given.datatype, raw[place], number, where)
        else:
            if given.datatype not in CONTENTS:
                raise BadRequest(f"{where}: {given.datatype} is only read from raw_input_contents", 400)
            values = list(getattr(given.contents, CONTENTS[given.datatype]))
            if len(values) != number:
                raise BadRequest(f"{where}: {len(values)} values are not {number}", 400)
            if given.datatype != "BYTES":
                try:
                    values = np.array(values, NUMPY[given.datatype])
                except OverflowError:
                    raise BadRequest(f"{where}: a value is none of {given.datatype}", 400) from None
        yield Tensor(given.name, given.datatype, shape, values if isinstance(values, list) else values.reshape(shape))


def _headers(context: Any) -> dict[bytes, bytes]:
    given = dict(context.invocation_metadata() or ())
    return {key.encode(): value if isinstance(value, bytes) else value.encode() for key, value in given.items()}


def _address(context: Any) -> str:
    return str(context.peer()).rsplit(":", 1)[0]
