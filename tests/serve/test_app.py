"""The interface, on a model that only says what it was asked."""

import asyncio
import base64
import contextlib
import hashlib
import http.client
import json
import shutil
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Server, Slow, serving

from dougong.core.config import parse
from dougong.core.errors import ConfigError
from dougong.serve.app import App
from dougong.serve.metrics import Metrics
from dougong.serve.models import Models, Wanted
from dougong.serve.settings import ServeConfig, read_keys
from dougong.serve.workers import ThreadWorkers

KEY = "not a real key"
FORM = "multipart/form-data; boundary=edge"


def slow_workers(wanted: Wanted) -> ThreadWorkers:
    return ThreadWorkers(lambda: Slow(name=f"version {wanted.version}"))


@pytest.fixture(scope="module")
def bundle(hollow_bundle: Path) -> Path:
    return hollow_bundle


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[Server]:
    limits = {"body_bytes": 100_000, "body_seconds": 0.5, "tokens": 1000, "records": 8}
    batching = {"slo_seconds": 1.0, "timeout_seconds": 5.0, "refuse_late": False}
    with serving([Wanted("colours", "1", bundle)], workers=slow_workers, limits=limits, batching=batching) as found:
        yield found


def form(*parts: tuple[str, str | None, bytes]) -> bytes:
    body = b""
    for name, file, content in parts:
        more = f'; filename="{file}"' if file else ""
        body += f'--edge\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"
    return body + b"--edge--\r\n"


def test_a_record_is_answered_as_json_and_as_a_form(server: Server) -> None:
    status, plain, headers = server.ask("POST", "/v1/predict", {"remark": "hello", "weight": 3})
    assert (status, plain["answer"], plain["said"]) == (200, "version 1", "hello")
    assert (plain["model"], plain["version"]) == ("colours", "1")
    assert headers["x-request-id"]

    body = form(("remark", None, b"hello"), ("photo", "a.png", b"\x89PNG"))
    status, formed, _ = server.ask("POST", "/v1/predict", body, {"content-type": FORM})
    assert (status, formed["said"]) == (200, "hello")


def test_many_records_are_answered_in_their_order(server: Server) -> None:
    rows = [{"remark": remark} for remark in ("a", "poison", "c")]

    status, found, _ = server.ask("POST", "/v1/predict", {"records": rows})

    assert status == 200
    assert [each.get("said") for each in found["answers"]] == ["a", None, "c"]
    assert "ValueError" in found["answers"][1]["error"]


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ({"smell": "roses"}, 422, "no column is called 'smell'; the model reads photo, clip"),
        ({"weight": "heavy"}, 422, "weight: give a number"),
        ({"weight": float("nan")}, 422, "weight: give a finite number"),
        ({"remark": 3}, 422, "remark: give text, not a number"),
        ({"remark": "x" * 5000}, 413, "longer than 1000 tokens"),
        ({"photo": "%%%"}, 422, "photo: is not base64"),
        ({"photo": "data:image/png,abc"}, 422, "a data: URI must be of base64"),
        ({"photo": "https://example.org/a.png"}, 422, "no URL of that host is fetched here"),
        ({"photo": {"url": "file:///etc/passwd"}}, 422, "no URL of that host is fetched here"),
        ({"photo": 7}, 422, "photo: give a file's bytes"),
        ([1], 422, "give an object"),
        ({"records": []}, 422, "with at least one"),
        ({"records": [{}] * 9}, 413, "over 8 records"),
        ({"records": [{"remark": 1}]}, 422, "record 0: remark"),
        (b"{", 400, "is not JSON"),
        (b"[" * 50_000, 400, "nested too deeply"),
        (b"x" * 100_001, 413, "over 100000 bytes"),
    ],
)
def test_a_mistake_is_told_in_one_line(server: Server, body: Any, status: int, reason: str) -> None:
    found_status, found, _ = server.ask("POST", "/v1/predict", body, {"content-type": "application/json"})

    assert found_status == status, found
    assert reason in found["error"]
    assert "\n" not in found["error"]


