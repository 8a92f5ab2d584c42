"""OpenVINO: graphs in which each layer computes with the bits that it was given.

Here        `to_graph` (a part as OpenVINO has it), `apply_bits` (a plan put into it), `write_graph`;
            OpenVino, the engine, which tells what ran and how long each layer took.
Elsewhere   the rounded weights (compress/bits.py); other engines (eager.py, bundle/exported.py).
Promise     layers keep the model's names through conversion, files and compilation; two graphs of one model are the
            same to the byte; nothing is simulated: weights of 4 and 8 bits lie in the graph as such, and inputs of 8
            bits are rounded before the product, by the engine's own kernels.

A layer is found in the graph by its weights' values: exporters rename and transpose, but change no number.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dougong.bundle import runtime
from dougong.bundle.exported import EngineConfig, GraphEngine
from dougong.compress.bits import Range, Rounded
from dougong.compress.needs import needed
from dougong.compress.parts import Part
from dougong.compress.quantise import Quantised
from dougong.nn.batch import Batch

Array = npt.NDArray[Any]
BIAS: Final = "/bias"
MOST_AXES: Final = 5
"""That a mean's own kernel knows."""

MANY: Final = 256
"""Floats in one piece from which on it counts how they are stored."""

HALF_LARGEST: Final = float(np.finfo(np.float16).max)
WHOLE_NUMBERS: Final = ("i8", "u8", "i4", "u4")
PASSED: Final = ("Convert", "Transpose", "Reshape", "Unsqueeze", "Squeeze")


def to_graph(part: Part) -> Any:
    """A part as OpenVINO has it, with the part's own names of inputs and outputs, and open axes.

    It is traced, several times faster than torch exports it; what would be decided by an example's values is decided by
    masks, of which the examples have some (parts.py).
    """
    openvino = needed("openvino", "compress")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's own deprecations, and of the decisions said above
        trace: Any = torch.jit.trace  # torch ships it without types
        traced = trace(_Flat(part), tuple(part.example.values()), strict=False, check_trace=False)
        graph = openvino.convert_model(traced, example_input=tuple(part.example.values()))
    shapes = {}
    for given, (name, value) in zip(graph.inputs, part.example.items(), strict=True):
        given.get_tensor().set_names({name})
        given.get_node().set_friendly_name(name)
        shapes[name] = [-1 if axis in part.dynamic[name] else side for axis, side in enumerate(value.shape)]
    assert len(graph.outputs) == len(part.outputs), "every output is told apart by its place"
    graph.reshape({name: openvino.PartialShape(shape) for name, shape in shapes.items()})
    _flatten_means(graph)
    return graph


def _flatten_means(graph: Any) -> None:
    """Average over one axis of three after the other, where there are more axes than kernels know (neighbouring patches
    of a picture are a mean over two of six): the library's reference code took a fifth of a small model's time."""
    ops = needed("openvino.opset13", "compress")
    for operation in graph.get_ordered_ops():
        shape = operation.input_value(0).get_partial_shape() if operation.get_input_size() else None
        if operation.get_type_name() != "ReduceMean" or shape is None or len(shape) <= MOST_AXES:
            continue
        sides = [side.get_length() if side.is_static else -1 for side in shape]
        axes = sorted(int(axis) % len(sides) for axis in _constant(operation, 1).get_data().ravel())
        left = [side for place, side in enumerate(sides) if place not in axes]
        if operation.get_attributes()["keep_dims"] or -1 in sides[1:] or 0 in axes:
            continue
        value = operation.input_value(0)
        for axis in reversed(axes):
            after = math.prod(side for place, side in enumerate(sides) if place > axis and place not in axes)
            flat = ops.reshape(value, np.array([-1, sides[axis], after], np.int64), special_zero=False)
            value = ops.reduce_mean(flat, np.array([1], np.int64), keep_dims=False)
        whole = ops.reshape(value, np.array([-1, *left[1:]], np.int64), special_zero=False)
        for target in operation.output(0).get_target_inputs():
            target.replace_source_output(whole.output(0))


class _Flat(nn.Module):
    """A part that takes and gives tensors in a row."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.module = part.module
        self.names = tuple(part.example)

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.module(dict(zip(self.names, given, strict=True))).values())


def name_layers(graph: Any, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Give the operations that use these weights the layers' names; returns them by name."""
    arrays = {name: weight.detach().numpy() for name, weight in weights.items()}
    # Squeezed as constants are: a map to one number may have become a vector on the way.
    wanted = {_digest(np.squeeze(array)): name for name, array in arrays.items()}
    wanted |= {_digest(np.squeeze(array.T)): name for name, array in arrays.items()}
    found: dict[str, Any] = {}
    for operation in graph.get_ordered_ops():
        kind = operation.get_type_name()
        if kind not in ("MatMul", "Gather"):
            continue
        constant = _constant(operation, 0 if kind == "Gather" else 1)
        if constant is not None:
            name = wanted.get(_digest(np.squeeze(constant.get_data())))
            if name is not None and name not in found:
                operation.set_friendly_name(name)
                found[name] = operation
    return found


