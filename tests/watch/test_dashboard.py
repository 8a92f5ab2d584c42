import asyncio
import json
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dougong.cli.main import main
from dougong.core.errors import ConfigError, RunError
from dougong.core.events import Evaluated, EventFile, RunStarted, StepDone
from dougong.watch import runs
from dougong.watch.behind import Behind
from dougong.watch.diagnose import rules
from dougong.watch.runs import Reader, Runs, thinned

pytest.importorskip("fastapi")
from dougong.watch.dashboard import build_app

TOKEN = "a-token-nobody-guesses"


def write(folder: Path, steps: int, *, first: int = 0) -> None:
    file = EventFile(folder / "events.jsonl", resume_at=first if first else None)
    if not first:
        file(RunStarted(step=0, total_steps=steps, precision="fp32", num_parameters=9, resumed=False))
    for step in range(first, steps):
        file(
            StepDone(
                step=step + 1, loss=2.0 / (step + 1), grad_norm=1.0, learning_rate=0.1, num_records=8, epoch=0,
                seconds=0.01, wait_seconds=0.0,
            )
        )  # fmt: skip
    file(
        Evaluated(
            step=steps,
            split="validation",
            condition="<b>all</b>",
            metrics={"accuracy": 0.5},
            num_records=9,
            seconds=0.1,
        )
    )
    file.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("all")
    write(root / "one", 30)
    write(root / "group" / "two", 50)
    return root


def get(
    app: Any, path: str, *, host: str = "localhost:8765", query: str = "", cookie: str = ""
) -> tuple[int, dict[str, str], str]:
    """One request to an ASGI application."""
    sent: list[Any] = []
    headers = [(b"host", host.encode()), *([(b"cookie", cookie.encode())] if cookie else [])]
    scope = {
        "type": "http", "method": "GET", "path": path, "raw_path": path.encode(), "query_string": query.encode(),
        "headers": headers, "http_version": "1.1", "scheme": "http", "server": ("localhost", 8765),
        "client": ("127.0.0.1", 1), "root_path": "", "asgi": {"version": "3.0"},
    }  # fmt: skip

    async def ask() -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, send)

    asyncio.run(ask())
    given = {key.decode().lower(): value.decode() for key, value in sent[0]["headers"]}
    return sent[0]["status"], given, b"".join(part.get("body", b"") for part in sent[1:]).decode()


def listed(app: Any) -> tuple[int, int]:
    """Of the only run: its step, and how many findings there are."""
    (run,) = json.loads(get(app, "/api/runs")[2])
    return run["step"], run["findings"]


def soon(ask: Callable[[], Any], wanted: object) -> Any:
    """What is told in the end."""
    until = time.monotonic() + 20
    while (told := ask()) != wanted and time.monotonic() < until:
        time.sleep(0.01)
    return told


def test_runs_are_listed_and_shown(folder: Path) -> None:
    app = build_app(folder)

    status, headers, page = get(app, "/")
    assert status == 200
    assert "default-src 'none'" in headers["content-security-policy"]
    assert not re.search(r"(src|href)=\"(https?:)?//", page)
    runs = json.loads(get(app, "/api/runs")[2])
    assert [(run["name"], run["step"]) for run in runs] == [("group/two", 50), ("one", 30)]
    curves = json.loads(get(app, "/api/curves", query="run=one")[2])
    assert curves["loss"][-1][0] == 30
    status, _, view = get(app, "/view", query="run=group/two")
    assert status == 200
    assert "<b>all</b>" not in view
    assert "&lt;b&gt;all" in view
    assert "<!DOCTYPE html>" in get(app, "/export", query="run=one")[2]


@pytest.mark.parametrize("name", ["none", "../all", "/etc", "one/../../x", ""])
def test_no_path_leads_out_of_the_folder(folder: Path, name: str) -> None:
    app = build_app(folder)

    for path in ("/view", "/api/curves", "/records", "/export"):
        assert get(app, path, query=f"run={name}")[0] == 404


