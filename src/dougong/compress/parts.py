"""A model cut into the graphs that are exported: one for each encoder, and one for all that joins them.

Here        Column (one modality's encoder), Roof (join, bridge, gate, head), `cut`, which also says how they fit.
Elsewhere   feeding the graphs (runtime.py); writing them (export.py); why they are cut so (docs/adr/0015).
Promise     run one after the other they answer as the whole model does, within rounding; a modality that no record
            has is a masked token or two for the roof, and its encoder is not asked.

Shapes: U distinct media, B records, M modalities, T tokens, D channels, C outputs, Q figures of quality.
"""

from __future__ import annotations

import copy
import math
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dougong.compress.plan import BLIND, CHOICES, Choice
from dougong.core.errors import ConfigError
from dougong.core.signature import AudioInput, ImageInput, Input, SignalInput, Signature, TableInput, TextInput
from dougong.model.encoders.audio import AudioStem
from dougong.model.encoders.encoder import Tokens, TransformerLayer
from dougong.model.encoders.signal import FAINTEST, SignalStem
from dougong.model.encoders.vector import VectorStem
from dougong.model.sandwich import (
    BridgeBlock,
    CompletionBlock,
    EncoderBlock,
    FinishBlock,
    Own,
    OwnBlock,
    Sandwich,
    SandwichState,
)
from dougong.nn.modules_by_name import ModulesByName
from dougong.objectives.decision import decision_probabilities

Given = dict[str, Tensor]

TOKENS: Final = ("x_UTD", "mask_UT")

FEWEST_WEIGHTS: Final = 1024
"""Of a layer whose bits are worth a choice; in a smaller one, scales would take what bits save."""


class Part(NamedTuple):
    """A graph to be: a module from a dict of tensors to another, with an example of what it takes."""

    module: nn.Module
    example: Given
    dynamic: dict[str, dict[int, str]]
    """Of each input, the axes whose length is open, and a name that equal lengths share."""

    outputs: tuple[str, ...]


class Layer(NamedTuple):
    """A layer whose bits can be chosen: a linear map, or a table of embeddings."""

    graph: str
    """The part that it is carried out in."""

    module: nn.Linear | nn.Embedding
    """With the weights that are exported."""

    shown: bool = True
    """Whether the records at hand reach it. Of one that they do not, nothing says what fewer bits would cost, nor in
    which range its inputs lie."""

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What can be chosen for it. A look-up has no activations to round."""
        if not self.shown:
            return BLIND
        return CHOICES if isinstance(self.module, nn.Linear) else tuple(c for c in CHOICES if c != "w8a8")


class Cut(NamedTuple):
    """All graphs by name, in the order in which they are run, and what export.json says of them."""

    parts: dict[str, Part]
    spec: dict[str, Any]
    layers: dict[str, Layer]
    """By their names in the model."""


class Column(nn.Module):
    """One modality's encoder with all that belongs to its media alone: values to tokens of the shared width."""

    def __init__(self, network: Sandwich, name: str, *, whole: bool) -> None:
        """`whole`: every medium has as many tokens, so that no layer needs a mask."""
        super().__init__()
        self.name = name
        self.whole = whole
        self.embedder = _exportable(network.embedders[name])
        found = [b for b in network.blocks if isinstance(b, EncoderBlock | FinishBlock | OwnBlock) and b.name == name]
        self.blocks = nn.ModuleList(found)

    def forward(self, given: Given) -> Given:
        x_UTD, mask_UT = self.embedder(given)
        state = SandwichState.begin({self.name: x_UTD}, {self.name: mask_UT}, {}, mask_UT[:, :1])
        for block in self.blocks:
            if self.whole and isinstance(block, EncoderBlock) and isinstance(block.layer, TransformerLayer):
                tokens = block.layer.layer(state.tokens[self.name], attention_mask=None)
                state = state._replace(tokens={self.name: tokens})
            else:
                state = block(state)
        made = {"x_UTD": state.tokens[self.name], "mask_UT": state.masks[self.name]}
        if self.name in state.own:
            made |= {"own_UD": state.own[self.name].vector_UD, "own_UC": state.own[self.name].logit_UC}
        return made