def _bias(operation: Any) -> Any:
    """The sum with a constant that a product goes into, if into nothing else; None where there is none."""
    targets = list(operation.output(0).get_target_inputs())
    if len(targets) != 1 or targets[0].get_node().get_type_name() != "Add":
        return None
    following = targets[0].get_node()
    return following if any(_constant(following, place) is not None for place in range(2)) else None


def _constant(operation: Any, place: int) -> Any:
    """The constant that an input comes from, however it is converted or turned; None where there is none."""
    node = operation.input_value(place).get_node()
    while node.get_type_name() in PASSED:
        node = node.input_value(0).get_node()
    return node if node.get_type_name() == "Constant" else None


def _digest(array: Array) -> tuple[tuple[int, ...], bytes]:
    content = np.ascontiguousarray(array, np.float32)
    return content.shape, hashlib.blake2b(content.tobytes(), digest_size=16).digest()


def apply_bits(operations: Mapping[str, Any], quantised: Quantised) -> None:
    """Give layers the plan's numbers, in place: rounded weights, and rounding of inputs where those have 8 bits."""
    rounding: dict[Any, Any] = {}
    for name, operation in operations.items():
        if name in quantised.weights:
            weights = _widened(quantised.weights[name])
            if operation.get_type_name() == "Gather":
                operation.input(0).replace_source_output(weights.output(0))
            else:
                operation.set_transpose_b(True)
                operation.input(1).replace_source_output(weights.output(0))
        if name in quantised.ranges:
            source = operation.input_value(0)
            key = (source.get_node().get_friendly_name(), source.get_index(), quantised.ranges[name])
            if key not in rounding:  # layers that are given the same share its rounding
                rounding[key] = _rounding(source, quantised.ranges[name])
            operation.input(0).replace_source_output(rounding[key].output(0))


def _widened(rounded: Rounded) -> Any:
    """Whole numbers in the graph, and the scales that make weights of them: kernels of 4 and 8 bits know this form."""
    openvino = needed("openvino", "compress")
    ops = needed("openvino.opset13", "compress")
    number_OI, scale_OG = rounded.number_OI.numpy(), rounded.scale_OG.numpy()
    rows, columns = number_OI.shape
    if rounded.zero_OG is None:
        numbers = ops.convert(ops.constant(number_OI, openvino.Type.i8), "f32")
        return ops.multiply(numbers, ops.constant(scale_OG, openvino.Type.f32))
    groups = scale_OG.shape[1]
    packed = ops.constant(number_OI.reshape(rows, groups, -1), openvino.Type.u4)
    zeros = ops.constant(rounded.zero_OG.numpy()[..., None], openvino.Type.u4)
    shifted = ops.subtract(ops.convert(packed, "f16"), ops.convert(zeros, "f16"))
    scaled = ops.multiply(shifted, ops.constant(scale_OG[..., None].astype(np.float16), openvino.Type.f16))
    shape = ops.constant(np.array([rows, columns], np.int64))
    return ops.convert(ops.reshape(scaled, shape, special_zero=False), "f32")


def _rounding(source: Any, range_: Range) -> Any:
    ops = needed("openvino.opset13", "compress")
    low, high = (ops.constant(np.array(value, np.float32)) for value in range_)
    return ops.fake_quantize(source, low, high, low, high, 256)


def write_graph(graph: Any, path: Path, layers: Mapping[str, Any], *, half: bool) -> None:
    """Write graph and weights; `half`: what is left in float32 is stored as float16."""
    openvino = needed("openvino", "compress")
    if half:
        _store_in_half(graph)
    kept = {id_of(operation) for operation in layers.values()}
    for name, operation in layers.items():
        bias = _bias(operation)
        if bias is not None:  # a product and its bias become one, which has the name of either
            bias.set_friendly_name(f"{name}{BIAS}")
            kept.add(id_of(bias))
    for place, operation in enumerate(graph.get_ordered_ops()):
        kind = operation.get_type_name()
        # The library numbers its operations from one count for the whole process.
        if id_of(operation) not in kept and kind != "Parameter":
            operation.set_friendly_name(f"{kind}_{place}")
            for made in operation.outputs() if kind != "Result" else ():  # a result's is what it passes on
                made.get_tensor().set_names(set())
    graph.set_friendly_name(path.stem)  # which is numbered too
    openvino.save_model(graph, path, compress_to_fp16=half)


