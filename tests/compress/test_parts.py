"""A model cut into graphs answers as the whole; here the graphs are run by torch itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dougong.bundle import runtime
from dougong.bundle.exported import media_of
from dougong.compress.engines.openvino import MOST_AXES, name_layers, to_graph
from dougong.compress.parts import Cut, cut
from dougong.core.errors import ConfigError
from dougong.core.signature import (
    AudioInput,
    ImageInput,
    SignalInput,
    Signature,
    TableInput,
    Target,
    TextInput,
    VolumeInput,
)
from dougong.model.bridge import BridgeConfig
from dougong.model.completion import CompletionConfig
from dougong.model.encoders.image import ImageEncoderConfig
from dougong.model.encoders.vector import VectorEncoderConfig
from dougong.model.sandwich import Sandwich, SandwichConfig
from dougong.nn.batch import Batch, MediaBatch

LABELS = ("a", "b", "c")
INPUTS: dict[str, Any] = {
    "words": TextInput(vocabulary_size=40, max_tokens=12),
    "photo": ImageInput(height=16, width=16),
    "clip": AudioInput(sample_rate=4000, max_samples=4000),
    "table": TableInput(num_numbers=2, category_sizes=(4, 3)),
    "trace": SignalInput(num_channels=2, max_samples=300),
    "keys": SignalInput(num_channels=1, max_samples=7),  # a name that nn.ModuleDict would refuse
}
CONFIGS = {
    "bridge": SandwichConfig(width=16, bridge=BridgeConfig(num_blocks=2)),
    "merged, one alone sure": SandwichConfig(width=16, bridge=BridgeConfig(kind="merged"), decide="confidence"),
    "bottleneck, gated": SandwichConfig(width=16, bridge=BridgeConfig(kind="bottleneck"), decide="gated"),
    "completion": SandwichConfig(width=16, completion=CompletionConfig(num_tokens=3)),
    "late": SandwichConfig(width=16, fusion="late"),
    "late votes": SandwichConfig(width=16, fusion="late", decide="evidence"),
    "own heads": SandwichConfig(width=16, own_heads="taught"),
    "a vector": SandwichConfig(width=16, encoders={"keys": VectorEncoderConfig()}),
}


def signature(task: Any = "single_label") -> Signature:
    labels = () if task == "regression" else LABELS
    return Signature(inputs=INPUTS, target=Target(name="answer", task=task, labels=labels))


def batch(present: dict[str, list[bool]]) -> Batch:
    """Five records; two of them share each medium. What nobody has is not there."""
    random = torch.Generator().manual_seed(0)

    def masked(*counts: int) -> torch.Tensor:
        return torch.arange(max(counts)) < torch.tensor(counts)[:, None]

    values: dict[str, dict[str, torch.Tensor]] = {
        "words": {"ids_UT": torch.randint(0, 40, (3, 7), generator=random), "mask_UT": masked(7, 4, 2)},
        "photo": {"pixels_UCHW": torch.randn(3, 3, 16, 16, generator=random)},
        "clip": {"samples_UT": torch.randn(3, 1600, generator=random), "mask_UT": masked(1600, 900, 40)},
        "table": {
            "numbers_UN": torch.randn(3, 2, generator=random),
            "known_UN": torch.tensor([[True, False], [True, True], [False, False]]),
            "categories_UK": torch.tensor([[1, 0], [3, 2], [0, 1]]),
        },
        "trace": {"samples_UCT": torch.randn(3, 2, 131, generator=random), "mask_UT": masked(131, 64, 5)},
        "keys": {"samples_UCT": torch.randn(3, 1, 6, generator=random), "mask_UT": masked(6, 6, 6)},
    }
    for value in values.values():
        if "samples_UT" in value:
            value["samples_UT"] *= value["mask_UT"]
    media = {}
    for name, of_media in values.items():
        present_B = torch.tensor(present.get(name, [True] * 5))
        there = bool(present_B.any())
        index_B = torch.tensor([0, 1, 2, 1, 0]) * present_B
        media[name] = MediaBatch({k: v if there else v[:0] for k, v in of_media.items()}, index_B, present_B)
    return Batch(media, None)


EXACT = {"INFERENCE_PRECISION_HINT": "f32"}

PRESENT = {
    "all": {},
    "some lack some": {"words": [True, False, True, True, False], "clip": [False, True, True, False, False]},
    "nobody has two": {"photo": [False] * 5, "trace": [False] * 5, "words": [True, True, False, True, True]},
    "one has nothing": {name: [True, True, False, True, True] for name in INPUTS},
    "words alone": {name: [False] * 5 for name in INPUTS if name != "words"},
}


def model(config: SandwichConfig, task: Any = "single_label") -> Sandwich:
    torch.manual_seed(0)
    return config.build(signature(task)).eval()


def carried_out(made: Cut, asked: list[str] | None = None) -> runtime.Call:
    def call(name: str, given: runtime.Arrays) -> runtime.Arrays:
        if asked is not None:
            asked.append(name)
        with torch.no_grad():
            found = made.parts[name].module({key: torch.from_numpy(value) for key, value in given.items()})
        return {key: value.numpy() for key, value in found.items()}

    return call


class Converted(runtime.OpenVinoGraphs):
    """A cut as OpenVINO's graphs, which are never written."""

    def __init__(self, made: Cut) -> None:
        super().__init__({"to": "openvino", **made.spec}, Path(), 1)
        self._made, self._converted = made, dict[str, Any]()

    def written(self, name: str) -> Any:
        if name == runtime.WHOLE:
            return super().written(name)
        if name not in self._converted:
            self._converted[name] = to_graph(self._made.parts[name])
        return self._converted[name].clone()  # joining changes what it joins


