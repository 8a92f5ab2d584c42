import asyncio
import contextlib
import random
import time
from pathlib import Path

import pytest
from serving import Slow, serving

from dougong.core.errors import ConfigError, RunError
from dougong.serve.loadtest import Asker, LoadConfig, LoadResult, draw_load, load_test, made_up, read_mix, run_load
from dougong.serve.models import Wanted
from dougong.serve.workers import ThreadWorkers

PATIENT = {"slo_seconds": 1.0, "refuse_late": False}


def test_a_load_comes_when_it_was_to_come_and_is_drawn(hollow_bundle: Path, tmp_path: Path) -> None:
    wanted = [Wanted("colours", "1", hollow_bundle)]
    with serving(wanted, workers=lambda _: ThreadWorkers(Slow), batching=PATIENT) as server:
        config = LoadConfig(url=server.url, rates=(60.0, 120.0), seconds=0.7, mix="photo+remark=3,clip=1")
        slower, faster = load_test(config)
        mistaken = LoadConfig(url=server.url, mix="smell=1")
        with pytest.raises(ConfigError, match="the model reads no 'smell'"):
            load_test(mistaken)
        other = LoadConfig(url=server.url, model="other")
        with pytest.raises(ConfigError, match="--model other is not served there. Use one of colours"):
            load_test(other)
    draw_load([slower, faster], tmp_path / "load.svg")

    assert 20 < slower.sent < faster.sent < 130
    assert slower.statuses == {"200": slower.sent}
    assert slower.answered_per_second <= slower.sent / 0.7 + 1e-9
    assert 0.002 <= slower.quantiles["0.5"] <= slower.quantiles["0.99"] < 2
    assert (tmp_path / "load.svg").stat().st_size > 1000


def test_a_server_that_stands_still_is_charged_for_all_who_would_have_asked() -> None:
    """40 a second over one connection, and every answer takes a tenth of a second."""

    ended = asyncio.Event()

    async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n{}"):
                await asyncio.sleep(0.1)
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        writer.close()
        ended.set()

    async def whole() -> float:
        server = await asyncio.start_server(slowly, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        asker = Asker(f"http://127.0.0.1:{port}", most=1)
        request = asker.frame("/", b"{}", "application/json")
        found = await run_load(asker, [request], 40.0, 0.5, 0.15, 1)
        asker.close()
        await ended.wait()
        server.close()
        await server.wait_closed()
        assert found.most_waiting > 3
        return found.quantiles["0.9"]

    assert asyncio.run(whole()) > 0.7  # 100 milliseconds is what each took from its sending


def test_an_asker_that_cannot_keep_up_says_so() -> None:
    async def whole() -> LoadResult:
        async def at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.IncompleteReadError):
                while await reader.readuntil(b"\r\n\r\n{}"):
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            writer.close()

        server = await asyncio.start_server(at_once, "127.0.0.1", 0)
        asker = Asker(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", most=4)
        request = asker.frame("/", b"{}", "application/json")
        found = await run_load(asker, [request], 100.0, 0.3, 0.15, 1, seen=lambda *_: time.sleep(0.05))
        asker.close()
        await asyncio.sleep(0.05)
        server.close()
        await server.wait_closed()
        return found

    assert asyncio.run(whole()).behind_quantile > 0.1  # about thirty, of 50 milliseconds each, in 300


def test_an_answer_in_chunks_is_read_whole_and_the_next_one_too() -> None:
    pieces = [
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nab",
        b"c\r\nA;x=y\r\n0123456789\r\n0",
        b"\r\n\r\n",
    ]

    async def whole() -> list[tuple[int, bytes]]:
        async def in_pieces(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.IncompleteReadError):
                while await reader.readuntil(b"\r\n\r\n{}"):
                    for piece in pieces:
                        writer.write(piece)
                        await asyncio.sleep(0.01)
            writer.close()

        server = await asyncio.start_server(in_pieces, "127.0.0.1", 0)
        asker = Asker(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", most=1)
        found = [await asker.ask(asker.frame("/", b"{}", "application/json")) for _ in range(2)]
        asker.close()
        await asyncio.sleep(0.05)
        server.close()
        await server.wait_closed()
        return found

    assert asyncio.run(whole()) == [(200, b"abc0123456789")] * 2


def test_who_is_not_there_or_is_no_server_is_told() -> None:
    with pytest.raises(RunError, match="no server answers at http://127.0.0.1:9"):
        load_test(LoadConfig(url="http://127.0.0.1:9"))
    with pytest.raises(ValueError, match="is no address of a server"):
        LoadConfig(url="ftp://x")


def test_mixes() -> None:
    assert read_mix(None, ["a", "b"]) == {("a", "b"): 1.0}
    assert read_mix("a+b=3, b", ["a", "b"]) == {("a", "b"): 3.0, ("b",): 1.0}
    for text, reason in (("a=x", "'x' is no weight"), ("a=0", "no weight above 0"), ("a=-1,b=1", "no weight above 0")):
        with pytest.raises(ConfigError, match=reason):
            read_mix(text, ["a", "b"])


def test_made_up_media_can_be_read() -> None:
    from dougong.data.modality.audio import AudioConfig, AudioModality
    from dougong.data.modality.image import ImageConfig, ImageModality

    dice = random.Random(0)
    picture, sound = made_up("image", dice), made_up("audio", dice)

    assert ImageModality(ImageConfig(column="x")).decode((picture,), Path(".")).shape == (64, 64, 3)
    assert len(AudioModality(AudioConfig(column="x", sample_rate=8000)).decode((sound,), Path("."))) >= 4000
