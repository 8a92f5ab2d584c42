"""The short way gives what ASGI gives, in the order in which it was asked."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Server, Slow, serving

from dougong.serve.models import Wanted
from dougong.serve.workers import ThreadWorkers


@pytest.fixture(scope="module")
def server(hollow_bundle: Path) -> Iterator[Server]:
    batching = {"slo_seconds": 2.0, "timeout_seconds": 5.0, "refuse_late": False, "max_batch": 1}
    workers = lambda wanted: ThreadWorkers(lambda: Slow(seconds=0.002))  # noqa: E731
    allowed = ("https://page.example",)
    wanted = [Wanted("colours", "1", hollow_bundle)]
    with serving(wanted, workers=workers, batching=batching, cors_origins=allowed) as found:
        yield found


def asked(path: str, body: bytes, *more: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: x", f"content-length: {len(body)}", *more]
    return "\r\n".join([*lines, "", ""]).encode() + body


def answers(server: Server, request: bytes, number: int) -> list[tuple[int, set[bytes], bytes]]:
    """Status, lines of the head and body of so many answers on one connection."""
    found, held = [], b""
    with socket.create_connection(("127.0.0.1", server.port), 10) as caller:
        caller.sendall(request)
        while len(found) < number:
            more = caller.recv(2**16)
            assert more, (found, held)
            held += more
            while (end := held.find(b"\r\n\r\n")) >= 0:
                start, *lines = held[:end].split(b"\r\n")
                size = next(int(line[16:]) for line in lines if line.startswith(b"content-length: "))
                if len(held) < end + 4 + size:
                    break
                found.append((int(start[9:12]), {start, *lines}, held[end + 4 : end + 4 + size]))
                held = held[end + 4 + size :]
    return found


JSON = "content-type: application/json"
TENSORS = {"inputs": [{"name": "remark", "datatype": "BYTES", "shape": [1], "data": ["a"]}]}


@pytest.mark.parametrize(
    ("path", "body", "more"),
    [
        ("/v1/predict", {"remark": "a", "weight": 3}, ()),
        ("/v1/predict?model=colours&version=1", {"remark": "a"}, ()),
        ("/v1/predict?model=none", {"remark": "a"}, ()),
        ("/v1/predict?" + "a=1&" * 40, {"remark": "a"}, ()),
        ("/v1/predict", {"records": [{"remark": "a"}, {"remark": "poison"}]}, ()),
        ("/v1/predict", {"remark": "poison"}, ()),
        ("/v1/predict", {"smell": 1}, ()),
        ("/v1/predict", {"remark": "a"}, ("x-deadline-ms: soon",)),
        ("/v1/predict", {"remark": "a"}, ("x-deadline-ms: 1",)),
        ("/v1/predict", {"remark": "a"}, ("origin: https://page.example",)),
        ("/v2/models/colours/infer", TENSORS, ()),
        ("/v2/models/colours/versions/1/infer", TENSORS, ()),
        ("/v2/models/colours/versions/9/infer", TENSORS, ()),
        ("/v2/models/colours/infer", {"inputs": 1}, ()),
    ],
)
def test_both_ways_answer_alike(server: Server, path: str, body: Any, more: tuple[str, ...]) -> None:
    app = server.running.app
    request = asked(path, json.dumps(body).encode(), JSON, "x-request-id: same", *more)
    counted: list[dict[tuple[str, int], int]] = []
    found = []
    for direct in (True, False):
        before = dict(app.metrics._requests)
        app.direct = direct
        try:
            found += answers(server, request, 1)
        finally:
            app.direct = True
        until = time.monotonic() + 5
        while app.in_flight and time.monotonic() < until:  # ASGI counts after it has answered
            time.sleep(0.001)
        after = app.metrics._requests
        counted.append({key: after[key] - before.get(key, 0) for key in after if after[key] != before.get(key, 0)})

    assert found[0] == found[1]
    assert counted[0] == counted[1]
    assert len(counted[0]) == 1
    assert app.in_flight == 0


def test_answers_come_in_the_order_of_requests_whichever_way_they_go(server: Server) -> None:
    health = b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n"
    first, third = (asked("/v1/predict", json.dumps({"remark": said}).encode(), JSON) for said in ("one", "three"))

    found = answers(server, first + health + third + health + first, 5)

    said = [json.loads(body).get("said", "health") for _, _, body in found]
    assert said == ["one", "health", "three", "health", "one"]


def test_a_body_in_pieces_is_one_body(server: Server) -> None:
    request = asked("/v1/predict", b'{"remark": "in pieces"}', JSON)
    with socket.create_connection(("127.0.0.1", server.port), 10) as caller:
        for place in range(0, len(request), 40):
            caller.sendall(request[place : place + 40])
            time.sleep(0.002)
        assert b"in pieces" in caller.recv(2**16)


def test_whoever_asks_for_the_end_of_a_connection_gets_it(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), 10) as caller:
        caller.sendall(asked("/v1/predict", b'{"remark": "a"}', JSON, "connection: close"))
        held = b""
        while more := caller.recv(2**16):
            held += more
    assert held.startswith(b"HTTP/1.1 200")


def test_whoever_goes_away_leaves_the_queue(hollow_bundle: Path) -> None:
    batching = {"slo_seconds": 5.0, "timeout_seconds": 10.0, "refuse_late": False, "max_batch": 1}
    backend = Slow(seconds=0.3)
    wanted = [Wanted("colours", "1", hollow_bundle)]
    with serving(wanted, workers=lambda _: ThreadWorkers(lambda: backend), batching=batching) as server:
        request = asked("/v1/predict", b'{"remark": "a"}', JSON)
        callers = [socket.create_connection(("127.0.0.1", server.port), 10) for _ in range(4)]
        for caller in callers:
            caller.sendall(request)
        (version,) = server.running.models.all
        until = time.monotonic() + 5
        while len(version.engine.batcher) < 3 and time.monotonic() < until:
            time.sleep(0.001)
        for caller in callers[1:]:
            caller.close()
        assert b"200 OK" in callers[0].recv(2**16)
        callers[0].close()
        while server.running.app.in_flight and time.monotonic() < until:
            time.sleep(0.001)
        assert server.running.app.in_flight == 0
        assert len(version.engine.batcher) == 0
    assert len(backend.batches) == 1