def _store_in_half(graph: Any) -> None:
    """Floats that are many become float16, widened again where they are used. The library does that by itself
    (`save_model`), but for graphs that hold whole numbers."""
    openvino = needed("openvino", "compress")
    ops = needed("openvino.opset13", "compress")
    constants = [operation for operation in graph.get_ordered_ops() if operation.get_type_name() == "Constant"]
    if not any(each.get_output_element_type(0).get_type_name() in WHOLE_NUMBERS for each in constants):
        return
    for operation in constants:
        if operation.get_output_element_type(0) != openvino.Type.f32:
            continue
        numbers = operation.get_data()
        targets = list(operation.output(0).get_target_inputs())
        if numbers.size < MANY or np.abs(numbers).max() > HALF_LARGEST or any(map(_is_scaled, targets)):
            continue
        wide = ops.convert(ops.constant(numbers.astype(np.float16), openvino.Type.f16), "f32")
        for target in targets:
            target.replace_source_output(wide.output(0))


def _is_scaled(target: Any) -> bool:
    """Whether this is where whole numbers meet their scales: kernels know that by its form."""
    node = target.get_node()
    if node.get_type_name() != "Multiply":
        return False
    return any(node.input_value(place).get_node().get_type_name() == "Convert" for place in range(2))


def id_of(operation: Any) -> str:
    """What tells operations of one process apart, whatever they are called."""
    return str(operation.get_name())


class OpenVino(GraphEngine):
    """An export for OpenVINO."""

    def __init__(self, folder: Path, config: EngineConfig | None = None, *, profile: bool = False) -> None:
        """`profile`: count the time of each operation, which takes some itself."""
        super().__init__(folder, config)
        self._profile = profile
        self._layers = frozenset(self.spec["layers"])
        self._graphs: runtime.OpenVinoGraphs | None = None
        self.asked: list[str] = []
        """The graphs that the last batch was given to."""

    def opened(self, contents: Mapping[str, bytes]) -> runtime.Call:
        self._graphs = runtime.OpenVinoGraphs(self.spec, contents, self.config.threads, profile=self._profile)
        return self._noting

    def run(self, batch: Batch) -> dict[str, Tensor]:
        self.asked = []
        return super().run(batch)

    @property
    def graphs(self) -> runtime.OpenVinoGraphs:
        _ = self.call  # which opens them
        assert self._graphs is not None
        return self._graphs

    def _noting(self, name: str, given: runtime.Arrays) -> runtime.Arrays:
        self.asked.append(name)
        return self.graphs(name, given)

    def precisions(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for operation in self.graphs.open(runtime.WHOLE).get_runtime_model().get_ordered_ops():
            names = [name.removesuffix(BIAS) for name in _told(operation, "originalLayersNames").split(",")]
            for name in self._layers.intersection(names):
                found[name] = _precision(operation)
        return found

    def seconds(self) -> dict[str, float]:
        """Of the last batch: each layer's time, rounding of its inputs included, and under "" all the rest."""
        found: dict[str, float] = {"": 0.0}
        for part in self.asked:
            for told in self.graphs.requests[part].profiling_info:
                key = self._owner(told.node_name)
                found[key] = found.get(key, 0.0) + told.real_time.total_seconds()
        return found

    def _owner(self, operation: str) -> str:
        operation = operation.removesuffix(BIAS)
        if operation in self._layers:
            return operation
        # A change of format before a layer is called "from_f32_u8_layer".
        return next((name for name in self._layers if operation.endswith(f"_{name}")), "")


def _precision(operation: Any) -> str:
    """Of a compiled layer: its weights' format, and its inputs'. A look-up is given numbers of places alone."""
    sources = [operation.input_value(place).get_node() for place in range(operation.get_input_size())]
    if _told(operation, "layerType") == "Convert":  # a change of format that follows a layer, and has its name
        return _precision(sources[0])
    formats = [_told(node, "outputPrecisions") for node in sources if _told(node, "layerType") == "Const"]
    few = [found for found in formats if found in ("u4", "i4", "u8", "i8")]
    # Scales and zero points are constants too; without any of few bits, the widest is the weights'.
    weights = few[0] if few else next((found for found in formats if found.startswith(("f", "b"))), "?")
    inputs = next((_told(node, "outputPrecisions") for node in sources if _told(node, "layerType") != "Const"), "?")
    return f"{weights}/{inputs}"


def _told(operation: Any, key: str) -> str:
    told = operation.get_rt_info()
    return str(told[key].astype(str)) if key in told else ""
