"""Engines of exported graphs, as a search asks them.

Here        OpenVinoBackend, AlikeBackend; `fastest_floats`; `backends_named`, for what people write.
Elsewhere   what the search wants of a back end, and torch itself (candidate.py); exports (export.py); bits by layer
            (quantise.py, delivery.py).
Promise     a candidate is timed and judged as the very graphs that would be shipped; graphs of a model are converted
            once, however many bits are tried of it, so its weights must stay as they are from then on.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, cast

import torch

from dougong.bundle.exported import EngineConfig, EngineNetwork
from dougong.bundle.model import Model
from dougong.bundle.runtime import openvino_core
from dougong.compress.candidate import ALL, EAGER, Backend, Eager, Runner
from dougong.compress.delivery import number_bytes, plan_within, uniform_plans
from dougong.compress.export import DYNAMIC, Source, To, check_installed, export, open_engine
from dougong.compress.needs import needed
from dougong.compress.parts import Layer
from dougong.compress.plan import BF16, Compute, Plan, read_choice
from dougong.compress.quantise import QuantiseConfig, Quantised, calibrate, linear_of, round_layers
from dougong.compress.recover import RecoverConfig, recover
from dougong.compress.sensitivity import Seen, observe
from dougong.core.bundle import Manifest
from dougong.core.errors import ConfigError
from dougong.model.sandwich import SandwichOutput
from dougong.nn.batch import Batch

OPENVINO: Final = "openvino"
OPENVINO_BF16: Final = "openvino-bf16"
AUTO: Final = "auto"
ONNX: Final = "onnx"
INDUCTOR: Final = "inductor"
ENGINES: Final = (AUTO, EAGER, OPENVINO, OPENVINO_BF16, ONNX, INDUCTOR)
CALIBRATION_BATCHES: Final = 4
ROOM: Final = 0.97
"""Of a time, what a plan is made for: it is measured again before it is shipped."""


class GraphRunner:
    """An export that is open."""

    def __init__(
        self,
        source: Source,
        to: To,
        folder: Path,
        engine: EngineConfig,
        quantised: Quantised | None = None,
        *,
        dynamic: bool = False,
    ) -> None:
        self._source, self._to, self._quantised, self._dynamic = source, to, quantised, dynamic
        self.ship(folder, source.model.manifest)
        self.engine = open_engine(folder, engine)
        self.network = EngineNetwork(self.engine, list(source.model.manifest.signature.inputs))
        self.num_bytes = number_bytes(folder)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> SandwichOutput:
        return cast(SandwichOutput, self.network(batch))

    def ship(self, folder: Path, manifest: Manifest) -> None:
        export(self._source.told(manifest), folder, self._to, self._quantised, dynamic=self._dynamic)


class _Same:
    """Tells whether a model is the one it was made with, and has learnt nothing since."""

    def __init__(self, model: Model) -> None:
        self._model, self._versions = model, self._counted(model)

    def __call__(self, model: Model) -> bool:
        return model is self._model and self._counted(model) == self._versions

    @staticmethod
    def _counted(model: Model) -> list[int]:
        return [weight._version for weight in model.network.state_dict().values()]  # torch's count of changes in place


class _Prepared:
    """What several candidates of one model share."""

    def __init__(self, model: Model, calibration: Sequence[Batch]) -> None:
        self.is_of, self.source = _Same(model), Source(model)
        self._model = model
        self._calibration = calibration

    @functools.cached_property
    def seen(self) -> dict[str, Seen]:
        """What its layers are given; looked at where bits need it alone."""
        return observe(self._model.network.eval(), linear_of(self.source.cut.layers), self._calibration)

    @functools.cached_property
    def shown(self) -> Source:
        """The source, whose layers have the choices that these records allow."""
        return self.source.shown(self.seen)


def fastest_floats() -> Compute:
    """bf16 where this processor has units for it."""
    needed("openvino", "compress")
    return "bf16" if "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else "f32"


class OpenVinoBackend:
    """OpenVINO's kernels, with the bits of each layer. In bfloat16 it counts as an engine of its own: what is left in
    floating point takes half the time, and answers otherwise."""

    def __init__(
        self,
        engine: EngineConfig | None = None,
        quantise: QuantiseConfig | None = None,
        compute: Compute = "f32",
    ) -> None:
        """`engine`: None gives it as many threads as torch has, so that both are timed alike.

        Raises:
            ConfigError: it is not installed, or this processor has no units for `compute`.
        """
        needed("openvino", "compress")
        self.name = OPENVINO if compute == "f32" else OPENVINO_BF16
        if compute == BF16 and fastest_floats() != BF16:
            raise ConfigError(f"{self.name}: this processor has no units for bfloat16. Use --engine {OPENVINO}.")
        self._compute: Compute = compute
        self._engine = engine or EngineConfig(threads=torch.get_num_threads())
        self._quantise = quantise or QuantiseConfig()
        self._last: _Prepared | None = None

    def options(self) -> Sequence[Mapping[str, str]]:
        rounded = [{ALL: choice} for choice in ("w16a16", "w8a16", "w8a8", "w4a16")]
        return rounded if self._compute == BF16 else [{}, *rounded]

    def carry_out(
        self,
        model: Model,
        bits: Mapping[str, str],
        calibration: Sequence[Batch],
        folder: Path,
        *,
        nearest: bool = False,
    ) -> Runner:
        prepared = self._prepared(model, calibration)
        layers = prepared.source.cut.layers
        quantised = None
        if bits:
            plan, seen = self._plan(bits, layers), None
            if any(choice in ("w8a8", "w4a16") for choice in plan.layers.values()):
                seen, layers = prepared.seen, prepared.shown.cut.layers
                plan = self._plan(bits, layers)
            correct = self._quantise.error_correction and not nearest
            quantised = round_layers(layers, plan, seen, correct=correct)
        return GraphRunner(prepared.source, "openvino", folder, self._engine, quantised)

    def recover(
        self, model: Model, bits: Mapping[str, str], calibration: Sequence[Batch], config: RecoverConfig
    ) -> Model:
        prepared, task = self._prepared(model, calibration), model.preparation.target.task
        plan = self._plan(bits, prepared.shown.cut.layers)
        taught = recover(model.network, plan, prepared.seen, calibration, task, config)
        return Model(taught, model.preparation, model.manifest)

    def fill(
        self,
        model: Model,
        calibration: Sequence[Batch],
        timed: Batch,
        most_bytes: float | None,
        most_seconds: float | None,
    ) -> Mapping[str, str]:
        prepared, task = self._prepared(model, calibration), model.preparation.target.task
        layers = prepared.source.cut.layers
        known = calibrate(model.network, layers, calibration[:CALIBRATION_BATCHES], task, self._quantise)
        source = prepared.source.shown(known.seen)
        with tempfile.TemporaryDirectory() as temporary:
            plan = plan_within(
                source,
                known,
                timed,
                Path(temporary),
                most_bytes=most_bytes,
                most_seconds=None if most_seconds is None else ROOM * most_seconds,
                compute=self._compute,
                quantise=self._quantise,
                engine=self._engine,
                counted=number_bytes,
            )
        return dict(plan.layers)

    def _plan(self, bits: Mapping[str, str], layers: Mapping[str, Layer]) -> Plan:
        if set(bits) == {ALL}:
            return uniform_plans(layers, self._compute)[read_choice(bits[ALL])]
        return Plan(layers={name: read_choice(choice) for name, choice in bits.items()}, compute=self._compute)

    def _prepared(self, model: Model, calibration: Sequence[Batch]) -> _Prepared:
        if self._last is None or not self._last.is_of(model):
            self._last = _Prepared(model, calibration[:CALIBRATION_BATCHES])
        return self._last


class AlikeBackend:
    """An engine that carries a model out as it is, or rounds all layers to 8 bits alike: ONNX Runtime, or torch's
    compiler with torchao."""

    def __init__(self, to: Literal["onnx", "inductor"], engine: EngineConfig | None = None) -> None:
        """
        Raises:
            ConfigError: what it takes is not installed.
        """
        check_installed(to)
        self.name: str = to
        self._to: To = to
        self._engine = engine or EngineConfig(threads=torch.get_num_threads())
        self._last: tuple[_Same, Source] | None = None

    def options(self) -> Sequence[Mapping[str, str]]:
        return [{}, {ALL: DYNAMIC}]

    def carry_out(
        self,
        model: Model,
        bits: Mapping[str, str],
        calibration: Sequence[Batch],
        folder: Path,
        *,
        nearest: bool = False,
    ) -> Runner:
        if self._last is None or not self._last[0](model):
            self._last = _Same(model), Source(model)
        return GraphRunner(self._last[1], self._to, folder, self._engine, dynamic=bool(bits))

    def recover(
        self, model: Model, bits: Mapping[str, str], calibration: Sequence[Batch], config: RecoverConfig
    ) -> Model:
        raise ConfigError(f"{self.name} rounds weights itself, as it likes. Use --engine openvino for recovery.")

    def fill(
        self,
        model: Model,
        calibration: Sequence[Batch],
        timed: Batch,
        most_bytes: float | None,
        most_seconds: float | None,
    ) -> Mapping[str, str]:
        raise ConfigError(f"{self.name} rounds all layers alike. Use --engine openvino for bits by layer.")


def backends_named(name: str) -> tuple[Backend, ...]:
    """What `--engine` says; auto is all that are installed, but for inductor: each candidate would be compiled for
    minutes, and what comes of it is code, which opens only where it is trusted.

    Raises:
        ConfigError: it is none, or its library is not installed.
    """
    if name not in ENGINES:
        raise ConfigError(f"--engine {name!r} is none. Use one of {', '.join(ENGINES)}.")
    found: list[Any] = [Eager()] if name in (AUTO, EAGER) else []
    makers: dict[str, Callable[[], Any]] = {
        OPENVINO: OpenVinoBackend,
        OPENVINO_BF16: functools.partial(OpenVinoBackend, compute=BF16),
        ONNX: functools.partial(AlikeBackend, ONNX),
        INDUCTOR: functools.partial(AlikeBackend, INDUCTOR),
    }
    for engine, make in makers.items():
        if name != engine and (name != AUTO or engine == INDUCTOR):
            continue
        try:
            found.append(make())
        except ConfigError:
            if name != AUTO:
                raise
    return tuple(found)
