"""Holds search.py, run.py and the command to their promises."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import dougong
from dougong.bundle.model import Model
from dougong.cli.main import main
from dougong.cli.show import print_compression
from dougong.compress import draft, search
from dougong.compress.candidate import Budget, Candidate, Eager, Point, Runner
from dougong.compress.clock import Timed
from dougong.compress.outcome import BudgetError, Outcome
from dougong.compress.picture import draw_points
from dougong.compress.recover import RecoverConfig
from dougong.compress.run import compress_bundle, read_ratio
from dougong.compress.search_config import SearchConfig
from dougong.compress.student import StudentConfig
from dougong.compress.workshop import Workshop
from dougong.core.bundle import Manifest
from dougong.core.config import override, parse
from dougong.core.errors import ConfigError, RunError
from dougong.core.events import Event, StepDone
from dougong.core.sizes import read_seconds
from dougong.data.table import open_table
from dougong.nn.batch import Batch

SMALL = (
    "widths=[0.5]",
    "keeps=[1.0, 0.6]",
    "layers=[1.0]",
    "blocks=[1.0]",
    "pool=false",
    "turns=3",
    "ranked=3",
    "proxy_steps=1",
    "tried=2",
    "finished=1",
    "importance.num_records=32",
    "distil.train.steps=12",
    "distil.train.checkpoint_every=2",
    "distil.loader.workers=0",
)


def small(*more: str) -> SearchConfig:
    values = override(SearchConfig().model_dump(mode="json"), (*SMALL, *more))
    return parse(SearchConfig, values, where="search")


def shown(point: Point) -> dict[str, Any]:
    """What does not depend on the clock."""
    return point.model_dump(exclude={"latency_seconds", "speedup"})


@pytest.fixture(scope="module")
def compressed(colour_run: Path, colour_table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compress") / "out"
    settings = [argument for setting in SMALL for argument in ("--set", setting)]
    arguments = [str(colour_run), "--data", str(colour_table), "--size", "600kB", "--max-loss", "1"]
    arguments += ["--engine", "eager"]
    assert main(["compress", *arguments, "--out", str(out), "--json", *settings]) == 0
    return out


def test_a_bundle_becomes_a_smaller_one_that_loads_and_answers(
    compressed: Path, colour_run: Path, records: Callable[..., Any]
) -> None:
    before, after = dougong.load(colour_run / "bundle"), dougong.load(compressed / "bundle")
    rows = records(30, seed=11, missing=0.1)

    answers = after.predict(rows)

    assert (compressed / "bundle" / "model.safetensors").stat().st_size <= 620_000
    assert after.manifest.signature == before.manifest.signature
    assert sum(a.answer == r["colour"] for a, r in zip(answers, rows, strict=True)) >= 20
    assert "pruned" in str(after.manifest.provenance) or "width" in str(after.manifest.provenance)


def test_what_was_lost_is_told_of_records_that_nothing_was_learnt_from(compressed: Path) -> None:
    found = json.loads((compressed / "compress.json").read_text())

    assert set(found["judged"]) == {"all", *(f"without {name}" for name in ("photo", "clip", "remark", "table"))}
    figures = found["judged"]["all"]
    assert figures["loss"] == pytest.approx(figures["teacher"] - figures["compressed"])
    assert figures["low"] <= figures["loss"] <= figures["high"]
    card = (compressed / "bundle" / "README.md").read_text()
    assert f"| all | {figures['compressed']:.4f} |" in card
    assert sum("held out to judge on" in note for note in found["notes"]) == 1
    learnt = [point for point in found["points"] if point["loss"] is not None]
    assert len(learnt) == 2
    assert found["chosen"]["size_bytes"] <= 600_000
    assert "<svg" in (compressed / "points.svg").read_text()


def test_people_get_tables(
    compressed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    print_compression(json.loads((compressed / "compress.json").read_text()), compressed)

    shown = capsys.readouterr().out
    assert "<- chosen" in shown
    assert "without photo" in shown
    assert "teacher" in shown
    assert "points.svg" in shown


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_killed_search_goes_on_and_comes_to_the_same(
    colour_run: Path, colour_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alike(calls: Mapping[str, Any], **_: Any) -> dict[str, Timed]:
        return {name: Timed((0.001,)) for name in calls}

    for module in (draft, search):
        monkeypatch.setattr(module, "interleaved", alike)  # times would choose now one and now another
    budget = Budget(size_bytes=600_000, max_loss=1.0)
    unbroken = compress_bundle(colour_run, colour_table, budget, tmp_path / "unbroken", small()).as_json()
    steps: list[float] = []

    def listen(event: Event) -> None:
        if isinstance(event, StepDone):
            steps.append(event.loss)
            if len(steps) == 6:
                raise Killed

    with pytest.raises(Killed):
        compress_bundle(colour_run, colour_table, budget, tmp_path / "out", small(), listeners=[listen])
    again = compress_bundle(
        colour_run, colour_table, budget, tmp_path / "out", small(), resume=True, listeners=[listen]
    ).as_json()

    for key in ("chosen", "judged", "points", "front", "binds"):
        assert again[key] == unbroken[key], key
    assert again["points"]
    with pytest.raises(RunError, match="holds a search already. Go on with it by --resume"):
        compress_bundle(colour_run, colour_table, budget, tmp_path / "out", small())
    with pytest.raises(RunError, match="holds a search with another search"):
        compress_bundle(colour_run, colour_table, budget, tmp_path / "out", small("turns=4"), resume=True)


def test_a_budget_that_cannot_be_met_ends_with_the_closest_points_and_what_binds(
    colour_run: Path, colour_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [argument for setting in SMALL for argument in ("--set", setting)]
    arguments = [str(colour_run), "--data", str(colour_table), "--size", "9kB", "--out", str(tmp_path / "out")]
    arguments += ["--engine", "eager"]

    assert main(["compress", *arguments, "--json", *settings]) == 2

    told = capsys.readouterr()
    assert len(told.err.splitlines()) == 1
    assert "the budget cannot be met: size: " in told.err
    assert "KiB against 8.79 KiB, of which " in told.err
    assert "% is " in told.err
    assert "; the closest is width 0.5, pruned to 0.6: " in told.err
    found = json.loads(told.out)
    assert found["chosen"] is None
    assert found["closest"]
    assert found["closest"][0]["size_bytes"] == min(point["size_bytes"] for point in found["points"])
    assert main(["compress", *arguments, "--resume", *settings]) == 2
    assert "none of which has learnt" in capsys.readouterr().out
    assert not (tmp_path / "out" / "bundle").exists()


def test_a_latency_that_cannot_be_met_ends_so_too(colour_run: Path, colour_table: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"latency: .* ms against 0.001 ms, of which \d+% is \w+'s") as caught:
        compress_bundle(
            colour_run, colour_table, Budget(latency_seconds=1e-6), tmp_path / "out", small("keeps=[1.0]", "turns=1")
        )
    closest = caught.value.outcome.closest
    assert closest[0].latency_seconds == min(point.latency_seconds for point in caught.value.outcome.points)


@pytest.mark.slow
def test_too_much_lost_is_said_too(colour_run: Path, colour_table: Path, tmp_path: Path) -> None:
    config = small("distil.train.steps=2", "widths=[0.25]", "keeps=[0.6]", "proxy_steps=0", "distil.label_weight=1e-9")
    config = config.model_copy(update={"distil": config.distil.model_copy(update={"answer_weight": 1e-9})})
    with pytest.raises(BudgetError, match=r"max-loss: .* against 0.0*1?\b.*Allow a larger --max-loss") as caught:
        compress_bundle(colour_run, colour_table, Budget(size_bytes=1e6, max_loss=0.01), tmp_path / "out", config)
    assert caught.value.outcome.closest[0].loss is not None


@pytest.mark.slow
def test_where_time_is_short_less_is_tried(colour_run: Path, colour_table: Path, tmp_path: Path) -> None:
    told: list[str] = []
    result = compress_bundle(
        colour_run,
        colour_table,
        Budget(size_bytes=600_000, max_loss=1.0),
        tmp_path / "out",
        small("distil.train.steps=100000"),
        time_limit=8.0,
        say=told.append,
    )
    assert any("time is short" in line for line in told)
    assert result.outcome.chosen is not None
    assert 0 < result.outcome.chosen.steps < 1000


class Halved:
    """A back end that rounds weights to 16 bits, as one with bits of its own does."""

    name = "halved"

    def __init__(self) -> None:
        self.saved: list[tuple[Path, Manifest]] = []

    def options(self) -> Sequence[Mapping[str, str]]:
        return [{"all": "w16"}, {"all": "w8"}]

    def carry_out(
        self,
        model: Model,
        bits: Mapping[str, str],
        calibration: Sequence[Batch],
        folder: Path,
        *,
        nearest: bool = False,
    ) -> Runner:
        return _Rounded(self, model, 1.25 if "half" in bits else 2 if bits["all"] == "w16" else 1)

    def recover(self, model: Model, *_: Any) -> Model:
        raise ConfigError("halves do not learn")

    def fill(self, model: Model, *_: Any) -> Mapping[str, str]:
        return {"half": "w16", "other half": "w8"}


class _Rounded:
    def __init__(self, backend: Halved, model: Model, bytes_each: float) -> None:
        self._backend, self.network, self._bytes = backend, model.network, bytes_each

    @property
    def num_bytes(self) -> int:
        return round(self._bytes * sum(p.numel() for p in self.network.parameters()))

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Any:
        return self.network(batch)

    def ship(self, folder: Path, manifest: Manifest) -> None:
        self._backend.saved.append((folder, manifest))


@pytest.mark.slow
def test_other_engines_and_bits_are_further_dimensions(colour_run: Path, colour_table: Path, tmp_path: Path) -> None:
    backend = Halved()
    result = compress_bundle(
        colour_run,
        colour_table,
        Budget(size_bytes=150_000, max_loss=1.0),
        tmp_path / "out",
        small("tried=1", "widths=[0.5]", "keeps=[1.0]"),
        backends=(Eager(), backend),
    )

    found = {str(point.candidate.bits) for point in result.outcome.points if point.candidate.engine == "halved"}
    assert found == {"{'all': 'w16'}", "{'all': 'w8'}", "{'half': 'w16', 'other half': 'w8'}"}
    chosen = result.outcome.chosen
    assert chosen is not None
    assert chosen.candidate.engine == "halved"
    assert chosen.candidate.bits != {"all": "w16"}  # which is too large
    assert "on halved in " in chosen.candidate.in_words()
    ((folder, manifest),) = backend.saved
    assert folder == tmp_path / "out" / "bundle"
    assert manifest.metrics["all"]["accuracy"] == result.judged["all"]["compressed"]


class Careless(Halved):
    """Loses its answers by rounding, but for weights that were taught to live with it."""

    name = "careless"

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[RecoverConfig] = []

    def options(self) -> Sequence[Mapping[str, str]]:
        return [{"all": "w8"}]

    def carry_out(self, model: Model, *given: Any, nearest: bool = False) -> Runner:
        if not nearest:
            model = copy.deepcopy(model)
            for weight in model.network.decision.parameters():
                torch.nn.init.zeros_(weight)
        return _Rounded(self, model, 1)

    def recover(self, model: Model, bits: Mapping[str, str], calibration: Any, config: RecoverConfig) -> Model:
        self.asked.append(config)
        return copy.deepcopy(model)

    def fill(self, model: Model, *_: Any) -> Mapping[str, str]:
        raise ConfigError("all alike")


@pytest.mark.slow
def test_what_rounding_costs_is_recovered_where_it_is_too_much(
    colour_run: Path, colour_table: Path, tmp_path: Path
) -> None:
    def compressed_to(out: Path, backend: Careless, *settings: str, resume: bool = False) -> Any:
        return compress_bundle(
            colour_run,
            colour_table,
            Budget(size_bytes=700_000, max_loss=0.3),
            out,
            small("tried=1", "widths=[1.0]", "keeps=[1.0]", *settings),
            backends=(backend,),
            resume=resume,
        )

    backend = Careless()
    result = compressed_to(tmp_path / "out", backend)

    chosen = result.outcome.chosen
    assert chosen is not None
    assert chosen.candidate.recovered
    assert chosen.loss is not None
    assert chosen.loss <= 0.3
    rounded = [
        p for p in result.outcome.points if p.candidate.bits and not p.candidate.recovered and p.loss is not None
    ]
    assert min(p.loss for p in rounded) > 0.3
    assert len(backend.asked) == 1
    assert "taught to live with them" in chosen.candidate.in_words()

    again = Careless()
    assert compressed_to(tmp_path / "out", again, resume=True).outcome.chosen.candidate == chosen.candidate
    assert again.asked == []  # what was taught is kept

    with pytest.raises(BudgetError, match="max-loss"):
        compressed_to(tmp_path / "without", Careless(), "recover=null")


@pytest.mark.slow
def test_bits_and_engine_are_chosen_and_the_engines_files_are_the_bundle(
    colour_run: Path, colour_table: Path, compressed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino")
    drafted = json.loads((compressed / "compress.json").read_text())["points"]
    most = round(1.5 * max(point["num_parameters"] for point in drafted))  # less than 16 bits each, more than 8
    tiny = (*SMALL, "keeps=[1.0]", "tried=1", "ranked=1", "proxy_steps=0", "distil.train.steps=2", "try_share=1")
    settings = [argument for setting in tiny for argument in ("--set", setting)]
    out = tmp_path / "out"
    budget = ["--size", f"{most}B", "--max-loss", "1", "--engine", "openvino"]

    assert main(["compress", str(colour_run), "--data", str(colour_table), *budget, "--out", str(out), *settings]) == 0

    found = json.loads((out / "compress.json").read_text())
    assert found["chosen"]["candidate"]["engine"] == "openvino"
    assert found["chosen"]["size_bytes"] <= most
    mixed = [each["candidate"]["bits"] for each in found["points"] if len(set(each["candidate"]["bits"].values())) > 1]
    assert mixed, "the solver's own bits were not tried"
    capsys.readouterr()
    assert main(["evaluate", str(out), "--data", str(colour_table), "--missing", "photo", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert set(figures) == {"all", "without photo"}
    (tmp_path / "some.jsonl").write_text(json.dumps({"remark": "cold like the sea"}) + "\n")
    assert main(["predict", str(out), str(tmp_path / "some.jsonl"), str(tmp_path / "answers.jsonl")]) == 0
    assert json.loads((tmp_path / "answers.jsonl").read_text())["answer"] in ("red", "green", "blue")
    card = (out / "bundle" / "README.md").read_text()
    assert f"| all | accuracy | {found['judged']['all']['compressed']:.4f} |" in card
    assert dougong.load(out / "learnt").manifest.signature == dougong.load(colour_run / "bundle").manifest.signature


@pytest.mark.slow
def test_a_student_of_fewer_modalities_with_teachers_of_one_and_zeros(
    colour_run: Path, colour_table: Path, tmp_path: Path
) -> None:
    dougong.fit(colour_table, target="colour", steps=4, out=tmp_path / "alone", quiet=True, modalities=["remark"])
    told: list[str] = []
    settings = (
        "modalities=[remark, table]",
        f"beside.remark={tmp_path / 'alone'}",
        "sparse.kind=2:4",
        "keeps=[1.0]",
        "tried=1",
        "try_share=1",
    )
    result = compress_bundle(
        colour_run,
        colour_table,
        Budget(size_bytes=600_000, max_loss=1.0),
        tmp_path / "out",
        small(*settings),
        say=told.append,
    )

    shipped = dougong.load(tmp_path / "out" / "bundle")
    assert list(shipped.preparation.modalities) == ["remark", "table"]
    assert set(result.judged) == {"all", "without remark", "without table"}
    assert any("2:4: 50% of the weights are zero" in line for line in told)
    for module in shipped.network.modules():
        if isinstance(module, torch.nn.Linear) and module.in_features % 4 == 0:
            four_OG4 = module.weight.unflatten(1, (-1, 4))
            assert ((four_OG4 != 0).sum(dim=-1) <= 2).all()


def test_steps_that_are_to_be_shared_out_are_asked_for_at_once() -> None:
    with pytest.raises(ConfigError, match=r"distil\.train\.steps is not given"):
        small("distil.train.steps=null")


def test_more_records_at_once_than_there_are_is_refused(colour_run: Path, colour_table: Path, tmp_path: Path) -> None:
    budget = Budget(latency_seconds=0.01, max_loss=1.0)
    with pytest.raises(ConfigError, match="batch_size=5000 records are timed at once, and .* can be learnt from"):
        compress_bundle(colour_run, colour_table, budget, tmp_path / "out", small("batch_size=5000"))


def test_as_many_are_timed_at_once_as_are_asked_for(colour_run: Path, colour_table: Path, tmp_path: Path) -> None:
    model = dougong.load(colour_run / "bundle")

    shop = Workshop(model, open_table(colour_table), small("batch_size=100"), tmp_path, {})

    assert shop.probe.num_records == 100


def test_what_leaves_modalities_out_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="modalities says what the student is shown, and so does"):
        small("modalities=[remark]", "distil.withhold=0.1")
    with pytest.raises(ConfigError, match=r"beside.photo teaches a modality that the student does not read"):
        small("modalities=[remark]", "beside.photo=runs/photo")
    assert small("sparse.kind=2:4").sparse is not None  # which YAML reads as a number of base 60


def test_the_front_and_the_picture_follow_from_the_points() -> None:
    def point(width: float, seconds: float, size: int, loss: float) -> Point:
        candidate = Candidate(student=StudentConfig(width=width))
        return Point(
            candidate=candidate,
            num_parameters=size,
            size_bytes=size,
            latency_seconds=seconds,
            speedup=1 / seconds,
            metric=1 - loss,
            loss=loss,
        )

    teacher = point(1.0, 1.0, 100, 0.0)
    good, worse, fast = point(0.5, 0.5, 50, 0.01), point(0.6, 0.6, 60, 0.02), point(0.2, 0.2, 20, 0.1)
    outcome = Outcome(teacher, (good, worse, fast), good, (), ())

    assert outcome.front() == (fast, good, teacher)
    assert draw_points(outcome, "accuracy") == draw_points(outcome, "accuracy")
    budget = Budget(size_bytes=55, latency_seconds=0.4)
    assert budget.binds(fast) == []
    assert budget.binds(good) == ["latency: 500 ms against 400 ms"]
    assert budget.excess(worse) == pytest.approx(1.5)


def test_times_and_ratios_are_read_as_people_write_them() -> None:
    assert read_seconds("5ms", "--latency") == pytest.approx(0.005)
    assert read_seconds("10min", "--time-limit") == 600
    assert read_ratio("10x", "--speedup") == 10
    with pytest.raises(ConfigError, match="--latency '5' is no time. Write for example 5ms"):
        read_seconds("5", "--latency")
    with pytest.raises(ConfigError, match="--speedup 'fast' is no ratio"):
        read_ratio("fast", "--speedup")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--data", "a.csv", "--size", "8MB"], "nowhere"),
        (["nowhere", "--data", "a.csv"], "no budget is given. Use --size 8MB, --latency 5ms or --speedup 10x."),
        (
            ["nowhere", "--data", "a.csv", "--size", "8MB", "--engine", "warp"],
            "--engine 'warp' is none. Use one of auto, eager, openvino, openvino-bf16, onnx, inductor.",
        ),
        (["nowhere", "--data", "a.csv", "--size", "small"], "'small' is no number of bytes"),
        (["nowhere", "--data", "a.csv", "--latency", "5"], "--latency '5' is no time"),
        (["nowhere", "--data", "a.csv", "--speedup", "x"], "--speedup 'x' is no ratio"),
        (["nowhere", "--data", "a.csv", "--size", "8MB", "--set", "widht=1"], "Did you mean 'widths'?"),
        (["nowhere", "--data", "a.csv", "--size", "8MB", "--max-loss", "-1"], "max_loss: "),
        (["nowhere", "--size", "8MB"], "Missing option"),
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
    assert main(["compress", *arguments]) == 2
    found = capsys.readouterr()
    assert message in found.err
    assert len(found.err.splitlines()) == 1
    assert found.out == ""
    assert list(tmp_path.iterdir()) == []