class Roof(nn.Module):
    """From what the encoders say of media to the answers of records. Every modality is given, absent ones masked."""

    def __init__(self, network: Sandwich) -> None:
        super().__init__()
        self.network = network
        self.names = network.names

    def forward(self, given: Given) -> Given:
        network = self.network
        present_BM = torch.stack([given[f"present_B_{place}"] for place in range(len(self.names))], dim=1)
        tokens, masks, medium, quality, own = {}, {}, {}, {}, {}
        for place, name in enumerate(self.names):
            index_B, present_B = given[f"index_B_{place}"], given[f"present_B_{place}"]
            medium[name] = index_B
            if f"x_UTD_{place}" in given:
                tokens[name], masks[name] = given[f"x_UTD_{place}"], given[f"mask_UT_{place}"]
                if not network.late:
                    x_BTD = tokens[name].index_select(0, index_B)
                    tokens[name] = x_BTD.masked_fill(~present_B[:, None, None], 0.0)
                    masks[name] = masks[name].index_select(0, index_B) & present_B[:, None]
            else:  # votes alone: what is said of the vectors is enough
                tokens[name] = given[f"own_UD_{place}"][:, None]
            if f"own_UD_{place}" in given:
                own[name] = Own(given[f"own_UD_{place}"], given[f"own_UC_{place}"])
            if f"quality_UQ_{place}" in given:
                quality_BQ = given[f"quality_UQ_{place}"].index_select(0, index_B)
                quality[name] = quality_BQ.masked_fill(~present_B[:, None], 0.0)
        state = SandwichState.begin(tokens, masks, medium, present_BM)._replace(quality=quality, own=own)
        for block in network.blocks:
            if isinstance(block, CompletionBlock):
                state = _completed(block, state)
            elif isinstance(block, BridgeBlock):
                state = block(state)
        output = network.head(state)
        made = {"output_BC": output.output_BC}
        if network.task != "regression":
            made["probability_BC"] = decision_probabilities(output.output_BC, network.task)
        if output.weight_BM is not None:
            made["weight_BM"] = output.weight_BM
        if output.conflict_B is not None:
            made["conflict_B"] = output.conflict_B
        if output.opinion is not None:
            made["vacuity_B"] = output.opinion.vacuity_B
        if network.config.completion is not None:
            made["completed_BM"] = output.completed_BM
        return made


def _completed(block: CompletionBlock, state: SandwichState) -> SandwichState:
    """What CompletionBlock does, for every record alike: completed tokens stand behind the modality's own, and are
    masked where the record needs none. Tokens have no places in the bridge, so it is the same as in their stead."""
    lacking_BM = ~state.present_BM & state.present_BM.any(dim=1, keepdim=True)
    tokens, masks = {}, {}
    for place, name in enumerate(block.names):
        completion: Any = block.completions[name]
        others = [other for other in block.names if other != name]
        made_BKD = completion({o: state.tokens[o] for o in others}, {o: state.masks[o] for o in others})
        lacking_BK = lacking_BM[:, place, None].expand(-1, made_BKD.shape[1])
        made_BKD = (made_BKD + completion.mark_D).masked_fill(~lacking_BK[..., None], 0.0)
        tokens[name] = torch.cat([state.tokens[name], made_BKD], dim=1)
        masks[name] = torch.cat([state.masks[name], lacking_BK], dim=1)
    return state._replace(tokens=tokens, masks=masks, present_BM=state.present_BM | lacking_BM, completed_BM=lacking_BM)


class FramedAudio(nn.Module):
    """AudioStem for graphs: convolves all samples, and takes the number of frames from what comes of it."""

    def __init__(self, stem: AudioStem) -> None:
        super().__init__()
        self.stem = stem
        for name, module in list(stem.named_modules()):
            if isinstance(module, nn.Conv1d) and parametrize.is_parametrized(module, "weight"):
                stem.set_submodule(name, _plain(module))  # else every run would compute its weights anew

    def forward(self, values: Given) -> Tokens:
        stem, mask_UT = self.stem, values["mask_UT"]
        frames_UTD = stem.projection(stem.features(values["samples_UT"]).transpose(1, 2))[0]
        place_T = torch.arange(frames_UTD.shape[1], device=mask_UT.device)
        # Without a division, which engines round in their own ways. Too short a sound is one frame.
        needed_T = place_T * math.prod(stride for _, stride in stem.steps) + stem.receptive_field
        frame_mask_UT = (needed_T <= mask_UT.sum(dim=1)[:, None]) | (place_T == 0)
        frames_UTD = frames_UTD.masked_fill(~frame_mask_UT[..., None], 0.0)  # or neighbours' places would show padding
        return Tokens(stem.norm(frames_UTD + stem.position(frames_UTD)), frame_mask_UT)


