"""Exports of one small trained model: the same answers, the same bytes, and bits that really ran."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dougong
from dougong.bundle.exported import GraphEngine
from dougong.bundle.model import Model
from dougong.bundle.runtime import WHOLE, OpenVinoGraphs
from dougong.cli.main import main
from dougong.compress.backends import AlikeBackend
from dougong.compress.delivery import ExportRequest, deliver, export_plan, graph_bytes, records_of
from dougong.compress.export import Source, answering_bytes, export, open_engine
from dougong.compress.plan import Plan, read_plan
from dougong.compress.quantise import QuantiseConfig, calibrate
from dougong.compress.recover import RecoverConfig
from dougong.continual.learn import learn
from dougong.continual.taught import open_taught
from dougong.core.bundle import read_bundle
from dougong.core.config import parse
from dougong.core.errors import BundleError, ConfigError, DataError
from dougong.data.table import open_table
from dougong.recipes.judge import judge, judge_contribution
from dougong.recipes.robust import sweep

pytest.importorskip("onnxscript")
pytest.importorskip("openvino")
Records = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def model(colour_run: Path) -> Model:
    return dougong.load(colour_run / "bundle")


@pytest.fixture(scope="module")
def source(model: Model) -> Source:
    return Source(model)


@pytest.fixture(scope="module")
def openvino_export(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(source, tmp_path_factory.mktemp("exports") / "openvino", "openvino")


@pytest.fixture(scope="module")
def rows(records: Records) -> list[dict[str, Any]]:
    lacking = [dict.fromkeys(("photo", "clip", "remark", "weight", "maker")), {"remark": "cold like the sea"}]
    return [*records(30, seed=11, missing=0.3), *lacking]


def alike(found: list[Any], want: list[Any], tolerance: float = 2e-5) -> None:
    assert [each.answer for each in found] == [each.answer for each in want]
    for one, other in zip(found, want, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=tolerance)
        assert one.gate == pytest.approx(other.gate, abs=tolerance)
        assert one.absent == other.absent


@pytest.mark.slow
def test_openvino_answers_alike_whatever_a_record_lacks(
    model: Model, openvino_export: Path, rows: list[dict[str, Any]]
) -> None:
    exported = dougong.load(openvino_export)

    alike(exported.predict(rows), model.predict(rows))
    alike(exported.predict(rows[:1]), model.predict(rows[:1]))
    for withheld in model.preparation.modalities:
        alike(exported.predict(rows[:5], withhold=[withheld]), model.predict(rows[:5], withhold=[withheld]))


def test_openvino_computes_in_fp32_whatever_the_processor_has_units_for(openvino_export: Path) -> None:
    spec = json.loads((openvino_export / "export.json").read_text())
    compiled = OpenVinoGraphs(spec, openvino_export / "graphs", 1).open(WHOLE)
    assert str(compiled.get_property("INFERENCE_PRECISION_HINT")) == "<Type: 'float32'>"


SIGNALLED = """
import gc, os, signal, sys
import dougong
opened = [dougong.load(sys.argv[1]) for _ in range(2)]
for model in opened:
    model.predict([{"remark": "it is warm"}])
del model
while opened:  # the first to come is the first to go
    del opened[0]
    gc.collect()