def test_who_does_not_know_the_token_is_not_answered(folder: Path) -> None:
    app = build_app(folder, host="0.0.0.0", token=TOKEN)

    assert get(app, "/")[0] == 401
    assert get(app, "/api/runs", query="token=wrong-but-long-enough")[0] == 401
    status, headers, _ = get(app, "/", query=f"token={TOKEN}")
    assert status == 200
    assert "httponly" in headers["set-cookie"].lower()
    assert get(app, "/api/runs", cookie=f"dougong_token={TOKEN}")[0] == 200


def test_another_name_for_this_machine_is_refused(folder: Path) -> None:
    assert get(build_app(folder), "/", host="evil.example:8765")[0] == 421


def test_what_cannot_be_served_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can be reached by others"):
        build_app(folder, host="0.0.0.0")
    with pytest.raises(ConfigError, match="can be guessed"):
        build_app(folder, token="short")
    with pytest.raises(RunError, match="is no folder"):
        build_app(tmp_path / "nowhere")


def test_a_run_is_read_on_while_it_grows_and_anew_after_a_resume(tmp_path: Path) -> None:
    write(tmp_path, 10)
    reader = Reader(tmp_path)
    assert reader.read()
    assert not reader.read()
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"kind": "StepDone", "step": 11, "lo')
    assert not reader.told()["step"] > 10 or reader.read()
    assert reader.told()["step"] == 10
    write(tmp_path, 8, first=4)
    reader.read()
    assert reader.told()["step"] == 8
    assert list(reader.steps) == list(range(1, 9))


def test_a_figure_that_nobody_could_find_hides_no_run(folder: Path) -> None:
    event = {"kind": "Evaluated", "step": 30, "time": 31.0, "split": "validation", "condition": "words, picture"}
    figures = {"recall_at_10": float("nan"), "chance_at_10": 0.25}
    with (folder / "one" / "events.jsonl").open("a") as file:
        file.write(json.dumps({**event, "metrics": figures, "num_records": 40, "seconds": 1.0}) + "\n")

    status, _, answer = get(build_app(folder), "/api/runs")

    assert status == 200
    told = {run["name"]: run["metrics"] for run in json.loads(answer)}
    assert told["one"] == {"recall_at_10": None, "chance_at_10": 0.25}


def test_a_peak_is_seen_however_many_steps_there_are() -> None:
    losses = [1.0] * 100_000
    losses[54_321] = 9.0

    found = thinned(range(100_000), losses, 400)

    assert len(found) == 400
    assert max(point[3] or 0.0 for point in found) == 9.0


def test_what_the_first_records_said_and_the_noise_are_shown(tmp_path: Path) -> None:
    write(tmp_path, 3)
    with (tmp_path / "events.jsonl").open("a", encoding="utf-8") as file:
        at = {f"at {shift}": 0.31 if shift == -1 else 0.02 for shift in (-2, -1, 0, 1, 2)}
        told = {"<i>tone</i>": {**at, "right": 0.2, "chance": 0.04}}
        flow = {"places": [], "activations": {}, "attention": [], "inputs": {}, "output": {}, "targets": {}, "gate": {},
                "loss_terms": [], "dropout": {}, "optimizer": {}, "probes": {}, "first_not_finite": None,
                "facts": {}, "seconds": 0.0}  # fmt: skip
        for event in (
            {"kind": "FlowMeasured", "step": 3, "time": 1.0, **flow},
            {"kind": "Examined", "step": 3, "time": 1.0, "rows": 96, "pairs": told, "still_norms": []},
            {"kind": "NoiseMeasured", "step": 3, "time": 1.0, "window": 8, "signal": 1.0, "noise": 4.5, "batches": 4.5},
        ):
            file.write(json.dumps(event) + "\n")

    page = get(build_app(tmp_path), "/view", query="run=.")[2]

    assert "&lt;i&gt;tone" in page
    assert "in the first 96 records" in page
    table = page[page.index("Whether inputs belong to their targets") :]
    assert re.findall(r'class="n">([^<]+)</th>', table)[:6] == ["-2", "-1", "own", "+1", "+2", "chance"]
    assert re.findall(r'<td class="n">([^<]+)</td>', table)[:6] == ["0.02", "0.31", "0.02", "0.02", "0.02", "0.04"]
    assert "4.5 batches would have to be put together" in page
    assert "A modality belongs to other records" in page


