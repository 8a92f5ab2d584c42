import threading
import time
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
        (
            {"model_name": "colours", "inputs": [{"name": "weight", "datatype": "FP64", "shape": [2**62] * 4000}]},
            "INVALID_ARGUMENT",
        ),
        (
            {"model_name": "colours", "inputs": [{"name": "weight", "datatype": "FP64", "shape": [2**62]}]},
            "RESOURCE_EXHAUSTED",
        ),
        (
            {
                "model_name": "colours",
                "inputs": [
                    {"name": "weight", "datatype": "INT8", "shape": [1], "contents": {"int_contents": [1000]}},
                ],
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


def stream(server: Server, requests: list[dict[str, Any]]) -> list[Any]:
    from dougong.serve.grpc_server import SERVICE, messages

    with grpc.insecure_channel(f"127.0.0.1:{server.running.grpc_port}") as channel:
        ask = channel.stream_stream(
            f"/{SERVICE}/ModelStreamInfer",
            request_serializer=messages()["ModelInferRequest"].SerializeToString,
            response_deserializer=messages()["ModelStreamInferResponse"].FromString,
        )
        return list(ask((messages()["ModelInferRequest"](**fields) for fields in requests), timeout=20))


def remark(number: int, **more: Any) -> dict[str, Any]:
    inputs = [{"name": "remark", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [b"a"]}}]
    return {"model_name": "colours", "id": str(number), "inputs": inputs, **more}


def test_a_stream_is_answered_in_its_order_and_outlives_mistakes(server: Server) -> None:
    requests = [remark(number) for number in range(40)]
    requests[7] = remark(7, model_name="none")

    found = stream(server, requests)

    assert [each.infer_response.id for each in found] == [str(n) if n != 7 else "" for n in range(40)]
    assert "no model is called 'none'" in found[7].error_message
    assert [each.error_message for each in found if each.infer_response.id] == [""] * 39


def test_words_come_in_pieces_over_a_stream(hollow_bundle: Path) -> None:
    wanted = [Wanted("colours", "1", hollow_bundle)]
    with serving(wanted, workers=slow_workers, batching={"slo_seconds": 1.0}, grpc_port=0) as server:
        (version,) = server.running.models.all
        # As of a model that writes: the backend's words are three.
        server.running.models._versions["colours"]["1"] = version._replace(signature=None)
        two = remark(2)
        two["inputs"] = [{**two["inputs"][0], "shape": [2], "contents": {"bytes_contents": [b"a", b"b"]}}]
        *pieces, last, refused = stream(server, [remark(1), two])

    said = [each.infer_response.raw_output_contents[0][4:].decode() for each in pieces]
    assert said == ["a ", "red ", "circle"]
    assert last.infer_response.parameters["triton_final_response"].bool_param
    assert "about one record at a time" in refused.error_message


def test_a_request_over_grpc_is_counted_logged_and_waited_for(hollow_bundle: Path) -> None:
    slow = lambda wanted: ThreadWorkers(lambda: Slow(seconds=0.4))  # noqa: E731
    wanted = [Wanted("colours", "1", hollow_bundle)]
    settings: dict[str, Any] = {"batching": {"slo_seconds": 1.0}, "settle_seconds": 0.05}
    with serving(wanted, workers=slow, grpc_port=0, **settings) as server:
        app, found = server.running.app, list[Any]()
        asking = threading.Thread(target=lambda: found.extend(stream(server, [remark(1)])))
        asking.start()
        deadline = time.monotonic() + 5
        while not app.in_flight and time.monotonic() < deadline:
            time.sleep(0.01)
        server.loop.call_soon_threadsafe(server.running.drain)
        asking.join()
        page = app.metrics.page().decode()

    assert [each.error_message for each in found] == [""]
    assert app.in_flight == 0
    assert 'dougong_requests_total{route="grpc/ModelStreamInfer",status="200"} 1' in page


def test_keys_share_out_over_grpc_as_over_http(hollow_bundle: Path) -> None:
    import hashlib

    from dougong.serve.grpc_server import SERVICE, messages

    keys = [{"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest()} for name in ("shop", "lab")]
    with serving([Wanted("colours", "1", hollow_bundle)], workers=slow_workers, grpc_port=0, keys=keys) as server:
        (version,) = server.running.models.all
        clients, submit = list[str](), version.engine.submit

        def noting(*values: Any, **more: Any) -> Any:
            clients.append(more["client"])
            return submit(*values, **more)

        version.engine.submit = noting  # type: ignore[method-assign]
        with grpc.insecure_channel(f"127.0.0.1:{server.running.grpc_port}") as channel:
            ask = channel.unary_unary(
                f"/{SERVICE}/ModelInfer",
                request_serializer=messages()["ModelInferRequest"].SerializeToString,
                response_deserializer=messages()["ModelInferResponse"].FromString,
            )
            for key in ("shop", "lab"):
                ask(messages()["ModelInferRequest"](**remark(1)), metadata=[("x-api-key", key)], timeout=10)
            with pytest.raises(grpc.RpcError) as refused:
                ask(messages()["ModelInferRequest"](**remark(1)), timeout=10)
        (told,) = stream(server, [remark(1, model_name="none")])

    assert clients == ["shop", "lab"]
    assert refused.value.code().name == "UNAUTHENTICATED"
    assert "needs a key" in told.error_message  # and nothing of which models there are


def test_what_a_model_cannot_write_about_is_told_over_grpc(hollow_bundle: Path) -> None:
    class Choosy(Slow):
        def write(self, record: Any, options: Any) -> Any:
            raise ConfigError("the picture cannot be read.")

    workers = lambda wanted: ThreadWorkers(Choosy)  # noqa: E731
    with serving([Wanted("colours", "1", hollow_bundle)], workers=workers, grpc_port=0) as server:
        (version,) = server.running.models.all
        server.running.models._versions["colours"]["1"] = version._replace(signature=None)
        (refused,) = stream(server, [remark(1)])

    assert refused.error_message == "the picture cannot be read."


def test_the_repository_over_grpc(hollow_bundle: Path, tmp_path: Path) -> None:
    import hashlib
    import shutil

    from dougong.serve.grpc_server import SERVICE, messages

    shutil.copytree(hollow_bundle, tmp_path / "colours" / "2")
    keys = [
        {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), "admin": name == "root"}
        for name in ("shop", "root")
    ]
    wanted = [Wanted("colours", "1", hollow_bundle)]
    settings: dict[str, Any] = {"models_folder": tmp_path, "keys": keys, "batching": {"slo_seconds": 1.0}}
    with (
        serving(wanted, workers=slow_workers, grpc_port=0, **settings) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.running.grpc_port}") as channel,
    ):

        def one(key: str, method: str, **fields: Any) -> Any:
            ask = channel.unary_unary(
                f"/{SERVICE}/{method}",
                request_serializer=messages()[f"{method}Request"].SerializeToString,
                response_deserializer=messages()[f"{method}Response"].FromString,
            )
            return ask(messages()[f"{method}Request"](**fields), timeout=20, metadata=[("x-api-key", key)])

        second = {"model_name": "colours", "parameters": {"version": {"string_param": "2"}}}
        for key, method, code in (
            ("shop", "RepositoryModelLoad", "PERMISSION_DENIED"),
            ("none", "RepositoryIndex", "UNAUTHENTICATED"),
        ):
            with pytest.raises(grpc.RpcError) as refused:
                one(key, method, **(second if method != "RepositoryIndex" else {}))
            assert refused.value.code().name == code

        one("root", "RepositoryModelLoad", **second)
        index = one("shop", "RepositoryIndex").models
        assert [(each.name, each.version, each.state) for each in index] == [("colours", "2", "READY")]
        nine = {"model_name": "colours", "parameters": {"version": {"string_param": "9"}}}
        with pytest.raises(grpc.RpcError, match="there is no bundle colours/9"):
            one("root", "RepositoryModelLoad", **nine)
        one("root", "RepositoryModelUnload", model_name="colours")
        assert list(one("shop", "RepositoryIndex").models) == []
