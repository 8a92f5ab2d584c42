"""A bundle as graphs that run without Dougong.

Here        Source, `export` (ONNX, OpenVINO, torch.export or AOTInductor, at a plan's bits), `open_engine`,
            `fastest_kind`, `answering_bytes`.
Elsewhere   where a model is cut into graphs (parts.py); answering with them here (bundle/exported.py) and anywhere
            (bundle/runtime.py); bits (quantise.py).
Promise     the folder is a bundle: sums, signature, preparation, whole or absent. It answers as its source does, within
            what its number formats round; two exports of one bundle are the same to the byte, but for those that a
            compiler made of this machine's instructions; nothing in it is a pickle, and `run.py` in it needs no
            Dougong.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch
import torch._inductor
from torch import nn
from torch._inductor.exc import InvalidCxxCompiler

from dougong.bundle import runtime
from dougong.bundle.exported import KIND, PACKAGES, Engine, EngineConfig, GraphEngine
from dougong.bundle.model import Model
from dougong.compress.clock import Timed
from dougong.compress.engines.eager import Eager, fastest
from dougong.compress.engines.openvino import OpenVino, apply_bits, name_layers, to_graph, write_graph
from dougong.compress.needs import needed
from dougong.compress.parts import Part, cut
from dougong.compress.plan import BF16, CHOICES
from dougong.compress.quantise import Quantised, shown_of
from dougong.compress.sensitivity import Seen
from dougong.core.bundle import Manifest, write_bundle
from dougong.core.errors import ConfigError
from dougong.core.files import write_atomic, write_json
from dougong.core.sizes import bytes_as_text
from dougong.nn.batch import Batch

RUNTIME: Final = "run.py"
To = Literal["openvino", "onnx", "torch", "inductor"]
OPSET: Final = 20
DYNAMIC: Final = "dynamic-w8a8"
"""What export.json says of layers whose inputs are rounded by each batch's own range."""
MEMORY_STEP: Final = 32 * 2**20