def _plain(conv: nn.Conv1d) -> nn.Conv1d:
    """With its weights as they come out. torch's own way back changes the class, which the copied model shares."""
    plain = nn.Conv1d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size[0],
        stride=conv.stride[0],
        padding=conv.padding[0],
        groups=conv.groups,
        bias=conv.bias is not None,
    )
    plain.requires_grad_(False)
    plain.weight.copy_(conv.weight)
    if plain.bias is not None and conv.bias is not None:
        plain.bias.copy_(conv.bias)
    return plain


class WindowedSignal(nn.Module):
    """SignalStem for graphs: the samples are a whole number of windows, as export.json asks."""

    def __init__(self, stem: SignalStem) -> None:
        super().__init__()
        self.stem = stem

    def forward(self, values: Given) -> Tokens:
        stem, mask_UT = self.stem, values["mask_UT"]
        samples_UCT = values["samples_UCT"].masked_fill(~mask_UT[:, None], 0.0)  # 0 * NaN would still be NaN
        window_UCNW = samples_UCT.unfold(2, stem.window, stem.stride)
        if stem.spectrum:
            power_UCNF = torch.fft.rfft(window_UCNW * stem.bell_W).abs().square() / stem.bell_W.square().sum()
            window_UCNW = (power_UCNF + FAINTEST).log()
        x_UTD = stem.embed(window_UCNW.transpose(1, 2).flatten(2))
        x_UTD = x_UTD + stem.place_ND[: x_UTD.shape[1]]
        place_T = torch.arange(x_UTD.shape[1], device=mask_UT.device)
        before_T = (place_T - 1) * stem.stride + stem.window  # samples that earlier windows see
        return Tokens(x_UTD, (before_T < mask_UT.sum(dim=1)[:, None]) | (place_T == 0))


def _exportable(stem: nn.Module) -> nn.Module:
    if isinstance(stem, AudioStem):
        return FramedAudio(stem)
    return WindowedSignal(stem) if isinstance(stem, SignalStem) else stem


class Taken(NamedTuple):
    """What an encoder takes."""

    example: Given
    dynamic: dict[str, dict[int, str]]
    length: dict[str, int] | None
    """Samples that its graph can divide: `first`, and as many times `step` more (0: no more)."""