@pytest.mark.parametrize("config", CONFIGS)
def test_the_parts_answer_as_the_whole(config: str) -> None:
    network = model(CONFIGS[config])
    made = cut(network, signature())

    for present in PRESENT.values():
        given = batch(present)
        with torch.no_grad():
            want = network(given)
        media, quality = media_of(given)
        found = runtime.run_parts(made.spec, carried_out(made), media, quality)
        np.testing.assert_allclose(found["output_BC"], want.output_BC, atol=2e-5, rtol=1e-4)
        for name in ("weight_BM", "conflict_B"):
            assert (name in found) == (getattr(want, name) is not None)
            if name in found:
                np.testing.assert_allclose(found[name], getattr(want, name), atol=2e-5)
        if want.opinion is not None:
            np.testing.assert_allclose(found["vacuity_B"], want.opinion.vacuity_B, atol=2e-5)
        if "completed_BM" in found:
            np.testing.assert_array_equal(found["completed_BM"], want.completed_BM)


@pytest.mark.parametrize("task", ["multi_label", "regression"])
def test_other_tasks_answer_alike(task: str) -> None:
    network = model(CONFIGS["bridge"], task)
    made = cut(network, signature(task))
    given = batch({})
    with torch.no_grad():
        want = network(given).output_BC

    found = runtime.run_parts(made.spec, carried_out(made), *media_of(given))

    np.testing.assert_allclose(found["output_BC"], want, atol=2e-5, rtol=1e-4)
    assert ("probability_BC" in found) == (task == "multi_label")


def test_the_encoder_of_what_nobody_has_is_not_run() -> None:
    made = cut(model(CONFIGS["bridge"]), signature())
    asked: list[str] = []

    runtime.run_parts(made.spec, carried_out(made, asked), *media_of(batch(PRESENT["words alone"])))

    assert asked == ["encoder-0", "roof"]


def test_every_layer_stands_in_one_graph_under_its_own_name() -> None:
    network = model(CONFIGS["bridge"])
    made = cut(network, signature())

    for name, layer in made.layers.items():
        torch.testing.assert_close(layer.module.weight, network.get_submodule(name).weight, rtol=0, atol=0)
        assert any(module is layer.module for module in made.parts[layer.graph].module.modules())
    large = [
        name
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding) and module.weight.numel() >= 1024
    ]
    assert sorted(made.layers) == sorted(large)