_NEEDS: Final[dict[str, tuple[str, ...]]] = {
    "openvino": ("openvino",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "torch": (),
    "inductor": (),
}
MEASURED: Final[tuple[To, ...]] = ("openvino", "onnx", "torch")
"""What auto tries: compiling takes minutes, and what comes of it runs on this kind of machine alone."""

ROUND_THEMSELVES: Final = ("onnx", "inductor")


class Source:
    """A model cut into graphs, and what of them has been converted already: several exports of one model share it."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.cut = cut(model.network, model.manifest.signature)
        self._programs: dict[str, torch.export.ExportedProgram] = {}
        self._graphs: dict[str, Any] = {}

    def program(self, name: str) -> torch.export.ExportedProgram:
        """A part as torch exports it."""
        if name not in self._programs:
            self._programs[name] = exported_program(self.cut.parts[name])
        return self._programs[name]

    def graph(self, name: str) -> Any:
        """A part as OpenVINO has it, for whoever changes it."""
        if name not in self._graphs:
            self._graphs[name] = to_graph(self.cut.parts[name])
        return self._graphs[name].clone()

    def shown(self, seen: Mapping[str, Seen]) -> Source:
        """The same, whose layers have the choices that calibration records allow."""
        other = copy.copy(self)
        other.cut = self.cut._replace(layers=shown_of(self.cut.layers, seen))
        return other

    def told(self, manifest: Manifest) -> Source:
        """The same, of which the manifest tells something else; what was converted is shared."""
        other = copy.copy(self)
        other.model = Model(self.model.network, self.model.preparation, manifest)
        return other


def check_installed(to: To) -> None:
    """
    Raises:
        ConfigError: what such exports are made with is not installed.
    """
    for module in _NEEDS[to]:
        needed(module, "compress")
    if to == "inductor":
        builder = importlib.import_module("torch._inductor.cpp_builder")
        try:
            builder.get_cpp_compiler()
        except InvalidCxxCompiler:
            raise ConfigError("inductor compiles with a C++ compiler, and there is none here. Install g++.") from None


def export(
    source: Source,
    folder: Path,
    to: To,
    quantised: Quantised | None = None,
    memory_bytes: int | None = None,
    *,
    dynamic: bool = False,
) -> Path:
    """Write the export; an older one at that place is replaced at once and whole.

    Without `quantised`, weights keep the bits that the bundle has. Bits are chosen for OpenVINO alone, whose kernels
    carry out each of them; with `dynamic`, ONNX Runtime, or torchao before AOTInductor, rounds weights to 8 bits, and
    what layers are given by each batch's own range. `memory_bytes` is what its card says that answering takes.

    Raises:
        ConfigError: the library or the compiler is not installed, bits are asked of another than OpenVINO, or an input
            has no graph.
        BundleError: the folder holds something else.
    """
    check_installed(to)
    if quantised is not None and to != "openvino":
        raise ConfigError(f"bits are chosen for openvino alone, and {to} was asked for. Use --to openvino.")
    if dynamic and to not in ROUND_THEMSELVES:
        raise ConfigError(f"inputs are rounded by each batch's range for onnx or inductor, and {to} was asked for.")
    model, made = source.model, source.cut
    spec: dict[str, Any] = {
        "format": "dougong-export",
        "format_version": 1,
        "to": to,
        "compute": "f32" if quantised is None else quantised.plan.compute,
        **made.spec,
        "layers": {
            name: DYNAMIC
            if dynamic
            else "as it was"
            if quantised is None
            else quantised.plan.layers.get(name, CHOICES[0])
            for name in made.layers
        },
        "target": model.preparation.target.model_dump(mode="json"),
    }
    manifest = Manifest(
        name=model.manifest.name,
        signature=model.manifest.signature,
        model={"kind": KIND, "to": to, "compute": spec["compute"], "layers": spec["layers"]},
        provenance={**model.manifest.provenance, "exported_from": _origin(model.manifest)},
        metrics=model.manifest.metrics,
    )
    with write_bundle(folder, manifest) as building:
        model.preparation.save(building)
        (building / runtime.GRAPHS).mkdir()
        graphs = building / runtime.GRAPHS
        if to == "openvino":
            _write_openvino(source, graphs, quantised)
        elif to == "onnx":
            _write_onnx(source, graphs)
            if dynamic:
                _round_by_batch(graphs)
        elif to == "torch":
            _write_torch(source, graphs)
        else:
            _write_compiled(source, graphs, dynamic=dynamic)
        write_json(building / runtime.EXPORT, spec)
        write_atomic(building / RUNTIME, Path(runtime.__file__).read_text(encoding="utf-8"))
        size = sum(path.stat().st_size for path in (building / runtime.GRAPHS).iterdir())
        write_atomic(building / "README.md", _card(manifest, to, size, quantised, memory_bytes))
    return folder


def _origin(manifest: Manifest) -> dict[str, str]:
    return {name: each.sha256 for name, each in manifest.files.items() if name.endswith(".safetensors")}


def _write_openvino(source: Source, folder: Path, quantised: Quantised | None) -> None:
    for name in source.cut.parts:
        graph = source.graph(name)
        own = {key: layer.module.weight for key, layer in source.cut.layers.items() if layer.graph == name}
        operations = name_layers(graph, own)
        lost = sorted(own.keys() - operations.keys())
        assert not lost, f"{name} has lost {lost} on the way through its exporter"
        if quantised is not None:
            apply_bits(operations, quantised)
        write_graph(graph, folder / f"{name}.xml", operations, half=quantised is not None)


def _write_onnx(source: Source, folder: Path) -> None:
    for name in source.cut.parts:
        write_atomic(folder / f"{name}.onnx", _as_onnx(source.cut.parts[name], source.program(name)))


def _round_by_batch(folder: Path) -> None:
    quantization = needed("onnxruntime.quantization", "compress")
    for path in sorted(folder.iterdir()):
        rounded = path.with_suffix(".rounded")
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            quantization.quantize_dynamic(str(path), str(rounded), weight_type=quantization.QuantType.QInt8)
        rounded.replace(path)


def _write_torch(source: Source, folder: Path) -> None:
    for name in source.cut.parts:
        torch.export.save(source.program(name), folder / f"{name}.pt2")


def _write_compiled(source: Source, folder: Path, *, dynamic: bool) -> None:
    """Libraries of this processor's instructions, by AOTInductor; with `dynamic`, torchao rounds before."""
    for name, part in source.cut.parts.items():
        program = exported_program(_rounded_by_torchao(part) if dynamic else part)
        program.example_inputs = ((part.example,), {})
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch._inductor.aoti_compile_and_package(program, package_path=str(folder / f"{name}.pt2"))


def _rounded_by_torchao(part: Part) -> Part:
    quantization, subclasses = needed("torchao.quantization", "compress"), needed("torchao.utils", "compress")
    module = copy.deepcopy(part.module)
    config = quantization.Int8DynamicActivationInt8WeightConfig()
    quantization.quantize_(module, config, filter_fn=lambda each, _: isinstance(each, nn.Linear))
    subclasses.unwrap_tensor_subclass(module)
    return part._replace(module=module)


def exported_program(part: Part) -> torch.export.ExportedProgram:
    """A part as torch exports it, with open axes."""
    # Named dimensions would refuse guards that hold of no length that is ever given.
    shapes = {key: dict.fromkeys(part.dynamic[key], torch.export.Dim.AUTO) for key in part.example}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own deprecations, of which no reader can do anything
        program = torch.export.export(part.module, (part.example,), dynamic_shapes=(shapes,))
    _check_open(part, program)
    program.example_inputs = None
    for node in program.graph.nodes:
        # Paths of this machine, and lines of files that a reader does not have.
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn"):
            node.meta.pop(key, None)
    return program


def _check_open(part: Part, program: torch.export.ExportedProgram) -> None:
    """Hold that no axis that is to be open was fixed to the example's length on the way."""
    names = list(program.graph_signature.user_inputs)
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    for key, name in zip(part.example, names, strict=True):
        for axis in part.dynamic[key]:
            length = nodes[str(name)].meta["val"].shape[axis]
            assert not isinstance(length, int), f"axis {axis} of {key} was fixed to {length}"


def _as_onnx(part: Part, program: torch.export.ExportedProgram) -> bytes:
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):  # it tells of operators of torchvision
        warnings.simplefilter("ignore")
        made = torch.onnx.export(
            program,
            input_names=list(part.example),
            output_names=[f"{name}_out" for name in part.outputs],  # some inputs are passed on
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert made is not None
    proto = made.model_proto
    _without_traces(proto)
    return cast(bytes, proto.SerializeToString(deterministic=True))


def _without_traces(proto: Any) -> None:
    """Leave out what only tells of the machine that exported it."""
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info, *proto.graph.initializer):
        del value.metadata_props[:]
    del proto.metadata_props[:]
    del proto.graph.metadata_props[:]
    proto.doc_string = proto.graph.doc_string = ""


