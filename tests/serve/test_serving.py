"""The whole of it: `dougong serve` in a process of its own, with a model that was trained."""

import base64
import contextlib
import http.client
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import dougong
from dougong.cli.main import main

Records = Callable[..., list[dict[str, Any]]]


class Process:
    """A server that was started as a user starts it."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port

    def ask(self, path: str, body: bytes, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("POST", path, body, {"content-type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            content = answer.read()
            return answer.status, json.loads(content)
        finally:
            connection.close()

    def workers(self) -> list[int]:
        """Processes that were forked from the one that holds the model."""
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                except OSError:
                    continue
                children.setdefault(parent, []).append(int(entry.name))
        return [pid for holder in children.get(self.process.pid, []) for pid in children.get(holder, [])]


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Process]:
    command = [sys.executable, "-m", "dougong", "serve", f"colours={folder}", "--port", "0", "--json", "--quiet"]
    command += ["--slo", "2s", "--timeout", "10s"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "it did not start"
        yield Process(process, int(json.loads(line)["url"].rsplit(":", 1)[1]))
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="module")
def server(colour_run: Path) -> Iterator[Process]:
    with started(colour_run) as process:
        yield process


def as_json(row: Mapping[str, Any]) -> bytes:
    plain = {
        name: base64.b64encode(cell["bytes"]).decode() if isinstance(cell, dict) else cell
        for name, cell in row.items()
        if name != "colour"
    }
    return json.dumps(plain).encode()


def test_answers_are_those_of_prediction(server: Process, colour_run: Path, records: Records) -> None:
    rows = records(12, seed=4, missing=0.3)
    expected = dougong.load(colour_run / "bundle").predict([{**row, "colour": None} for row in rows])

    for row, wanted in zip(rows, expected, strict=True):
        status, found = server.ask("/v1/predict", as_json(row))
        assert status == 200, found
        assert (found["answer"], tuple(found["absent"])) == (wanted.answer, wanted.absent)
        assert found["probabilities"] == pytest.approx(wanted.probabilities, abs=1e-4)
        assert found["gate"] == pytest.approx(wanted.gate, abs=1e-4)

    status, found = server.ask("/v1/predict", b'{"records": [%s]}' % b",".join(map(as_json, rows)))
    assert [each["answer"] for each in found["answers"]] == [each.answer for each in expected]


def test_tensors_hold_the_same_answers(server: Process, colour_run: Path, records: Records) -> None:
    rows = records(4, seed=5, missing=0.0)
    expected = dougong.load(colour_run / "bundle").predict([{**row, "colour": None} for row in rows])
    photos = b"".join(struct.pack("<I", len(row["photo"]["bytes"])) + row["photo"]["bytes"] for row in rows)
    kinds = {name: "BYTES" for name in rows[0] if name != "colour"}
    inputs: list[dict[str, Any]] = []
    content = b""
    for name in kinds:
        values = [row[name] for row in rows]
        if name == "photo":
            part, kind = photos, "BYTES"
        elif isinstance(values[0], dict):
            part = b"".join(struct.pack("<I", len(cell["bytes"])) + cell["bytes"] for cell in values)
            kind = "BYTES"
        elif isinstance(values[0], str):
            part = b"".join(struct.pack("<I", len(cell.encode())) + cell.encode() for cell in values)
            kind = "BYTES"
        else:
            part, kind = struct.pack(f"<{len(values)}d", *values), "FP64"
        content += part
        parameters = {"binary_data_size": len(part)}
        inputs.append({"name": name, "datatype": kind, "shape": [4], "parameters": parameters})
    head = json.dumps({"inputs": inputs, "outputs": [{"name": "answer"}, {"name": "probabilities"}]}).encode()

    length = {"inference-header-content-length": str(len(head))}
    status, found = server.ask("/v2/models/colours/infer", head + content, length)

    assert status == 200, found
    answer, probabilities = found["outputs"]
    assert answer["data"] == [each.answer for each in expected]
    assert probabilities["shape"] == [4, 3]
    first = dict(zip(expected[0].probabilities, probabilities["data"][:3], strict=True))
    assert first == pytest.approx(expected[0].probabilities, abs=1e-4)


def test_what_the_model_looked_at_comes_with_its_answer(server: Process, records: Records) -> None:
    status, found = server.ask("/v1/predict?explain=true", as_json(records(1, seed=6, missing=0.0)[0]))

    assert status == 200, found
    photo, remark = found["attention"]["photo"], found["attention"]["remark"]
    rows, columns = photo["grid"]
    assert len(photo["weights"]) >= rows * columns > 1
    assert sum(photo["weights"]) == pytest.approx(1.0, abs=1e-3)
    assert len(remark["tokens"]) == len(remark["weights"]) > 2


def test_a_record_that_cannot_be_read_gets_its_reason(server: Process) -> None:
    for content in (b"no picture", _bomb()):
        status, found = server.ask("/v1/predict", json.dumps({"photo": base64.b64encode(content).decode()}).encode())
        assert status == 422
        assert found["error"].startswith("photo: ")
    status, found = server.ask("/v1/predict", b'{"remark": "is it?"}', {"accept": "text/event-stream"})
    assert (status, "writes no words" in found["error"]) == (415, True)


def _bomb() -> bytes:
    """A PNG file of a few bytes that claims 3.6 gigapixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


