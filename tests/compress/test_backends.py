"""Holds backends.py to its promises, on a model of words and pictures."""

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import dougong
from dougong.bundle.exported import EngineConfig
from dougong.bundle.model import Model
from dougong.bundle.runtime import openvino_core
from dougong.compress.backends import AlikeBackend, OpenVinoBackend, backends_named, fastest_floats
from dougong.compress.candidate import ALL, Backend, Runner
from dougong.compress.engines.openvino import _precision
from dougong.compress.sensitivity import divergence
from dougong.core.bundle import Manifest
from dougong.core.errors import ConfigError
from dougong.core.signature import Target, TextInput
from dougong.data.modality.image import ImageConfig, ImageModality
from dougong.data.modality.text import TextConfig, TextModality, learn_tokenizer
from dougong.data.preparation import Preparation
from dougong.model.sandwich import SandwichConfig
from dougong.nn.batch import Batch, MediaBatch

openvino = pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def model() -> Model:
    tokenizer: Tokenizer = learn_tokenizer([f"word{number}" for number in range(50)], 200)
    preparation = Preparation(
        {
            "words": TextModality(TextConfig(column="words", max_tokens=8), tokenizer),
            "photo": ImageModality(ImageConfig(column="photo", height=16, width=16)),
        },
        Target(name="answer", task="single_label", labels=("a", "b", "c")),
    )
    torch.manual_seed(0)
    signature = preparation.signature()
    network = SandwichConfig(width=32).build(signature)
    return Model(network, preparation, Manifest(name="small", signature=signature, model={}))


@pytest.fixture(scope="module")
def batches(model: Model) -> list[Batch]:
    random = torch.Generator().manual_seed(1)
    taken = model.preparation.signature().inputs["words"]
    assert isinstance(taken, TextInput)
    made = []
    for _ in range(2):
        every_B, all_B = torch.arange(16), torch.ones(16).bool()
        ids_UT = torch.randint(0, taken.vocabulary_size, (16, 6), generator=random)
        words = MediaBatch({"ids_UT": ids_UT, "mask_UT": torch.ones_like(ids_UT).bool()}, every_B, all_B)
        photo = MediaBatch({"pixels_UCHW": torch.randn(16, 3, 16, 16, generator=random)}, every_B, all_B)
        made.append(Batch({"words": words, "photo": photo}, None))
    return made


def apart(model: Model, runner: Runner, batches: Sequence[Batch]) -> float:
    """In nats a record."""
    with torch.inference_mode():
        found = [divergence(model.network(b).output_BC, runner(b).output_BC, "single_label") for b in batches]
    return float(torch.cat(found).mean())


@pytest.mark.slow
def test_bits_by_layer_use_a_budget_up_and_are_shipped_as_they_ran(
    model: Model, batches: list[Batch], tmp_path: Path
) -> None:
    backend = OpenVinoBackend(EngineConfig(threads=1))
    uniform = {
        name: backend.carry_out(model, {ALL: name} if name else {}, batches, tmp_path / f"all-{name}")
        for name in ("", "w8a16", "w4a16")
    }
    sizes = {name: runner.num_bytes for name, runner in uniform.items()}
    most = (sizes["w8a16"] + sizes["w4a16"]) / 2

    bits = backend.fill(model, batches, batches[0], most, None)
    mixed = backend.carry_out(model, bits, batches, tmp_path / "mixed")

    assert sizes["w4a16"] < mixed.num_bytes <= most < sizes["w8a16"] < 0.5 * sizes[""]
    assert len(set(bits.values())) > 1
    assert apart(model, uniform[""], batches) < 1e-8
    assert apart(model, mixed, batches) < 0.8 * apart(model, uniform["w4a16"], batches)
    manifest = model.manifest.model_copy(update={"metrics": {"all": {"accuracy": 0.5}}})
    mixed.ship(tmp_path / "shipped", manifest)
    shipped = dougong.load(tmp_path / "shipped", EngineConfig(threads=1))
    assert shipped.manifest.metrics == manifest.metrics
    assert "| all | accuracy | 0.5000 |" in (tmp_path / "shipped" / "README.md").read_text()
    with torch.inference_mode():
        torch.testing.assert_close(shipped.network(batches[0]).output_BC, mixed(batches[0]).output_BC, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="the size binds"):
        backend.fill(model, batches, batches[0], 0.5 * sizes["w4a16"], None)


@pytest.mark.parametrize(
    "backend", [OpenVinoBackend(EngineConfig(threads=1)), pytest.param(AlikeBackend("onnx"), marks=pytest.mark.slow)]
)
def test_what_a_model_has_learnt_since_is_carried_out(
    model: Model, batches: list[Batch], tmp_path: Path, backend: Backend
) -> None:
    taught = Model(copy.deepcopy(model.network).eval(), model.preparation, model.manifest)
    backend.carry_out(taught, {}, batches, tmp_path / "before")
    with torch.no_grad():
        for weight in taught.network.parameters():
            weight.mul_(1.5)
    after = backend.carry_out(taught, {}, batches, tmp_path / "after")

    assert apart(taught, after, batches) < 1e-6 < apart(model, after, batches)


