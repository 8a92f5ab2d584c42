import json
import re
from pathlib import Path

import pytest

from dougong.cli.main import main


def test_a_page_of_some_records_stands_alone(
    colour_run: Path, colour_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "inside.html"
    command = ["watch", colour_run, "--data", colour_table, "--record", "3", "--record", "5", "--out", page, "--json"]

    assert main([str(part) for part in command]) == 0

    told = json.loads(capsys.readouterr().out)
    written = page.read_text(encoding="utf-8")
    assert [record["row"] for record in told["records"]] == [3, 5]
    for record in told["records"]:
        shapley = record["shapley"]
        assert sum(shapley["value"].values()) == pytest.approx(shapley["all"] - shapley["none"], abs=1e-6)
        assert sum(record["share"]["relevance"].values()) == pytest.approx(1.0, abs=1e-3)
        assert record["faithful"]["relevance"]["deletion"]["share"][-1] == 1.0
    assert "<script" not in written
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", written)
    assert "gradient-weighted relevance" in written
    assert "data:image/png;base64," in written


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--record", "999", "--out", "x.html"], "--record 999 is not in"),
        (["--record", "1", "--out", "x.png"], "ends in '.png', and what is written is a page"),
        (["--contribution"], "--contribution says nothing without --out"),
    ],
)
def test_a_mistake_gets_one_line(
    arguments: list[str],
    message: str,
    colour_run: Path,
    colour_table: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["--data", str(colour_table)] if "--record" in arguments else []

    assert main(["watch", str(colour_run), *data, *arguments]) == 2

    told = capsys.readouterr()
    assert message in told.err
    assert len(told.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