def test_a_killed_worker_is_replaced_and_its_requests_are_answered(server: Process, records: Records) -> None:
    body = as_json(records(1, seed=7, missing=0.0)[0])
    found, ended = list[int](), threading.Event()

    def ask_on() -> None:
        while not ended.is_set():
            found.append(server.ask("/v1/predict", body)[0])

    threads = [threading.Thread(target=ask_on) for _ in range(3)]
    for thread in threads:
        thread.start()
    (before,) = server.workers()
    time.sleep(0.2)
    os.kill(before, signal.SIGKILL)
    started = time.monotonic()
    while server.workers() in ([], [before]) and time.monotonic() - started < 10:
        time.sleep(0.01)
    assert server.ask("/v1/predict", body)[0] == 200
    took = time.monotonic() - started
    ended.set()
    for thread in threads:
        thread.join()

    assert took < 5
    assert set(found) == {200}


def test_after_sigterm_nothing_is_lost_and_nothing_is_left(server: Process, records: Records) -> None:
    body = as_json(records(1, seed=8, missing=0.0)[0])
    lost, answered, ended = list[str](), list[int](), threading.Event()

    def ask_on() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        while not ended.is_set():
            try:
                connection.request("POST", "/v1/predict", body, {"content-type": "application/json"})
            except ConnectionRefusedError:
                break  # the port is closed: it was not taken, and nothing was lost
            try:
                answer = connection.getresponse()
                answer.read()
                answered.append(answer.status)
            except (OSError, http.client.HTTPException) as error:
                lost.append(repr(error))
                break
            if answered[-1] == 200 and answer.getheader("connection") == "close":
                break  # as a caller that has read that it ends
        connection.close()

    threads = [threading.Thread(target=ask_on) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    workers = server.workers()
    server.process.terminate()
    server.process.wait(20)
    ended.set()
    for thread in threads:
        thread.join()

    assert lost == []
    assert len(answered) > 4
    assert set(answered) == {200}
    assert server.process.returncode == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_mistakes_are_told_in_one_line(colour_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, reason in (
        (["serve", str(tmp_path)], "is no bundle"),
        (["serve", str(colour_run), "--slo", "fast"], "'fast' is no time. Write for example 5ms"),
        (["serve", str(colour_run), "--host", "0.0.0.0"], "nobody would need a key"),
        (["serve", f"a b={colour_run}"], "cannot name a model"),
        (["serve", f"a={colour_run}", f"a:1={colour_run}"], "has a version 1 already"),
        (["serve", str(colour_run), "--keys", str(tmp_path / "none")], "cannot be read"),
        (["serve", str(colour_run), "--timeout", "10ms"], "is below slo_seconds"),
        (["loadtest", "http://127.0.0.1:9"], "no server answers"),
        (["loadtest", "http://127.0.0.1:9", "--picture", "a.txt"], "is no .png"),
        (["loadtest", "nowhere"], "is no address of a server"),
        (["loadtest", "http://127.0.0.1:9", "--rate", "0"], "must be above 0"),
    ):
        assert main(arguments) == 2, arguments
        said = capsys.readouterr().err.strip()
        assert reason in said
        assert "\n" not in said


@pytest.mark.slow
def test_an_export_is_served_and_its_workers_outlive_its_folder(
    colour_run: Path, records: Records, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    from dougong.compress.export import Source, export

    folder = export(Source(dougong.load(colour_run / "bundle")), tmp_path / "export", "openvino")
    rows = records(6, seed=14, missing=0.3)
    expected = dougong.load(folder).predict([{**row, "colour": None} for row in rows])

    wanted = [(200, each.answer, pytest.approx(each.confidence, abs=1e-4)) for each in expected]

    def answers(server: Process) -> list[Any]:
        found = [server.ask("/v1/predict", as_json(row)) for row in rows]
        return [(status, said.get("answer"), said.get("confidence")) for status, said in found]

    with started(folder) as server:
        assert answers(server) == wanted
        status, said = server.ask("/v1/predict?explain=true", as_json(rows[0]))
        assert (status, said["answer"], said["attention"]) == (200, expected[0].answer, {})
        assert "an export's inner values stay inside its engine" in said["not_shown"]

        shutil.rmtree(folder)
        (worker,) = server.workers()
        os.kill(worker, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while (found := answers(server)) != wanted and time.monotonic() < deadline:
            time.sleep(0.2)
        assert found == wanted
        assert server.workers() != [worker]