def test_floats_that_no_choice_rounds_take_two_bytes(model: Model, batches: list[Batch], tmp_path: Path) -> None:
    rounded = OpenVinoBackend(EngineConfig(threads=1)).carry_out(model, {ALL: "w4a16"}, batches, tmp_path / "rounded")

    assert apart(model, rounded, batches) < 0.1
    kinds: dict[str, int] = {}
    for file in (tmp_path / "rounded" / "graphs").glob("*.xml"):
        for each in openvino_core().read_model(file).get_ordered_ops():
            if each.get_type_name() == "Constant" and each.get_data().size >= 256:
                kind = each.get_output_element_type(0).get_type_name()
                kinds[kind] = kinds.get(kind, 0) + each.get_data().size
    assert kinds.keys() == {"u4", "f16"}
    assert kinds["f16"] > 3_000


@pytest.mark.slow
@pytest.mark.skipif(
    fastest_floats() != "bf16", reason="this processor has no units for bfloat16, whose formats are read back"
)
def test_what_is_left_in_floating_point_may_be_computed_in_bf16(
    model: Model, batches: list[Batch], tmp_path: Path
) -> None:
    backend = OpenVinoBackend(EngineConfig(threads=1), compute="bf16")

    plain = backend.carry_out(model, {ALL: "w16a16"}, batches, tmp_path / "plain")
    eight = backend.carry_out(model, {ALL: "w8a8"}, batches, tmp_path / "eight")

    assert backend.name == "openvino-bf16"
    assert {} not in backend.options()
    assert 1e-9 < apart(model, plain, batches) < 1e-2
    ran = plain.engine.precisions()  # type: ignore[attr-defined]
    assert "bf16" in {found.split("/")[1] for found in ran.values()} <= {"bf16", "i32"}
    assert "?" not in "".join(ran.values())
    assert {"i8", "u8"} >= {found.split("/")[1] for found in eight.engine.precisions().values()} - {"i32"}  # type: ignore[attr-defined]
    plain.ship(tmp_path / "shipped", model.manifest)
    shipped = dougong.load(tmp_path / "shipped", EngineConfig(threads=1))
    with torch.inference_mode():
        torch.testing.assert_close(shipped.network(batches[0]).output_BC, plain(batches[0]).output_BC, rtol=0, atol=0)
    assert "bfloat16" in (tmp_path / "shipped" / "README.md").read_text()


class Told:
    """Of a compiled graph, as much as is asked of it."""

    def __init__(self, kind: str, precision: str, *sources: "Told") -> None:
        self.info = {"layerType": SimpleNamespace(astype=lambda _: kind)}
        self.info["outputPrecisions"] = SimpleNamespace(astype=lambda _: precision)
        self.sources = sources

    def get_rt_info(self) -> dict[str, Any]:
        return self.info

    def get_input_size(self) -> int:
        return len(self.sources)

    def input_value(self, place: int) -> Any:
        return SimpleNamespace(get_node=lambda: self.sources[place])


def test_a_look_up_that_is_followed_by_a_change_of_format_tells_its_own() -> None:
    look_up = Told("Gather", "f16", Told("Const", "f16"), Told("Input", "i32"))

    assert _precision(Told("Convert", "bf16", look_up)) == "f16/i32"


def test_a_processor_without_bf16_is_not_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32", "INT8"])

    assert "openvino-bf16" not in [backend.name for backend in backends_named("auto")]
    with pytest.raises(ConfigError, match="no units for bfloat16. Use --engine openvino"):
        backends_named("openvino-bf16")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiles C++")
@pytest.mark.parametrize("bits", [{}, {ALL: "dynamic-w8a8"}])
def test_torch_s_compiler_carries_a_model_out(
    model: Model, batches: list[Batch], bits: dict[str, str], tmp_path: Path
) -> None:
    backend = AlikeBackend("inductor", EngineConfig(threads=1))
    assert bits in backend.options()

    runner = backend.carry_out(model, bits, batches, tmp_path / "compiled")

    assert (1e-9 if bits else 0) <= apart(model, runner, batches) < (1e-2 if bits else 1e-9)
    runner.ship(tmp_path / "shipped", model.manifest)
    with pytest.raises(ConfigError, match="compiled by AOTInductor, which is code"):
        dougong.load(tmp_path / "shipped")
    shipped = dougong.load(tmp_path / "shipped", EngineConfig(threads=1), trusted=True)
    with torch.inference_mode():
        torch.testing.assert_close(shipped.network(batches[0]).output_BC, runner(batches[0]).output_BC, rtol=0, atol=0)
        three = {
            name: each._replace(index_B=each.index_B[:3], present_B=each.present_B[:3])
            for name, each in batches[0].media.items()
        }
        few_BC = shipped.network(Batch(three, None)).output_BC
        torch.testing.assert_close(few_BC, runner(batches[0]).output_BC[:3], rtol=1e-3, atol=1e-4)


def test_what_has_no_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("nowhere-to-be-found",))
    with pytest.raises(ConfigError, match="a C\\+\\+ compiler, and there is none here"):
        backends_named("inductor")


def test_engines_are_named() -> None:
    assert "inductor" not in [backend.name for backend in backends_named("auto")]
    assert [backend.name for backend in backends_named("auto")][:2] == ["eager", "openvino"]
    assert [backend.name for backend in backends_named("openvino")] == ["openvino"]
    with pytest.raises(ConfigError, match="--engine 'warp' is none. Use one of auto, eager, openvino, openvino-bf16"):
        backends_named("warp")
    with pytest.raises(ConfigError, match="rounds all layers alike. Use --engine openvino"):
        AlikeBackend("onnx").fill(None, [], None, 1.0, None)  # type: ignore[arg-type]  # refused before it looks