def test_a_path_in_a_record_names_no_file_of_the_servers(server: Server, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")

    for cell in (str(secret), {"path": str(secret)}, {"path": str(secret), "bytes": None}):
        status, found, _ = server.ask("POST", "/v1/predict", {"photo": cell})
        assert status == 422, found


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"--edge\r\n\r\nx", FORM, 400),
        (b"nothing like it", FORM, 400),
        (form(("remark", None, b"\xff\xfe")), FORM, 400),
        (form(("remark", None, b"a"), ("remark", None, b"b")), FORM, 400),
        (form(("remark", None, b"a"))[:-12], FORM, 400),
        (form(("remark", None, b"a")), "multipart/form-data", 400),
        (b"remark=hello", "application/x-www-form-urlencoded", 415),
        (b"hello", "", 415),
    ],
)
def test_what_is_no_form_is_refused(server: Server, body: bytes, content_type: str, status: int) -> None:
    found_status, found, _ = server.ask("POST", "/v1/predict", body, {"content-type": content_type})

    assert found_status == status, found


def test_addresses_and_methods_that_are_not_there(server: Server) -> None:
    assert server.ask("GET", "/v1/predict")[0] == 405
    assert server.ask("GET", "/nothing")[0] == 404
    assert server.ask("POST", "/v1/predict?model=none", {"remark": "a"})[0] == 404
    assert server.ask("POST", "/v1/predict?version=9", {"remark": "a"})[0] == 404
    assert server.ask("GET", "/v2/models/none")[0] == 404
    assert server.ask("DELETE", "/v2/models/colours")[0] == 405
    assert server.ask("POST", "/v1/predict", {"remark": "a"}, {"content-encoding": "gzip"})[0] == 415
    assert server.ask("POST", "/v1/predict", {"remark": "a"}, {"x-deadline-ms": "soon"})[0] == 400
    assert server.ask("POST", "/v1/predict", {"remark": "a"}, {"x-priority": "top"})[0] == 400


def test_what_cannot_be_done_in_the_callers_time_is_refused_at_once(server: Server) -> None:
    started = time.perf_counter()

    status, found, headers = server.ask("POST", "/v1/predict", {"remark": "a"}, {"x-deadline-ms": "1"})

    assert time.perf_counter() - started < 0.5
    assert (status, headers["retry-after"]) == (429, "1")
    assert "cannot be answered in time" in found["error"]


def test_a_body_that_never_ends_is_given_up(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 5) as caller:
        caller.sendall(b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
        caller.sendall(b"content-length: 100\r\n\r\n{")
        answer = caller.recv(1000)
    assert answer.startswith(b"HTTP/1.1 408")


def test_a_head_that_never_ends_holds_no_connection(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 5) as caller:
        caller.sendall(b"POST /v1/predict HTTP/1.1\r\nhost: ")
        started = time.perf_counter()
        assert caller.recv(1000) == b""
        assert 0.3 < time.perf_counter() - started < 3


def test_a_head_of_any_length_is_not_kept(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 5) as caller:
        started = time.perf_counter()
        with contextlib.suppress(ConnectionError):
            caller.sendall(b"GET / HTTP/1.1\r\nhost: x\r\nx-long: " + b"a" * 100_000)
            assert caller.recv(1000) == b""
        assert time.perf_counter() - started < 0.4  # not by its time: by its length


def test_a_request_behind_another_in_one_packet_ends_like_any_other(server: Server) -> None:
    whole = b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n"
    head = b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 90000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), 5) as caller:
        started = time.perf_counter()
        caller.sendall(whole + head + b"{")
        held = b""
        while more := caller.recv(1000):
            held += more
        assert time.perf_counter() - started < 3
    assert held.startswith(b"HTTP/1.1 200")
    deadline = time.perf_counter() + 3
    while server.running.app.in_flight and time.perf_counter() < deadline:
        time.sleep(0.01)
    assert server.running.app.in_flight == 0

    body = json.dumps({"remark": "second"}).encode().ljust(90_000)
    with socket.create_connection(("127.0.0.1", server.port), 5) as caller:
        caller.sendall(whole + head)
        time.sleep(0.05)
        caller.sendall(body)
        held = b""
        while held.count(b"HTTP/1.1 200") < 2:
            more = caller.recv(1000)
            assert more, held
            held += more