def open_engine(folder: Path, config: EngineConfig | None = None, *, profile: bool = False) -> GraphEngine:
    """An export that was just made, as an engine: what is opened may be code, and is not checked again."""
    engine = GraphEngine(folder, config)
    needed(PACKAGES[engine.kind], "compress")
    return OpenVino(folder, config, profile=profile) if engine.kind == "openvino" else engine


def fastest_kind(source: Source, batch: Batch, config: EngineConfig | None = None) -> tuple[str, dict[str, Timed]]:
    """Which engine answers this batch fastest here, and what was measured of each that is installed, eager beside."""
    with tempfile.TemporaryDirectory() as temporary:
        engines: dict[str, Engine] = {"eager": Eager(source.model.network, config)}
        for to in MEASURED:
            try:
                engines[to] = open_engine(export(source, Path(temporary) / to, to), config)
            except ConfigError:
                continue
        return fastest(engines, batch)


def answering_bytes(folder: Path, records: Path) -> int:
    """The most memory that the folder's own run.py had while it answered these records (.jsonl), in a process of its
    own, libraries included; rounded up, so that two measurements mostly agree."""
    code = (
        "import resource, runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, str(folder / RUNTIME), str(records)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603, our own file
    return -(-int(done.stderr.split()[-1]) * 1024 // MEMORY_STEP) * MEMORY_STEP


def _card(manifest: Manifest, to: str, size: int, quantised: Quantised | None, memory_bytes: int | None) -> str:
    lines = [
        f"# {manifest.name}, exported",
        "",
        f"Predicts `{manifest.signature.target.name}` from {', '.join(manifest.signature.inputs)}, with {to}. "
        f"Its graphs take {bytes_as_text(size)}.",
        "",
        "    python run.py RECORDS.jsonl ANSWERS.jsonl     where Dougong is not installed",
        "    dougong predict FOLDER RECORDS ANSWERS        where it is",
        "",
        f"`run.py` is all of the runtime: it needs NumPy, {PACKAGES[to]}, and what reads the media at hand. "
        "Inputs and their preparation stand in `preparation.json`, what each graph is fed in `export.json`.",
        "",
    ]
    if memory_bytes is not None:
        lines += [f"Answering takes up to {bytes_as_text(memory_bytes)} of memory, libraries included.", ""]
    if manifest.metrics:
        lines += ["## Measured", "", "| condition | figure | value |", "|---|---|---|"]
        lines += [f"| {c} | {name} | {value:.4f} |" for c, of in manifest.metrics.items() for name, value in of.items()]
        lines.append("")
    if quantised is not None:
        lines += ["## Bits of the layers", "", "| weights and activations | layers |", "|---|---|"]
        lines += [f"| {choice} | {count} |" for choice, count in quantised.plan.counts().items()]
        if quantised.plan.compute == BF16:
            lines += ["", "What is not computed in whole numbers is computed in bfloat16, where the processor has it."]
        lines.append("")
    return "\n".join(lines)