heard = []
signal.signal(signal.SIGINT, lambda *_: heard.append(1))
os.kill(os.getpid(), signal.SIGINT)
sys.exit(0 if heard else 1)
"""


@pytest.mark.slow
def test_a_signal_is_survived_once_graphs_are_let_go_of(openvino_export: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SIGNALLED, str(openvino_export)], check=False)
    assert done.returncode == 0


def test_an_export_is_asked_and_judged_and_nothing_else(
    openvino_export: Path, colour_run: Path, colour_table: Path, tmp_path: Path
) -> None:
    exported = dougong.load(openvino_export)

    judged, want = judge(openvino_export, colour_table), judge(colour_run / "bundle", colour_table)
    assert judged["all"]["metrics"] == pytest.approx(want["all"]["metrics"], abs=1e-4)
    curves = sweep(openvino_export, colour_table, levels=(0.0, 1.0))
    assert {curve.what for curve in curves} == {*exported.preparation.modalities, "every modality"}
    with pytest.raises(ConfigError, match="shows nothing of its inside"):
        exported.explain([{"remark": "it is warm"}])
    with pytest.raises(BundleError, match="has no weights to save"):
        exported.save(tmp_path / "saved")
    table = open_table(colour_table)
    for change in (
        open_taught,
        lambda folder: learn(folder, "more", table, target="colour"),
        lambda folder: judge_contribution(folder, colour_table),
        lambda folder: deliver(folder, tmp_path / "again", ExportRequest(to="onnx")),
    ):
        with pytest.raises(BundleError, match="give the bundle that it was exported from"):
            change(openvino_export)


def test_a_graph_outside_of_its_folder_is_not_opened(openvino_export: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(openvino_export, folder)
    spec = json.loads((folder / "export.json").read_text())
    spec["roof"]["graph"] = "../../roof"
    for ending in ("xml", "bin"):
        shutil.copy(openvino_export / "graphs" / f"roof.{ending}", tmp_path)
    (folder / "export.json").write_text(json.dumps(spec))

    with pytest.raises(BundleError, match="lies outside of it"):
        GraphEngine(folder)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_others_answer_alike(model: Model, source: Source, to: Any, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    folder = export(source, tmp_path / to, to)
    if to == "torch":
        with pytest.raises(ConfigError, match="which is code: torch runs what stands in it"):
            dougong.load(folder)
    exported = dougong.load(folder, trusted=True)

    alike(exported.predict(rows), model.predict(rows))
    alike(exported.predict(rows[:1]), model.predict(rows[:1]))
    alike(exported.predict(rows[:3], withhold=["photo"]), model.predict(rows[:3], withhold=["photo"]))
    _answers_without_dougong(tmp_path / to, model, tmp_path, blocked="openvino")


@pytest.mark.slow
def test_onnx_runtime_rounds_by_each_batch(model: Model, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    backend = AlikeBackend("onnx")
    whole, rounded = (
        backend.carry_out(model, bits, [], tmp_path / str(place)) for place, bits in enumerate(backend.options())
    )
    rounded.ship(tmp_path / "shipped", model.manifest)

    found, want = dougong.load(tmp_path / "shipped").predict(rows), model.predict(rows)
    assert rounded.num_bytes < 0.5 * whole.num_bytes
    assert sum(one.answer == other.answer for one, other in zip(found, want, strict=True)) >= 0.9 * len(rows)
    # Each batch's own range: a tenth of a probability is far more than 8 bits of a good range move.
    close = [abs((one.confidence or 0) - (other.confidence or 0)) for one, other in zip(found, want, strict=True)]
    assert sorted(close)[len(close) // 2] < 0.1
    files = {path.name: path.read_bytes() for path in (tmp_path / "shipped" / "graphs").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "1" / "graphs").iterdir()}


@pytest.mark.slow
def test_a_plain_script_answers_alike_without_dougong(model: Model, openvino_export: Path, tmp_path: Path) -> None:
    _answers_without_dougong(openvino_export, model, tmp_path, blocked="torch")


def _answers_without_dougong(folder: Path, model: Model, tmp_path: Path, blocked: str) -> None:
    lines = [
        {"remark": "it is warm like fire number 3", "weight": 0.2, "maker": "r1"},
        {"weight": "heavy"},
        {"maker": "g2"},
        {},
    ]
    (tmp_path / "records.jsonl").write_text("\n".join(map(json.dumps, lines)))
    code = (
        "import sys, runpy\n"
        f"sys.modules['dougong'] = sys.modules[{blocked!r}] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(folder / "run.py"), str(tmp_path / "records.jsonl")]

    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    want = model.predict(lines)
    assert [each["answer"] for each in found] == [each.answer for each in want]
    assert "not a number" in found[1]["error"]
    for one, other in zip(found, want, strict=True):
        assert one.get("probabilities", {}) == pytest.approx(other.probabilities, abs=2e-5)


@pytest.mark.slow
def test_two_exports_are_the_same_to_the_byte(model: Model, openvino_export: Path, tmp_path: Path) -> None:
    again = export(Source(model), tmp_path / "again", "openvino")

    assert read_bundle(again).files == read_bundle(openvino_export).files
    assert (again / "bundle.json").read_bytes() == (openvino_export / "bundle.json").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "torch"])
def test_two_exports_of_others_are_the_same_to_the_byte(model: Model, to: Any, tmp_path: Path) -> None:
    one, other = (export(Source(model), tmp_path / name, to) for name in ("one", "other"))

    assert read_bundle(one).files == read_bundle(other).files


@pytest.mark.slow
def test_nothing_of_this_machine_is_in_an_export(openvino_export: Path) -> None:
    here = str(Path(dougong.__file__).parent).encode()

    assert not [path for path in openvino_export.rglob("*") if path.is_file() and here in path.read_bytes()]


@pytest.mark.slow
def test_an_altered_export_is_refused(openvino_export: Path, tmp_path: Path) -> None:
    shutil.copytree(openvino_export, tmp_path / "altered")
    graph = tmp_path / "altered" / "graphs" / "roof.bin"
    content = bytearray(graph.read_bytes())
    content[5] ^= 1
    graph.write_bytes(content)

    with pytest.raises(BundleError, match=r"roof\.bin"):
        dougong.load(tmp_path / "altered")


@pytest.mark.slow
def test_each_layer_runs_at_its_bits(model: Model, source: Source, colour_table: Path, tmp_path: Path) -> None:
    calibration, judged = records_of(model, colour_table, 64)
    known = calibrate(model.network, source.cut.layers, calibration, "single_label", QuantiseConfig())
    linear = [name for name, layer in source.cut.layers.items() if "w8a8" in layer.choices]
    turns = ("w8a8", "w4a16", "w16a16", "w8a16")
    plan = Plan(layers={name: turns[place % 4] for place, name in enumerate(linear)})

    engine = open_engine(export_plan(source, tmp_path / "mixed", plan, known, QuantiseConfig()))

    ran = engine.precisions()
    assert ran.keys() >= plan.layers.keys()
    for name, choice in plan.layers.items():
        weights, inputs = ran[name].split("/")
        want = {"w8a8": ("i8", "i8"), "w4a16": ("u4", "f32"), "w8a16": ("i8", "f32"), "w16a16": ("f", "f32")}[choice]
        assert weights.startswith(want[0]), (name, choice, ran[name])
        assert (inputs in ("i8", "u8")) == (want[1] == "i8"), (name, choice, ran[name])
    for batch in judged:
        want_BC = model.network(batch).output_BC.detach().softmax(dim=-1)
        found_BC = engine.run(batch)["output_BC"].softmax(dim=-1)
        np.testing.assert_allclose(found_BC, want_BC, atol=0.1)


@pytest.mark.slow
def test_a_budget_of_bytes_is_kept_from_the_command_line(
    colour_run: Path, colour_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = sum(path.stat().st_size for path in (colour_run / "bundle").glob("*.safetensors"))
    options = [
        "--bits",
        "mixed",
        "--size",
        f"{whole * 8 // 10}B",
        "--data",
        str(colour_table),
        "--records",
        "64",
        "--json",
    ]

    assert main(["export", str(colour_run), "--out", str(tmp_path / "small"), *options]) == 0

    told = json.loads(capsys.readouterr().out)
    assert told["num_bytes"] <= whole * 8 // 10
    assert told["num_bytes"] == graph_bytes(tmp_path / "small")
    # Of so small a model the graphs' text is most, and grows with fewer bits: mixing is held in test_quantise.
    assert told["plan"]
    assert told["figures"]["same answers"] > 0.9
    assert main(["predict", str(tmp_path / "small"), str(colour_table), str(tmp_path / "answers.jsonl")]) == 0
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 240
    assert all(answer["answer"] in ("red", "green", "blue") for answer in answers)


@pytest.mark.slow
def test_memory_of_answering_is_told(openvino_export: Path, tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text('{"maker": "r1"}\n')

    assert 20 * 2**20 < answering_bytes(openvino_export, tmp_path / "records.jsonl") < 2 * 2**30


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"bits": "mixed"}, "Give --size 8MB, --latency 5ms, or both"),
        ({"bits": "8", "most_bytes": 5.0}, "Use --bits mixed"),
        ({"bits": "3"}, "'3' is no choice of bits"),
        ({"bits": "8", "to": "onnx"}, "chosen for openvino alone"),
        ({"to": "tflite"}, "to"),
        ({"compute": "bf16"}, "Give --bits 16 too"),
        ({"bits": "8", "compute": "f16"}, "compute"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse(ExportRequest, values, where="export")


def test_a_plan_says_in_which_floating_point(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"plan": {"one": "w8a16"}, "compute": "bf16", "num_bytes": 3}))
    assert read_plan(file) == Plan(layers={"one": "w8a16"}, compute="bf16")
    file.write_text(json.dumps({"one": "w8a16"}))
    assert read_plan(file) == Plan(layers={"one": "w8a16"})
    file.write_text(json.dumps({"plan": {"one": "w8a16"}, "compute": "f8"}))
    with pytest.raises(ConfigError, match=r"plan\.json"):
        read_plan(file)


def test_trained_weights_are_not_written_over(colour_run: Path, colour_table: Path, tmp_path: Path) -> None:
    copied = tmp_path / "bundle"
    shutil.copytree(colour_run / "bundle", copied)
    for source, reason in ((copied, "is what is exported"), (colour_run, "holds a bundle that is no export")):
        with pytest.raises(ConfigError, match=reason):
            deliver(source, copied, ExportRequest(to="openvino"))
    assert dougong.load(copied)


def test_a_plan_with_a_layer_that_is_none_is_refused_before_anything_is_taught(
    colour_run: Path, colour_table: Path, tmp_path: Path
) -> None:
    plan = Plan(layers={"blocks.99.out": "w8a8"})
    request = ExportRequest(plan=plan, recover=RecoverConfig(steps=1), num_records=32)

    with pytest.raises(ConfigError, match=r"names 'blocks\.99\.out', which is no layer"):
        deliver(colour_run, tmp_path / "out", request, colour_table)


def test_what_needs_records_says_so(colour_run: Path, tmp_path: Path) -> None:
    for request in (ExportRequest(bits="8"), ExportRequest(bits="mixed", most_bytes=1e5), ExportRequest(to="auto")):
        with pytest.raises(ConfigError, match="--data"):
            deliver(colour_run, tmp_path / "out", request)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_too_small_a_budget_says_what_binds(colour_run: Path, colour_table: Path, tmp_path: Path) -> None:
    request = ExportRequest(bits="mixed", most_bytes=1000.0, num_records=64)

    with pytest.raises(ConfigError, match="the size binds"):
        deliver(colour_run, tmp_path / "out", request, colour_table)
    assert not (tmp_path / "out").exists()


def test_too_few_records_are_told(model: Model, tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text(
        json.dumps(dict.fromkeys(model.preparation.columns, None) | {"remark": "warm"}) + "\n"
    )

    with pytest.raises(DataError, match="usable records"):
        records_of(model, tmp_path / "few.jsonl", 64)