def test_a_caller_that_goes_away_in_the_middle_costs_nothing(server: Server) -> None:
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.port), 5) as caller:
            caller.sendall(b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n")
            caller.sendall(b"content-length: 100\r\n\r\n{")
    assert server.ask("POST", "/v1/predict", {"remark": "still here"})[0] == 200


def test_a_request_keeps_its_id(server: Server) -> None:
    assert server.ask("GET", "/v2/health/live", headers={"x-request-id": "mine-1"})[2]["x-request-id"] == "mine-1"
    assert server.ask("GET", "/v2/health/live", headers={"x-request-id": "two words"})[2]["x-request-id"] != "two words"


def test_a_picture_is_drawn_of_words(server: Server) -> None:
    for strange in (
        {"seed": {}},
        {"seed": None},
        {"seed": 10**30},
        {"seed": 1.5},
        {"top_p": "1"},
        {"smell": 1},
        {"temperature": True},
    ):
        assert server.ask("POST", "/v1/draw", {"text": "a red circle", **strange})[0] == 422, strange
    status, picture, headers = server.ask("POST", "/v1/draw", {"text": "a red circle", "seed": 3})
    assert (status, headers["content-type"], picture) == (200, "image/png", b"\x89PNG of a red circle 3")
    for body, refused in (({}, 422), ({"text": 3}, 422), ({"text": "a", "heat": 1}, 422), ({"text": "x" * 5000}, 413)):
        assert server.ask("POST", "/v1/draw", body)[0] == refused
    assert server.ask("GET", "/v1/draw")[0] == 405
    assert server.ask("POST", "/v1/draw?model=none", {"text": "a"})[0] == 404


def test_inference_protocol_in_json(server: Server) -> None:
    assert server.ask("GET", "/v2/health/live")[0] == server.ask("GET", "/v2/health/ready")[0] == 200
    status, about, _ = server.ask("GET", "/v2/models/colours")
    assert status == 200
    assert {each["name"]: each["datatype"] for each in about["inputs"]}["weight"] == "FP64"
    assert about["versions"] == ["1"]

    body = {
        "id": "42",
        "inputs": [
            {"name": "remark", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]},
            {"name": "weight", "datatype": "FP32", "shape": [2, 1], "data": [[1.5], [2.5]]},
        ],
        "outputs": [{"name": "answer"}],
    }
    status, found, _ = server.ask("POST", "/v2/models/colours/versions/1/infer", body)

    assert status == 200, found
    assert (found["id"], found["model_name"], found["model_version"]) == ("42", "colours", "1")
    assert found["outputs"] == [{"name": "answer", "datatype": "BYTES", "shape": [2], "data": ["version 1"] * 2}]


