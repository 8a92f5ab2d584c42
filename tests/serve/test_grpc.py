from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Server, Slow, serving

from dougong.core.errors import ConfigError
from dougong.serve.models import Wanted
from dougong.serve.workers import ThreadWorkers

grpc = pytest.importorskip("grpc")


def slow_workers(wanted: Wanted) -> ThreadWorkers:
    return ThreadWorkers(lambda: Slow(name=f"version {wanted.version}"))


@pytest.fixture(scope="module")
def server(hollow_bundle: Path) -> Iterator[Server]:
    batching = {"slo_seconds": 1.0, "refuse_late": False}
    wanted = [Wanted("colours", "1", hollow_bundle)]
    with serving(wanted, workers=slow_workers, batching=batching, grpc_port=0) as found:
        yield found


@pytest.fixture(scope="module")
def call(server: Server) -> Iterator[Any]:
    from dougong.serve.grpc_server import SERVICE, messages

    with grpc.insecure_channel(f"127.0.0.1:{server.running.grpc_port}") as channel:

        def one(method: str, **fields: Any) -> Any:
            ask = channel.unary_unary(
                f"/{SERVICE}/{method}",
                request_serializer=messages()[f"{method}Request"].SerializeToString,
                response_deserializer=messages()[f"{method}Response"].FromString,
            )
            return ask(messages()[f"{method}Request"](**fields), timeout=10)

        yield one


def test_health_and_metadata(call: Any) -> None:
    assert call("ServerLive").live
    assert call("ServerReady").ready
    assert call("ModelReady", name="colours").ready
    assert call("ServerMetadata").name == "dougong"
    about = call("ModelMetadata", name="colours")
    assert {each.name: each.datatype for each in about.inputs}["weight"] == "FP64"
    assert list(about.versions) == ["1"]


def test_typed_and_raw_contents_are_answered_alike(call: Any) -> None:
    typed = call(
        "ModelInfer",
        model_name="colours",
        id="7",
        inputs=[
            {"name": "remark", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [b"a"]}},
            {"name": "weight", "datatype": "FP32", "shape": [1], "contents": {"fp32_contents": [1.5]}},
        ],
        outputs=[{"name": "answer"}],
    )
    raw = call(
        "ModelInfer",
        model_name="colours",
        id="7",
        inputs=[{"name": "remark", "datatype": "BYTES", "shape": [1]}],
        raw_input_contents=[b"\x01\0\0\0a"],
        outputs=[{"name": "answer"}],
    )

    assert typed == raw
    assert (typed.id, typed.model_version) == ("7", "1")
    assert list(typed.raw_output_contents) == [b"\x09\0\0\0version 1"]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"model_name": "none"}, "NOT_FOUND"),
        ({"model_name": "colours"}, "INVALID_ARGUMENT"),
        (
            {"model_name": "colours", "inputs": [{"name": "smell", "datatype": "BYTES", "shape": [1]}]},
            "INVALID_ARGUMENT",
        ),
        (
            {"model_name": "colours", "inputs": [{"name": "remark", "datatype": "FP99", "shape": [1]}]},
            "INVALID_ARGUMENT",
        ),
        (
            {"model_name": "colours", "inputs": [{"name": "remark", "datatype": "BYTES", "shape": [-1]}]},
            "INVALID_ARGUMENT",
        ),
        (
            {
                "model_name": "colours",
                "inputs": [{"name": "remark", "datatype": "BYTES", "shape": [1]}],
                "raw_input_contents": [b"\xff\xff\xff\xff"],
            },
            "INVALID_ARGUMENT",
        ),
    ],
)
def test_mistakes_have_their_codes(call: Any, fields: dict[str, Any], code: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        call("ModelInfer", **fields)

    assert refused.value.code().name == code, refused.value.details()


def test_a_port_that_is_taken_is_told(hollow_bundle: Path, server: Server) -> None:
    taken = {"grpc_port": server.running.grpc_port}
    refused = pytest.raises(ConfigError, match="for gRPC. Use another --grpc-port")
    with refused, serving([Wanted("colours", "1", hollow_bundle)], workers=slow_workers, **taken):
        pass
