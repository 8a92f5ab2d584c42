"""What passes between Ray's proxy and the application, without Ray."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from dougong.core.errors import ConfigError
from dougong.serve.ray_serve import app as of_configuration
from dougong.serve.ray_serve import through

pytest.importorskip("starlette")


class Given:
    """A request as Ray hands it over."""

    scope: dict[str, Any] = {"type": "http"}

    async def body(self) -> bytes:
        return b"asked"


async def answered(app: Any) -> tuple[int, list[tuple[bytes, bytes]], list[bytes]]:
    """Status, headers and the pieces that a proxy would send on."""
    response = await through(app, Given())
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        await asyncio.sleep(60)

    await response({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)
    return sent[0]["status"], sent[0]["headers"], [each["body"] for each in sent[1:] if each["body"]]


def test_a_cluster_that_everybody_can_reach_has_keys(hollow_bundle: Path) -> None:
    with pytest.raises(ConfigError, match="nobody would need a key"):
        of_configuration({"bundles": [str(hollow_bundle)]})


def test_a_whole_answer_is_passed_on_as_it_is() -> None:
    ended = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        headers = [(b"content-length", b"10"), (b"x-request-id", b"mine")]
        await send({"type": "http.response.start", "status": 422, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(body.decode()).encode() + b"..."})
        ended.append(True)

    status, headers, pieces = asyncio.run(answered(app))

    assert (status, pieces) == (422, [b'"asked"...'])
    assert (b"x-request-id", b"mine") in headers
    assert ended == [True]


def test_words_are_passed_on_while_they_are_written() -> None:
    async def run() -> list[bytes]:
        heard = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            head = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": head})
            for word in (b"a", b"red", b"circle"):
                await send({"type": "http.response.body", "body": word, "more_body": True})
                await heard.wait()  # before anybody has heard the first word there is no second one
            await send({"type": "http.response.body", "body": b""})

        response, found = await through(app, Given()), []
        async with asyncio.timeout(10):
            async for piece in response.body_iterator:
                found.append(piece)
                heard.set()
        return found

    assert [piece for piece in asyncio.run(run()) if piece] == [b"a", b"red", b"circle"]


def test_an_application_that_fails_is_no_silence() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        asyncio.run(answered(app))
