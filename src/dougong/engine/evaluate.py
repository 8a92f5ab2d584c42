"""Judges a model on a split.

Here        Evaluation, `evaluate`; `evaluating`, the mode that it judges in; `all_told`, of bad records.
Elsewhere   the figures (engine/metrics.py); comparing conditions and drawing them (recipes/, watch/).
Promise     the model is left as it was, each module in the mode it had; every record that the loader gives is in
            the result with its row number, and those it set aside are listed. Ranks that share the records out all get
            the result that one process would have, its records in the same order.
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
from dougong.engine.metrics import Decided, DecisionMetrics, decide, in_own_units
from dougong.engine.parallel.ranks import ALONE, Ranks
from dougong.engine.precision.choice import Chosen, autocast
from dougong.engine.step import Loss
from dougong.nn.block_stack import BlockStack


@dataclass(frozen=True)
class Evaluation:
    """What a model did. Shapes: B records, all of them; C classes; M modalities."""

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
    weight_BM: npt.NDArray[np.float32] | None = None
    """The same of each record; None for a model without a gate."""

    conflict_B: npt.NDArray[np.float32] | None = None
    """How far the modalities' own decisions are apart; None for a model without them."""

    vacuity_B: npt.NDArray[np.float32] | None = None
    """How little evidence there is; None for a model that decides otherwise."""


def evaluate(
    model: BlockStack[Any, Any],
    loader: Loader,
    target: Target,
    *,
    precision: Chosen | None = None,
    loss: Loss | None = None,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Judge `model` on every record of the loader. Its output must have `output_BC`, and may have
    `weight_BM`, `conflict_B` and `opinion`.

    With `ranks`, all of them call this, each with a loader of its share, and `loss` must not exchange anything.

    `precision=None` computes as the caller's surroundings do: the trainer sets them to the run's own precision.
    With `loss`, its mean per record is among the metrics.
    """
    started = time.perf_counter()
    device = next(model.parameters()).device
    metrics = DecisionMetrics(target, device)
    rows: list[npt.NDArray[np.int64]] = []
    numbers: list[Tensor] = []  # of its batch, for each record
    known: list[Tensor] = []  # whether its target is
    bad: list[tuple[int, BadRecord]] = []
    predictions: list[Tensor] = []
    probabilities: list[Tensor] = []
    targets: list[Tensor] = []
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    beside: dict[str, list[Tensor]] = {"weight_BM": [], "conflict_B": [], "vacuity_B": []}
    modalities: list[str] = []

    with torch.inference_mode(), evaluating(model):
        for number, arrays in enumerate(loader.one_pass()):
            bad += [(number, record) for record in arrays.bad]
            if not len(arrays.row_B):
                if ranks.world > 1:  # the model itself may be one that ranks compute together
                    model(to_tensors(arrays, device))
                continue
            batch = to_tensors(arrays, device)
            with contextlib.nullcontext() if precision is None else autocast(precision, device.type):
                output = model(batch)
                if loss is not None and batch.target is not None:
                    loss_sum += loss(output, batch).double()
            decided = decide(target, output.output_BC)
            rows.append(arrays.row_B)
            numbers.append(torch.full((len(arrays.row_B),), number))
            known.append(torch.full((len(arrays.row_B),), batch.target is not None))
            predictions.append(decided.prediction_B)
            if decided.probability_BC is not None:
                probabilities.append(decided.probability_BC)
            if batch.target is not None:
                targets.append(batch.target)
            modalities = list(batch.media)
            opinion = getattr(output, "opinion", None)
            told = {
                "weight_BM": getattr(output, "weight_BM", None),
                "conflict_B": getattr(output, "conflict_B", None),
                "vacuity_B": None if opinion is None else opinion.vacuity_B,
            }
            for key, value in told.items():
                if value is not None:
                    beside[key].append(value.float())

        # By batch, and in a batch by rank: the order in which one process meets them.
        number_B, known_B = ranks.rows(_joined(numbers)), ranks.rows(_joined(known))
        order_B = number_B.argsort(stable=True)
        prediction_B = ranks.rows(_joined(predictions)).to(device)[order_B.to(device)]
        probability_BC = None
        if target.task != "regression":
            probability_BC = ranks.rows(_joined(probabilities)).to(device)[order_B.to(device)]
        judged_B = known_B[order_B].to(device)
        target_B = ranks.rows(_joined(targets)).to(device)[number_B[known_B].argsort(stable=True).to(device)]

        num_records, num_judged = len(number_B), len(target_B)
        if num_judged:
            probability_JC = None if probability_BC is None else probability_BC[judged_B]
            metrics.update(Decided(prediction_B[judged_B], probability_JC), target_B)
        figures = metrics.compute()
        loss_sum = ranks.rows(loss_sum[None]).sum()
        if loss is not None and num_judged:
            figures["loss"] = loss_sum.item() / num_judged
        each = {
            key: _beside(ranks.rows(_joined(found)).to(device), order_B.to(device)) for key, found in beside.items()
        }
        weight_BM = each["weight_BM"]
        gate_M = [] if weight_BM is None else weight_BM.mean(axis=0, dtype=np.float64).tolist()
        names: list[str] = next((told for told in ranks.tell(modalities) if told), [])
        if target.task == "regression":
            target_B = in_own_units(target, target_B)
        return Evaluation(
            metrics=figures,
            confusion=metrics.confusion(),
            num_records=num_records,
            row_B=ranks.rows(_joined([torch.from_numpy(row_B) for row_B in rows]))[order_B].numpy(),
            prediction_B=_array(prediction_B, np.float64 if target.task == "regression" else np.int64),
            probability_BC=None if probability_BC is None else _array(probability_BC, np.float32),
            target_B=target_B.cpu().numpy() if 0 < num_judged == num_records else None,
            gate=dict(zip(names, gate_M, strict=True)) if gate_M else {},
            bad=all_told(ranks, bad),
            seconds=time.perf_counter() - started,
            **each,
        )


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def all_told(ranks: Ranks, bad: list[tuple[int, BadRecord]]) -> tuple[BadRecord, ...]:
    """Those of all ranks, each with the number of its batch, in the order in which one process meets them."""
    told = [record for said in ranks.tell([[number, *record] for number, record in bad]) for record in said]
    return tuple(BadRecord(*record) for _, *record in sorted(told, key=lambda record: record[0]))


def _beside(x: Tensor, order_B: Tensor) -> npt.NDArray[np.float32] | None:
    """In the records' order; None where the model says nothing of the kind."""
    return _array(x[order_B], np.float32) if len(x) else None


def _array(x: Tensor, dtype: type[np.generic]) -> npt.NDArray[Any]:
    return x.cpu().numpy().astype(dtype, copy=False)


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