class Wide(torch.nn.Module):
    """A part of one layer."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"output_BC": self.linear(given["x"])}


def test_a_map_to_one_number_is_found_however_wide() -> None:
    """From 1024 inputs on, its weights are a vector on the way through the exporter."""
    pytest.importorskip("openvino")
    part = cut(model(CONFIGS["bridge"]), signature()).parts["roof"]
    linear = torch.nn.Linear(1024, 1)
    wide = part._replace(
        module=Wide(linear), example={"x": torch.randn(2, 1024)}, dynamic={"x": (0,)}, outputs=("output_BC",)
    )

    assert set(name_layers(to_graph(wide), {"decision.out": linear.weight})) == {"decision.out"}


def test_what_is_done_to_the_parts_does_not_reach_the_model() -> None:
    network = model(CONFIGS["bridge"])
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    made = cut(network, signature())

    for layer in made.layers.values():
        layer.module.weight.zero_()

    after = network.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_volume_is_refused_in_one_line() -> None:
    given = signature().model_copy(update={"inputs": {"scan": VolumeInput(depth=4, height=4, width=4)}})
    network = model(CONFIGS["bridge"])
    network.names = ("scan",)

    with pytest.raises(ConfigError, match="a volume has no graph yet"):
        cut(_with_embedder(network), given)


def _with_embedder(network: Sandwich) -> Sandwich:
    from dougong.nn.modules_by_name import ModulesByName

    network.embedders = ModulesByName({"scan": torch.nn.Identity()})
    return network


def test_samples_are_filled_up_to_what_the_graph_divides(tmp_path: Path) -> None:
    part = {"length": {"first": 10, "step": 4}}
    values = {"samples_UCT": np.ones((2, 1, 12), np.float32), "mask_UT": np.ones((2, 12), np.bool_)}

    filled = runtime.filled_up(part, values)

    assert filled["samples_UCT"].shape == (2, 1, 14)
    assert filled["mask_UT"].shape == (2, 14)
    assert not filled["mask_UT"][:, 12:].any()
    assert runtime.filled_up(part, filled)["mask_UT"].shape == (2, 14)


@pytest.mark.slow
@pytest.mark.parametrize("config", ["bridge", "completion", "late votes"])
def test_as_one_graph_they_answer_as_one_after_the_other(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = cut(model(CONFIGS[config]), signature())
    graphs = Converted(made)
    given = media_of(batch(PRESENT["some lack some"]))

    joined = runtime.run_parts(graphs.spec, graphs, *given)
    assert set(graphs.compiled) == {runtime.WHOLE}
    monkeypatch.setattr(runtime, "joins", lambda spec: False)
    apart = runtime.run_parts(graphs.spec, graphs, *given)
    assert set(graphs.compiled) == {runtime.WHOLE, *made.parts}
    assert joined.keys() == apart.keys()
    for name, found in joined.items():
        # Exact but for sums that one graph's layout orders otherwise.
        np.testing.assert_allclose(found, apart[name], atol=1e-5)


def test_what_somebody_lacks_altogether_is_asked_of_the_parts() -> None:
    made = cut(model(CONFIGS["bridge"]), signature())
    graphs = Converted(made)

    runtime.run_parts(graphs.spec, graphs, *media_of(batch(PRESENT["words alone"])))
    assert set(graphs.compiled) == {"encoder-0", "roof"}


def test_a_mean_over_neighbours_is_one_that_kernels_know() -> None:
    config = SandwichConfig(width=16, encoders={"photo": ImageEncoderConfig(patch_size=4, pool=2)})
    part = cut(model(config), signature()).parts["encoder-1"]
    graph = to_graph(part)

    means = [each for each in graph.get_ordered_ops() if each.get_type_name() == "ReduceMean"]
    assert means
    assert all(len(each.input_value(0).get_partial_shape()) <= MOST_AXES for each in means)
    pixels_UCHW = torch.randn(2, 3, 16, 16)
    request = runtime.openvino_core().compile_model(graph, "CPU", EXACT).create_infer_request()
    found = request.infer({"pixels_UCHW": pixels_UCHW.numpy()})
    with torch.no_grad():
        want = part.module({"pixels_UCHW": pixels_UCHW})
    np.testing.assert_allclose(found[part.outputs.index("x_UTD")], want["x_UTD"], atol=1e-5)