def _half_masked(x_UT: Tensor) -> Tensor:
    """The mask of an example whose last medium is shorter: where a mask is all true, layers may do without."""
    mask_UT = torch.ones_like(x_UT).bool()
    mask_UT[-1, x_UT.shape[1] // 2 :] = False
    return mask_UT


def _taken(shape: Input, stem: nn.Module) -> Taken:
    """An example of three media, of a length that is no special one.

    Raises:
        ConfigError: it is of a kind that no graph takes yet.
    """
    open_both = {0: "media", 1: "length"}
    if isinstance(shape, TextInput):
        count = min(5, shape.max_tokens)
        ids_UT = torch.arange(3 * count).view(3, count) % shape.vocabulary_size
        return Taken(
            {"ids_UT": ids_UT, "mask_UT": _half_masked(ids_UT)},
            {"ids_UT": open_both, "mask_UT": open_both},
            None,
        )
    if isinstance(shape, ImageInput):
        pixels_UCHW = torch.zeros(3, shape.channels, shape.height, shape.width)
        return Taken({"pixels_UCHW": pixels_UCHW}, {"pixels_UCHW": {0: "media"}}, None)
    if isinstance(shape, TableInput):
        numbers_UN = torch.zeros(3, shape.num_numbers)
        categories_UK = torch.zeros(3, len(shape.category_sizes), dtype=torch.int64)
        example = {"numbers_UN": numbers_UN, "known_UN": numbers_UN == 0, "categories_UK": categories_UK}
        return Taken(example, {key: {0: "media"} for key in example}, None)
    if isinstance(shape, AudioInput) and isinstance(stem, AudioStem):
        samples_UT = torch.zeros(3, stem.receptive_field + 3 * math.prod(stride for _, stride in stem.steps) + 1)
        return Taken(
            {"samples_UT": samples_UT, "mask_UT": _half_masked(samples_UT)},
            {"samples_UT": open_both, "mask_UT": open_both},
            # Two frames at the least: one alone would be a length of its own kind to a graph.
            {"first": stem.receptive_field + math.prod(stride for _, stride in stem.steps), "step": 1},
        )
    if isinstance(shape, SignalInput) and isinstance(stem, SignalStem | VectorStem):
        first, step = (stem.num_numbers, 0) if isinstance(stem, VectorStem) else (stem.window, stem.stride)
        several = isinstance(stem, SignalStem) and stem.num_windows > 1
        further = step * min(2, stem.num_windows - 1) if isinstance(stem, SignalStem) else 0
        samples_UCT = torch.zeros(3, shape.num_channels, first + further)
        axes: dict[str, dict[int, str]] = {"samples_UCT": {0: "media"}, "mask_UT": {0: "media"}}
        if several:
            axes["samples_UCT"][2] = axes["mask_UT"][1] = "length"
        example = {"samples_UCT": samples_UCT, "mask_UT": _half_masked(samples_UCT[:, 0])}
        return Taken(example, axes, {"first": first + step if several else first, "step": step if several else 0})
    raise ConfigError(f"a {shape.kind} has no graph yet, so this model cannot be exported. Leave that column out.")


def cut(network: Sandwich, signature: Signature) -> Cut:
    """The graphs of a model; its weights are copied, so that nothing done to them reaches it.

    Raises:
        ConfigError: an input is of a kind that has no graph yet.
    """
    network = copy.deepcopy(network).eval().requires_grad_(False)
    names = {id(module): name for name, module in network.named_modules()}
    parts: dict[str, Part] = {}
    encoders: list[dict[str, Any]] = []
    given: Given = {}
    dynamic: dict[str, dict[int, str]] = {}
    for place, name in enumerate(network.names):
        shape = signature.inputs[name]
        taken = _taken(shape, network.embedders[name])
        column = Column(network, name, whole=isinstance(shape, ImageInput | TableInput))
        made = column(taken.example)
        parts[f"encoder-{place}"] = Part(column, taken.example, taken.dynamic, tuple(made))
        num_quality = len(shape.quality) if network.config.gate_quality else 0
        encoders.append(
            {
                "name": name,
                "kind": shape.kind,
                "graph": f"encoder-{place}",
                "inputs": list(taken.example),
                "outputs": list(made),
                "length": taken.length,
                # What stands for the modality where no record has it: masked tokens, no more than two.
                "nothing": {
                    key: [min(2, value.shape[1]), *value.shape[2:]] if key in TOKENS else list(value.shape[1:])
                    for key, value in made.items()
                },
                "quality": num_quality,
            }
        )
        for key, value in made.items():
            if not network.only_votes or key.startswith("own"):
                given[f"{key}_{place}"] = value
                dynamic[f"{key}_{place}"] = {0: f"media_{place}"}
                if key in TOKENS and value.shape[1] > 1:
                    dynamic[f"{key}_{place}"][1] = f"tokens_{place}"
        if num_quality:
            given[f"quality_UQ_{place}"] = torch.full((3, num_quality), 0.5)
            dynamic[f"quality_UQ_{place}"] = {0: f"media_{place}"}
        for key, value in {"index_B": torch.tensor([0, 1, 2, 1, 0]), "present_B": torch.arange(5) != place % 5}.items():
            given[f"{key}_{place}"] = value
            dynamic[f"{key}_{place}"] = {0: "records"}
    # What the encoders have is not the roof's: a graph would hold it all.
    network.embedders = ModulesByName({})
    network.blocks = nn.ModuleList([b for b in network.blocks if isinstance(b, CompletionBlock | BridgeBlock)])
    roof = Roof(network)
    parts["roof"] = Part(roof, given, dynamic, tuple(roof(given)))
    spec = {
        "encoders": encoders,
        "roof": {"graph": "roof", "inputs": list(given), "outputs": list(parts["roof"].outputs)},
    }
    layers = {
        names[id(module)]: Layer(graph, module)
        for graph, part in parts.items()
        for module in part.module.modules()
        if isinstance(module, nn.Linear | nn.Embedding) and module.weight.numel() >= FEWEST_WEIGHTS
    }
    return Cut(parts, spec, layers)
