import json
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dougong.cli.main import main


def output(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, object]:
    assert main([str(argument) for argument in arguments]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_a_table_goes_the_whole_way_by_commands(
    colour_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", "vqa", "--set", "train.steps=4"]) == 0
    assert "steps: 4\n" in capsys.readouterr().out

    checked = output(capsys, "check", colour_table, "--target", "colour", "--json")
    assert checked["tables"]["train"]["bad"] == 0  # type: ignore[index]

    (tmp_path / "small.yaml").write_text(
        f"name: small\ndata: {{train: {colour_table}, target: colour}}\ntrain: {{steps: 4, precision: fp32}}\n"
    )
    run = tmp_path / "run"
    trained = output(capsys, "train", tmp_path / "small.yaml", "--out", run, "--json")
    assert trained["report"] == str(run / "report.html")
    again = output(capsys, "train", tmp_path / "small.yaml", "--out", run, "--resume", "--json")
    assert again["figures"] == trained["figures"]

    judged = output(capsys, "evaluate", run, "--data", colour_table, "--missing", "clip", "--json")
    assert set(judged) == {"all", "without clip"}
    told = output(capsys, "predict", run, colour_table, tmp_path / "a.jsonl", "--withhold", "photo", "--json")
    assert told["answered"] == 240


def test_people_get_tables(colour_run: Path, colour_table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(colour_run)]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main(["check", str(colour_table), "--target", "colour"]) == 0
    assert "by its first bytes" in capsys.readouterr().out
    assert main(["show", "list"]) == 0
    assert "vqa-demo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "vqqa"], "'vqqa' is no recipe. Use one of vqa-demo, vqa, digits, "),
        (["train", "none.yaml"], "none.yaml does not exist. Write one with: dougong show vqa-demo > none.yaml"),
        (["train", "vqa", "--set", "train.steps"], "--set 'train.steps' has no 'key=value'"),
        (["train", "vqa", "--set", "train.steps=-3"], "train.steps: -3 must be at least 1"),
        (["show", "vqa", "--set", "model.widht=3"], "Did you mean 'width'?"),
        (["check", "nowhere.csv"], "neither a recipe (vqa-demo, vqa, digits, "),
        (["predict", "nowhere", "a.csv", "b.csv"], "nowhere"),
        (["evaluate", "nowhere"], "nowhere"),
        (["bench", "nothing"], "'nothing' is no benchmark. Use one of"),
        (["tarin"], "No such command 'tarin'."),
        (["train"], "Missing argument"),
        (["train", "vqa", "--steps", "3"], "No such option"),
    ],
)
def test_a_mistake_gets_one_line_and_status_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)

    status = main(arguments)

    found = capsys.readouterr()
    assert status == 2
    assert found.err.startswith("dougong: ")
    assert message in found.err
    assert len(found.err.splitlines()) == 1
    assert found.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_bad_table_is_listed_by_check(colour_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pq.read_table(colour_table).to_pylist()[:60]
    table[7]["photo"] = {"bytes": b"\x89PNG but not for long", "path": None}
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(table), tmp_path / "spoiled.parquet")

    assert main(["check", str(tmp_path / "spoiled.parquet"), "--target", "colour"]) == 0
    assert "row 7, photo: is not a picture" in capsys.readouterr().out


def seconds(*command: str) -> float:
    """Of the fastest of five: the time the machine was busy with something else is not ours."""
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        taken.append(time.perf_counter() - started)
    return min(taken)


def test_importing_takes_under_three_tenths_of_a_second() -> None:
    assert seconds(sys.executable, "-c", "import dougong") < 0.3


def test_help_takes_under_eight_tenths_of_a_second() -> None:
    assert seconds(sys.executable, "-m", "dougong", "--help") < 0.8


def test_nothing_asked_for_is_answered_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    found = capsys.readouterr()
    assert "predict" in found.out + found.err
    assert "dougong: " not in found.err