def test_who_pulls_against_whom_and_how_large_numbers_are_is_shown_of_the_last_that_were_counted(
    tmp_path: Path,
) -> None:
    write(tmp_path, 3)
    with (tmp_path / "events.jsonl").open("a", encoding="utf-8") as file:
        flow = {"places": [], "activations": {}, "attention": [], "inputs": {}, "output": {}, "targets": {}, "gate": {},
                "loss_terms": [], "dropout": {}, "optimizer": {}, "probes": {}, "first_not_finite": None,
                "facts": {}, "seconds": 0.0}  # fmt: skip
        row = {"of": "objectives", "one": "<b>decision", "other": "alignment", "cosine": -0.25,
               "one_norm": 2.0, "other_norm": 0.5}  # fmt: skip
        numbers = {"lowest": -26, "counts": [1, 0, 0, 3], "zeros": 4, "not_finite": 0}
        counted = {"conflicts": [row], "exponents": {"gradients": {"photo": numbers}}}
        for event in (
            {"kind": "FlowMeasured", "step": 2, "time": 1.0, **flow, **counted},
            {"kind": "FlowMeasured", "step": 3, "time": 1.0, **flow, "conflicts": [], "exponents": {}},
        ):
            file.write(json.dumps(event) + "\n")

    page = get(build_app(tmp_path), "/view", query="run=.")[2]

    against = page[page.index("Who pulls against whom") : page.index("How large numbers are")]
    assert "Step 2:" in against
    assert "&lt;b&gt;decision" in against
    assert re.findall(r'<td class="n">([^< ]+)', against) == ["-0.25", "2", "0.5"]
    assert ">against<" in against
    large = page[page.index("How large numbers are") :]
    # One of four numbers that are not 0 lies below 2^-24.
    assert re.findall(r'<td class="n">(?:2<sup>)?([^<]+)', large)[:3] == ["-23", "50.0 %", "25.00 %"]
    assert 'id="range-gradients' in large or "Share of gradients by exponent" in large


def test_who_asks_for_a_run_that_has_grown_is_not_kept_waiting(tmp_path: Path) -> None:
    write(tmp_path, 5)
    reader, drawn, asked = Reader(tmp_path), [], threading.Event()
    go_on = threading.Event()

    def draw(one: Reader, run: str) -> str:
        drawn.append(one.offset)
        if len(drawn) > 1:
            asked.set()
            assert go_on.wait(20)
        return f"{run} at {one.told()['step']}"

    pages = Behind(draw, ThreadPoolExecutor(1), 4)
    reader.read()
    assert pages.get(reader, "mine") == "mine at 5"
    assert pages.get(reader, "mine") == "mine at 5"
    assert len(drawn) == 1
    write(tmp_path, 9, first=5)
    reader.read()

    assert pages.get(reader, "mine") == "mine at 5"  # while it is drawn behind
    assert asked.wait(20)
    assert pages.get(reader, "mine") == "mine at 5"
    assert len(drawn) == 2
    go_on.set()
    assert soon(lambda: pages.get(reader, "mine"), "mine at 9") == "mine at 9"


def test_what_fails_behind_is_told_to_who_asks_next(tmp_path: Path) -> None:
    write(tmp_path, 5)
    reader = Reader(tmp_path)
    reader.read()

    def draw(one: Reader, run: str) -> str:
        if one.told()["step"] > 5:
            raise ValueError("cannot be drawn")
        return "drawn"

    with ThreadPoolExecutor(1) as worker:
        pages = Behind(draw, worker, 4)
        assert pages.get(reader, "mine") == "drawn"
        write(tmp_path, 9, first=5)
        reader.read()
        pages.get(reader, "mine")
    with pytest.raises(ValueError, match="cannot be drawn"):
        pages.get(reader, "mine")


