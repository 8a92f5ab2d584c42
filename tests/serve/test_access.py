import asyncio
import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from dougong.core.config import parse
from dougong.serve import fetching
from dougong.serve.access import Access, key_of
from dougong.serve.app import App
from dougong.serve.columns import BadRequest, Fetch
from dougong.serve.engine import Refused
from dougong.serve.metrics import Metrics
from dougong.serve.models import Models
from dougong.serve.settings import KeyConfig, ServeConfig


def access(**settings: float) -> Access:
    sums = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("one", "two")}
    return Access([KeyConfig(name=name, sha256=digest, **settings) for name, digest in sums.items()])  # type: ignore[arg-type]


def test_a_key_is_its_caller_and_nothing_else_is() -> None:
    known = access()

    caller = known.caller(b"two", "10.0.0.1")
    assert caller is not None
    assert (caller.name, caller.admin) == ("two", False)
    for key in (None, b"", b"three", hashlib.sha256(b"two").hexdigest().encode()):
        assert known.caller(key, "10.0.0.1") is None


def test_a_caller_has_its_rate_and_another_its_own() -> None:
    known = access(per_second=10.0, burst=2)
    one, two = known.caller(b"one", ""), known.caller(b"two", "")
    assert one is not None
    assert two is not None

    assert [known.wait_seconds(one, 100.0) for _ in range(2)] == [0.0, 0.0]
    assert known.wait_seconds(one, 100.0) == pytest.approx(0.1)
    assert known.wait_seconds(two, 100.0) == 0.0
    assert known.wait_seconds(one, 100.11) == 0.0
    assert known.wait_seconds(one, 100.12) > 0


def test_where_a_key_stands() -> None:
    assert key_of(b"Bearer  abc", None) == b"abc"
    assert key_of(b"Basic abc", None) is None
    assert key_of(b"Bearer abc", b"xyz") == b"xyz"


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example/a.png",
        "file:///etc/passwd",
        "http://user@good.example/a",
        "http://good.example:x/a",
        "gopher://good.example/",
    ],
)
def test_only_named_hosts_are_fetched_from(url: str) -> None:
    with pytest.raises(BadRequest, match="host|port"):
        fetching._fetch(url, frozenset({"good.example"}), 100)


@pytest.fixture
def dripping(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of something that never ends its answer, and says no length."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ended = threading.Event()

        def drip() -> None:
            connection, _ = listening.accept()
            with connection, contextlib.suppress(OSError):
                connection.recv(1000)
                connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n")
                while not ended.wait(0.05):
                    connection.sendall(b".")

        thread = threading.Thread(target=drip)
        thread.start()
        port = listening.getsockname()[1]
        monkeypatch.setattr(fetching, "public_address", lambda host, port: ("127.0.0.1", port))
        monkeypatch.setattr(fetching, "SECONDS", 0.3)
        yield f"http://good.example:{port}/a"
        ended.set()
        thread.join(5)


def test_who_drips_is_cut_off_and_half_a_file_is_none(dripping: str) -> None:
    started = time.monotonic()

    with pytest.raises(BadRequest, match="could not be fetched"):
        fetching._fetch(dripping, frozenset({"good.example"}), 10_000)

    assert time.monotonic() - started < 2


def test_media_of_one_request_have_one_limit_of_bytes_and_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []

    async def some_bytes(url: str, allowed: Any, most_bytes: int) -> bytes:
        limits.append(most_bytes)
        await asyncio.sleep(60 if url.endswith("slow") else 0)
        return bytes(40)

    monkeypatch.setattr("dougong.serve.app.fetch", some_bytes)
    batching = {"slo_seconds": 0.05, "timeout_seconds": 0.2}
    values = {"limits": {"body_bytes": 100}, "fetch_from": ["good.example"], "batching": batching}
    config = parse(ServeConfig, values, where="test")

    async def fetched(*ends: str) -> Any:
        app = App(config, Models(config), Metrics())
        return await app._fetched([{"photo": Fetch(f"http://good.example/{end}"), "weight": 1} for end in ends], None)

    found = asyncio.run(fetched("a", "b"))
    assert found == [{"photo": {"bytes": bytes(40), "path": None}, "weight": 1}] * 2
    assert limits == [100, 60]
    with pytest.raises(Refused, match="expired"):
        asyncio.run(fetched("a", "slow"))


@pytest.mark.parametrize("address", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "0.0.0.0", "fd00::1"])
def test_a_name_that_leads_home_is_not_fetched(address: str) -> None:
    with pytest.raises(BadRequest, match="no public address"):
        fetching.public_address(address, 80)