def binary(*tensors: tuple[str, str, list[int], bytes]) -> tuple[bytes, dict[str, str]]:
    inputs = [
        {"name": name, "datatype": kind, "shape": shape, "parameters": {"binary_data_size": len(content)}}
        for name, kind, shape, content in tensors
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    return head + b"".join(each[3] for each in tensors), {"inference-header-content-length": str(len(head))}


def as_bytes(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def test_inference_protocol_in_binary(server: Server) -> None:
    body, headers = binary(
        ("remark", "BYTES", [2], as_bytes(b"a", b"b")), ("weight", "FP64", [2], struct.pack("<dd", 1.0, float("nan")))
    )

    status, found, headers = server.ask("POST", "/v2/models/colours/infer", body, headers)

    size = int(headers["inference-header-content-length"])
    outputs = {each["name"]: each for each in json.loads(found[:size])["outputs"]}
    assert status == 200
    assert outputs["answer"]["parameters"]["binary_data_size"] == 2 * (4 + len("version 1"))
    assert found[size:].startswith(as_bytes(b"version 1"))


@pytest.mark.parametrize(
    "tensor",
    [
        ("remark", "BYTES", [2], as_bytes(b"a")),
        ("remark", "BYTES", [1], b"\xff\xff\xff\xffa"),
        ("remark", "BYTES", [1], b"\x01"),
        ("remark", "BYTES", [1], as_bytes(b"\xff")),
        ("weight", "FP64", [2], b"1234567"),
        ("weight", "FP99", [1], b""),
        ("remark", "BYTES", [], b""),
        ("remark", "BYTES", [0], b""),
        ("remark", "BYTES", [-1], b""),
        ("remark", "FP32", [1], b"1234"),
        ("smell", "BYTES", [1], as_bytes(b"a")),
    ],
)
def test_tensors_that_are_none_are_refused(server: Server, tensor: tuple[str, str, list[int], bytes]) -> None:
    body, headers = binary(tensor)

    status, found, _ = server.ask("POST", "/v2/models/colours/infer", body, headers)

    assert status == 400, found


@pytest.mark.parametrize(
    "body",
    [
        b'{"inputs": [{"name": "remark", "datatype": [], "shape": [1], "data": []}]}',
        b'{"inputs": [{"name": "remark", "datatype": "BYTES", "shape": [1], "data": [[["a"], "b"]]}]}',
        b'{"inputs": [{"name": "weight", "datatype": "FP32", "shape": [1], "data": [{}]}]}',
        b'{"inputs": [], "parameters": 1}',
        b'{"inputs": [], "outputs": 1}',
        b"",
        b"{}",
        b"[]",
        b'{"inputs": [1]}',
        b'{"inputs": []}',
        b'{"inputs": [{"name": "remark"}]}',
        b'{"inputs": {}}',
        b'{"inputs": [{"name": "remark", "datatype": "BYTES", "shape": [1, 1, 1, 1, 1, 1, 1, 1, 1], "data": ["a"]}]}',
    ],
)
def test_requests_that_are_none_are_refused(server: Server, body: bytes) -> None:
    assert server.ask("POST", "/v2/models/colours/infer", body)[0] == 400
    assert server.ask("POST", "/v2/models/colours/infer", body, {"inference-header-content-length": "99"})[0] == 400


def test_a_shape_of_any_length_is_refused_at_once(server: Server) -> None:
    shape = [10**18 - 1] * 4000
    started = time.perf_counter()

    inputs = [{"name": "weight", "datatype": "FP64", "shape": shape, "data": []}]
    assert server.ask("POST", "/v2/models/colours/infer", {"inputs": inputs})[0] == 400
    inputs[0]["shape"] = [2**20, 2**20]
    assert server.ask("POST", "/v2/models/colours/infer", {"inputs": inputs})[0] == 413
    assert time.perf_counter() - started < 0.2


def test_the_page_asks_nobody_else_and_the_description_lists_the_columns(server: Server) -> None:
    status, page, headers = server.ask("GET", "/")
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
    assert b"http://" not in page.replace(b"http://www.w3.org", b"")
    assert b"https://" not in page

    status, described, _ = server.ask("GET", "/openapi.json")
    schemas = described["paths"]["/v1/predict"]["post"]["requestBody"]["content"]
    assert status == 200
    assert schemas["multipart/form-data"]["schema"]["properties"]["photo"]["format"] == "binary"


def test_what_happened_is_counted(server: Server) -> None:
    server.ask("POST", "/v1/predict", {"remark": "xylophone", "weight": 1})

    status, page, _ = server.ask("GET", "/metrics")

    text = page.decode()
    assert status == 200
    assert 'dougong_requests_total{route="/v1/predict",status="200"}' in text
    assert 'dougong_modality_records_total{modality="remark",model="colours",version="1"}' in text
    assert 'dougong_queue_records{model="colours",version="1"} 0.0' in text
    assert "xylophone" not in text


def test_a_burst_beyond_the_queue_is_sent_back(bundle: Path) -> None:
    batching = {"max_queue": 2, "max_batch": 1, "refuse_late": False, "slo_seconds": 2.0, "timeout_seconds": 3.0}
    workers = lambda wanted: ThreadWorkers(lambda: Slow(seconds=0.2))  # noqa: E731
    with serving([Wanted("colours", "1", bundle)], workers=workers, batching=batching) as server:
        found: list[tuple[int, dict[str, str]]] = []

        def ask() -> None:
            status, _, headers = server.ask("POST", "/v1/predict", {"remark": "a"})
            found.append((status, headers))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    statuses = [status for status, _ in found]
    assert 3 <= statuses.count(200) < 8
    assert set(statuses) == {200, 429}
    assert all(int(headers["retry-after"]) >= 1 for status, headers in found if status == 429)


def test_versions_are_swapped_directed_and_shadowed(bundle: Path, tmp_path: Path) -> None:
    for version in ("1", "2", "3"):
        shutil.copytree(bundle, tmp_path / "colours" / version)
    settings: dict[str, Any] = {"models_folder": tmp_path, "batching": {"slo_seconds": 1.0, "refuse_late": False}}
    wanted = [Wanted("colours", "1", tmp_path / "colours" / "1")]
    with serving(wanted, workers=slow_workers, **settings) as server:
        wrong, asked = list[Any](), [0]
        ended = threading.Event()

        def ask_on() -> None:
            while not ended.is_set():
                status, found, _ = server.ask("POST", "/v1/predict", {"remark": "x"})
                asked[0] += 1
                if status != 200 or found["answer"] != f"version {found['version']}":
                    wrong.append((status, found))

        threads = [threading.Thread(target=ask_on) for _ in range(4)]
        for thread in threads:
            thread.start()
        for version in ("2", "3", "1", "2"):
            path = "/v2/repository/models/colours/load"
            assert server.ask("POST", path, {"parameters": {"version": version}})[0] == 200
        ended.set()
        for thread in threads:
            thread.join()
        assert asked[0] > 5
        assert wrong == []
        assert server.ask("POST", "/v1/predict", {"remark": "x"})[1]["version"] == "2"

        keep = {"parameters": {"version": "1", "take_over": False}}
        assert server.ask("POST", "/v2/repository/models/colours/load", keep)[0] == 200
        traffic = {"weights": {"1": 0.5, "2": 0.5}, "shadow": "1"}
        assert server.ask("PUT", "/v1/models/colours/traffic", traffic)[0] == 200
        found = {server.ask("POST", "/v1/predict", {"remark": "x"})[1]["version"] for _ in range(40)}
        assert found == {"1", "2"}
        page = server.ask("GET", "/metrics")[1].decode()
        assert 'dougong_shadow_total{alike="false",model="colours",version="1"}' in page  # they say their version

        assert server.ask("PUT", "/v1/models/colours/traffic", {"weights": {"9": 1}})[0] == 404
        assert server.ask("PUT", "/v1/models/colours/traffic", {"weights": {"1": -1}})[0] == 400
        assert server.ask("POST", "/v2/repository/models/colours/unload", {"parameters": {"version": "1"}})[0] == 400
        assert server.ask("POST", "/v2/repository/models/../load", {})[0] == 400
        assert server.ask("POST", "/v2/repository/models/none/load", {})[0] == 400
        assert server.ask("POST", "/v2/repository/models/%2e%2e/load", {})[0] == 400
        foreign = {"origin": "http://elsewhere.example"}
        assert server.ask("POST", "/v2/repository/models/colours/unload", {}, foreign)[0] == 403
        assert server.ask("POST", "/v2/repository/models/colours/unload", {})[0] == 200
        assert server.ask("POST", "/v1/predict", {"remark": "x"})[0] == 404
        assert server.ask("GET", "/v2/health/ready")[0] == 503


def test_who_is_being_answered_when_a_model_goes_is_answered(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "colours" / "1")
    slow = lambda wanted: ThreadWorkers(lambda: Slow(seconds=0.3))  # noqa: E731
    batching = {"slo_seconds": 2.0, "refuse_late": False, "timeout_seconds": 5.0}
    found: list[tuple[int, Any]] = []
    with serving([Wanted("colours", "1", bundle)], workers=slow, models_folder=tmp_path, batching=batching) as server:
        asking = threading.Thread(
            target=lambda: found.append(server.ask("POST", "/v1/predict", {"remark": "asked before"})[:2])
        )
        asking.start()
        time.sleep(0.1)
        assert server.ask("POST", "/v2/repository/models/colours/unload", {})[0] == 200
        asking.join()

    assert [(status, answer["said"]) for status, answer in found] == [(200, "asked before")]


def test_keys_rates_and_who_may_change(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    entries = [
        {"name": "shop", "sha256": hashlib.sha256(KEY.encode()).hexdigest(), "per_second": 0.01, "burst": 3},
        {"name": "root", "sha256": hashlib.sha256(b"another").hexdigest(), "admin": True},
    ]
    file.write_text(json.dumps(entries))
    with serving([Wanted("colours", "1", bundle)], workers=slow_workers, keys=read_keys(file)) as server:
        shop, root = {"authorization": f"Bearer {KEY}"}, {"x-api-key": "another"}
        assert server.ask("POST", "/v1/predict", {"remark": "a"})[0] == 401
        assert server.ask("POST", "/v1/predict", {"remark": "a"}, {"x-api-key": "wrong"})[0] == 401
        assert server.ask("GET", "/metrics")[0] == 401
        assert server.ask("GET", "/v2/health/ready")[0] == 200
        assert server.ask("POST", "/v2/repository/models/colours/unload", {}, shop)[0] == 403
        statuses = [server.ask("POST", "/v1/predict", {"remark": "a"}, shop)[0] for _ in range(4)]
        assert statuses == [200, 200, 429, 429]  # one of the three went to what it may not do
        assert server.ask("POST", "/v1/predict", {"remark": "a"}, root)[0] == 200


def test_settings_that_would_let_everybody_in_are_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"host 0\.0\.0\.0 can be reached from other machines"),
        serving([], host="0.0.0.0"),
    ):
        pass
    for content, reason in (
        ("{}", "no list of keys"),
        ('[{"name": "a", "sha256": "s"}]', "a sha256 sum has 64 digits"),
    ):
        (tmp_path / "keys.json").write_text(content)
        with pytest.raises(ConfigError, match=reason):
            read_keys(tmp_path / "keys.json")


def test_another_origin_is_let_in_only_where_it_was_named(server: Server, bundle: Path) -> None:
    origin = {"origin": "https://page.example", "access-control-request-method": "POST"}
    assert server.ask("OPTIONS", "/v1/predict", headers=origin)[0] == 405
    assert "access-control-allow-origin" not in server.ask("POST", "/v1/predict", {"remark": "a"}, origin)[2]
    allowed = ("https://page.example",)
    with serving([Wanted("colours", "1", bundle)], workers=slow_workers, cors_origins=allowed) as other:
        assert other.ask("OPTIONS", "/v1/predict", headers=origin)[0] == 204
        found = other.ask("POST", "/v1/predict", {"remark": "a"}, origin)[2]
        assert found["access-control-allow-origin"] == "https://page.example"


def test_a_draining_server_answers_what_still_comes(bundle: Path) -> None:
    with serving([Wanted("colours", "1", bundle)], workers=slow_workers, settle_seconds=1.0) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.request("GET", "/v2/health/ready")
        assert connection.getresponse().read() == b'{"ready":true}'

        server.loop.call_soon_threadsafe(server.running.drain)
        time.sleep(0.1)
        connection.request("POST", "/v1/predict", b'{"remark": "late"}', {"content-type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()

        assert (answer.status, answer.getheader("connection")) == (200, "close")
        assert json.loads(content)["said"] == "late"
        assert server.ask("GET", "/v2/health/ready")[0] == 503
        server.do(server.running.until_ended())


def test_a_picture_that_claims_to_be_huge_is_never_decoded() -> None:
    from dougong.data.modality.image import ImageConfig, ImageModality
    from dougong.data.modality.medium import BadValue

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + head
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(head)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    modality = ImageModality(ImageConfig(column="photo", largest_pixels=1_000_000))
    with pytest.raises(BadValue):
        modality.decode(({"bytes": bomb, "path": None},), Path("."))


def test_a_first_piece_that_is_too_long_is_refused() -> None:
    async def ask() -> int:
        config = parse(ServeConfig, {"limits": {"body_bytes": 100}}, where="test")
        app = App(config, Models(config), Metrics())
        sent: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"{" * 1000, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        head = [(b"content-type", b"application/json"), (b"transfer-encoding", b"chunked")]
        scope = {"type": "http", "method": "POST", "path": "/v1/predict", "headers": head, "client": ("x", 1)}
        await app(scope, receive, send)
        return int(sent[0]["status"])

    assert asyncio.run(ask()) == 413


def test_what_ray_serves_is_changed_where_ray_is_told() -> None:
    async def ask() -> list[int]:
        config = ServeConfig()
        app = App(config, Models(config), Metrics(), changed_elsewhere="in the cluster's configuration")
        statuses: list[int] = []

        async def send(message: Any) -> None:
            statuses.append(message.get("status", 0))

        for method, path in (("POST", "/v2/repository/models/a/unload"), ("PUT", "/v1/models/a/traffic")):
            scope = {"type": "http", "method": method, "path": path, "headers": [], "client": ("127.0.0.1", 1)}
            await app(scope, None, send)  # type: ignore[arg-type]  # nothing is read
        return [status for status in statuses if status]

    assert asyncio.run(ask()) == [405, 405]


def test_who_goes_away_while_words_are_written_gives_the_worker_back(bundle: Path) -> None:
    class Endless(Slow):
        def write(self, record: Any, options: Any) -> Iterator[str]:
            while record["remark"] == "endless":
                time.sleep(0.02)
                yield "on "
            yield "short"

    workers = lambda wanted: ThreadWorkers(Endless)  # noqa: E731
    batching = {"slo_seconds": 1.0, "timeout_seconds": 3.0}
    with serving([Wanted("colours", "1", bundle)], workers=workers, batching=batching) as server:
        (version,) = server.running.models.all
        server.running.models._versions["colours"]["1"] = version._replace(signature=None)
        stream = {"accept": "text/event-stream", "content-type": "application/json"}
        for _ in range(3):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
            connection.request("POST", "/v1/predict", b'{"remark": "endless"}', stream)
            answer = connection.getresponse()
            assert answer.read(10)
            answer.close()
            connection.close()
        started = time.perf_counter()
        status, events, _ = server.ask("POST", "/v1/predict", b'{"remark": "soon over"}', stream)

    assert (status, b"short" in events) == (200, True)
    assert time.perf_counter() - started < 2


def test_a_callers_limit_of_any_length_is_read(server: Server) -> None:
    inputs = [{"name": "remark", "datatype": "BYTES", "shape": [1], "data": ["a"]}]
    document = json.dumps({"inputs": inputs, "parameters": {"timeout": 0}}).replace(": 0}", ": 1" + "0" * 400 + "}")

    assert server.ask("POST", "/v2/models/colours/infer", document.encode())[0] == 200


def test_base64_is_read_however_it_is_wrapped(server: Server) -> None:
    content = base64.b64encode(b"\x89PNG").decode()
    for cell in (content, f"data:image/png;base64,{content}", {"bytes": content}):
        assert server.ask("POST", "/v1/predict", {"photo": cell, "remark": "a"})[0] == 200
