"""Judges a model on a split.

Here        Evaluation, `evaluate`, `evaluating`.
Elsewhere   the figures (engine/metrics.py); comparing conditions and drawing them (recipes/, watch/).
Promise     the model is left as it was, each module in the mode it had; every record that the loader gives is in
            the result with its row number, and those it set aside are listed.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dougong.core.signature import Target
from dougong.data.batch import BadRecord
from dougong.data.position import Loader
from dougong.engine.batches import to_tensors
from dougong.engine.metrics import DecisionMetrics, decide, in_own_units
from dougong.engine.precision import Chosen, autocast
from dougong.engine.step import Loss
from dougong.nn.block_stack import BlockStack


@dataclass(frozen=True)
class Evaluation:
    """What a model did. Shapes: B records, all of them; C classes."""

    metrics: dict[str, float]
    """Empty where no record's target is known."""

    confusion: npt.NDArray[np.int64] | None
    """Single label: rows are true classes, columns predicted ones."""

    num_records: int
    row_B: npt.NDArray[np.int64]
    prediction_B: npt.NDArray[Any]
    """Label index (B,), ones and zeros (B, C), or a value in the target's units (B,)."""

    probability_BC: npt.NDArray[np.float32] | None
    """None for regression."""

    target_B: npt.NDArray[Any] | None
    """As `prediction_B`; None where the loader knows none."""

    gate: dict[str, float]
    """Each modality's mean share of the fused vector; empty for a model without a gate."""

    bad: tuple[BadRecord, ...]
    seconds: float


def evaluate(
    model: BlockStack[Any, Any],
    loader: Loader,
    target: Target,
    *,
    precision: Chosen | None = None,
    loss: Loss | None = None,
) -> Evaluation:
    """Judge `model` on every record of the loader. Its output must have `output_BC`, and may have `weight_BM`.

    `precision=None` computes as the caller's surroundings do: the trainer sets them to the run's own precision.
    With `loss`, its mean per record is among the metrics.
    """
    started = time.perf_counter()
    device = next(model.parameters()).device
    metrics = DecisionMetrics(target, device)
    rows: list[npt.NDArray[np.int64]] = []
    bad: list[BadRecord] = []
    predictions: list[Tensor] = []
    probabilities: list[Tensor] = []
    targets: list[Tensor] = []
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    gate_sum_M: Tensor | None = None
    modalities: list[str] = []

    with torch.inference_mode(), evaluating(model):
        for arrays in loader.one_pass():
            bad += arrays.bad
            if not len(arrays.row_B):
                continue
            batch = to_tensors(arrays, device)
            with contextlib.nullcontext() if precision is None else autocast(precision, device.type):
                output = model(batch)
                if loss is not None and batch.target is not None:
                    loss_sum += loss(output, batch).double()
            decided = decide(target, output.output_BC)
            rows.append(arrays.row_B)
            predictions.append(decided.prediction_B)
            if decided.probability_BC is not None:
                probabilities.append(decided.probability_BC)
            if batch.target is not None:
                metrics.update(decided, batch.target)
                targets.append(batch.target)
            weight_BM = getattr(output, "weight_BM", None)
            if weight_BM is not None:
                modalities = list(batch.media)
                summed_M = weight_BM.double().sum(dim=0)
                gate_sum_M = summed_M if gate_sum_M is None else gate_sum_M + summed_M

        num_records = sum(len(row_B) for row_B in rows)
        num_judged = sum(known.shape[0] for known in targets)
        figures = metrics.compute()
        if loss is not None and num_judged:
            figures["loss"] = loss_sum.item() / num_judged
        gate_M = [] if gate_sum_M is None else (gate_sum_M / num_records).tolist()
        target_B = torch.cat(targets) if targets and num_judged == num_records else None
        if target_B is not None and target.task == "regression":
            target_B = in_own_units(target, target_B)
        return Evaluation(
            metrics=figures,
            confusion=metrics.confusion(),
            num_records=num_records,
            row_B=np.concatenate([*rows, np.empty(0, np.int64)]),
            prediction_B=_array(predictions, np.float64 if target.task == "regression" else np.int64),
            probability_BC=None if target.task == "regression" else _array(probabilities, np.float32),
            target_B=None if target_B is None else target_B.cpu().numpy(),
            gate=dict(zip(modalities, gate_M, strict=True)),
            bad=tuple(bad),
            seconds=time.perf_counter() - started,
        )


def _array(parts: list[Tensor], dtype: type[np.generic]) -> npt.NDArray[Any]:
    return torch.cat(parts).cpu().numpy().astype(dtype, copy=False) if parts else np.empty(0, dtype)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; after it each module's own mode, since a frozen encoder may stay out of training."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