def test_the_list_does_not_wait_for_a_run_to_be_judged_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 5)
    go_on = threading.Event()
    app = build_app(tmp_path)
    assert listed(app) == (5, 0)

    def slow(history: Any) -> list[rules.Finding]:
        assert go_on.wait(20)
        return [rules.Finding("loss_not_finite", "loss", 1.0, "", history.steps[-1])]

    monkeypatch.setattr(runs, "diagnose", slow)
    write(tmp_path, 9, first=5)

    assert listed(app) == (9, 0)  # had it to be judged first, it would wait, and fail
    assert json.loads(get(app, "/api/curves", query="run=.")[2])["loss"][-1][0] == 9
    go_on.set()
    assert soon(lambda: listed(app), (9, 1)) == (9, 1)


def test_who_reads_on_waits_while_curves_are_copied(tmp_path: Path) -> None:
    """numpy lets other threads go on while it copies an array, which then cannot grow (BufferError)."""
    write(tmp_path, 5)
    reader = Reader(tmp_path)
    reader.read()
    faults: list[Exception] = []
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            try:
                curves = reader.curves()
                assert curves["loss"][-1][0] == curves["learning rate"][-1][0]
                reader.told()
            except Exception as error:
                faults.append(error)
                return

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    try:
        line = json.dumps({"kind": "StepDone", "loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1, "seconds": 0.1})
        with (tmp_path / "events.jsonl").open("a", encoding="utf-8", buffering=1) as file:
            for start in range(6, 20_006, 500):
                file.write("".join(f'{line[:-1]}, "step": {step}}}\n' for step in range(start, start + 500)))
                reader.read()
    finally:
        ended.set()
        for asker in askers:
            asker.join(20)

    assert not faults
    assert reader.told()["step"] == 20_005


def test_a_run_that_was_resumed_while_nobody_looked_is_read_anew(tmp_path: Path) -> None:
    write(tmp_path, 10)
    reader = Reader(tmp_path)
    reader.read()
    write(tmp_path, 40, first=4)  # by now the file is longer than it was

    assert reader.read()
    assert list(reader.steps) == list(range(1, 41))


def test_a_line_that_no_training_wrote_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 4)
    with (tmp_path / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"a": 1}\n[3]\nno json}\n{"kind": "StepDone", "step": 5}\n{"kind": "FlowMeasured", ...}\n')
    write_more = '{"kind": "StepDone", "step": 5, "loss": 1, "grad_norm": 1, "learning_rate": 1, "seconds": 1}\n'
    with (tmp_path / "events.jsonl").open("a", encoding="utf-8") as file:
        file.write(write_more)
    reader = Reader(tmp_path)
    reader.read()

    assert list(reader.steps) == [1, 2, 3, 4, 5]
    assert len(reader.losses) == 5
    assert reader.flows == []


def test_of_many_measured_steps_only_those_that_are_shown_are_parsed(tmp_path: Path) -> None:
    write(tmp_path, 2)
    with (tmp_path / "events.jsonl").open("a", encoding="utf-8") as file:
        for step in range(100):
            # Were one of the middle parsed, it would be an error.
            rest = "}" if step < 12 or step >= 88 else ", broken}"
            file.write(f'{{"kind": "FlowMeasured", "step": {step}{rest}\n')
    reader = Reader(tmp_path)
    reader.read()

    assert [flow["step"] for flow in reader.flows] == [*range(12), *range(88, 100)]
    assert reader.num_flows == 100


def test_a_folder_that_is_a_run_is_its_own(tmp_path: Path) -> None:
    write(tmp_path, 3)

    assert Runs(tmp_path).names() == ["."]
    assert Runs(tmp_path).get(".").told()["step"] == 3


def test_a_runs_page_stands_alone(colour_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "run.html"

    assert main(["watch", str(colour_run), "--out", str(page), "--json"]) == 0

    told = json.loads(capsys.readouterr().out)
    written = page.read_text(encoding="utf-8")
    assert told["run"]["step"] == 60
    assert "<script" not in written
    assert "Gradient flow" in written
    assert written.startswith("<!DOCTYPE html>")
