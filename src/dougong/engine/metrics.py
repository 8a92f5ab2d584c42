"""How good decisions are.

Here        DecisionMetrics for each task, `primary_metric`.
Elsewhere   running a model over a split (engine/evaluate.py); the computation of each metric (torchmetrics).
Promise     figures are in the target's own units; a figure that these records do not define is left out, never NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MultilabelF1Score,
)
from torchmetrics.functional.classification import binary_average_precision
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError, R2Score

from dougong.core.signature import Target, Task


class PrimaryMetric(NamedTuple):
    """The figure that a run is steered by unless told otherwise."""

    name: str
    higher_is_better: bool


def primary_metric(task: Task) -> PrimaryMetric:
    """The figure of a task that says most."""
    primary: dict[Task, PrimaryMetric] = {
        "single_label": PrimaryMetric("accuracy", True),
        "multi_label": PrimaryMetric("mean_average_precision", True),
        "regression": PrimaryMetric("rmse", False),
    }
    return primary[task]


class Decided(NamedTuple):
    """What scores mean. Shapes: B records, C classes."""

    prediction_B: Tensor
    """Label index (B,), ones and zeros (B, C), or a value in the target's units (B,)."""

    probability_BC: Tensor | None
    """None for regression."""


def decide(target: Target, output_BC: Tensor) -> Decided:
    """Turn a decision head's output into predictions."""
    output_BC = output_BC.detach().float()
    if target.task == "single_label":
        return Decided(output_BC.argmax(dim=-1), output_BC.softmax(dim=-1))
    if target.task == "multi_label":
        probability_BC = output_BC.sigmoid()
        return Decided((probability_BC > 0.5).long(), probability_BC)
    return Decided(in_own_units(target, output_BC[:, 0]), None)


def in_own_units(target: Target, value_B: Tensor) -> Tensor:
    """A standardised regression value as the table has it."""
    return value_B.double() * target.scale + target.mean


class DecisionMetrics:
    """Gathers a split's records; `compute` may be called at any time.

    single label   accuracy, balanced_accuracy (mean recall of the classes that occur), macro_f1
    multi label    micro_f1, macro_f1, mean_average_precision (over the labels that occur)
                   macro_f1 is over the classes or labels that occur or are predicted
    regression     rmse, mae, r2 (where the target varies)
    """

    def __init__(self, target: Target, device: torch.device | str = "cpu") -> None:
        self._target = target
        num_outputs = target.num_outputs
        # torchmetrics refuses a single class; one that never occurs changes no figure below.
        num_classes = max(2, num_outputs)
        # Left to itself, torchmetrics adds up what the ranks have whenever there are any: here each has it all.
        alone: dict[str, Any] = {"validate_args": False, "sync_on_compute": False}
        metrics: dict[str, Metric]
        if target.task == "single_label":
            metrics = {
                "accuracy": MulticlassAccuracy(num_classes, average="micro", **alone),
                "macro_f1": MulticlassF1Score(num_classes, average="macro", **alone),
                "confusion": MulticlassConfusionMatrix(num_classes, **alone),
            }
        elif target.task == "multi_label":
            metrics = {
                "micro_f1": MultilabelF1Score(num_outputs, average="micro", **alone),
                "f1_C": MultilabelF1Score(num_outputs, average="none", **alone),
            }
        else:
            metrics = {
                "rmse": MeanSquaredError(squared=False, sync_on_compute=False),
                "mae": MeanAbsoluteError(sync_on_compute=False),
                "r2": R2Score(sync_on_compute=False),
            }
            for metric in metrics.values():
                metric.set_dtype(torch.float64)
        self._metrics = {name: metric.to(device) for name, metric in metrics.items()}
        self._num_records = 0
        self._probabilities: list[Tensor] = []  # average precision needs them all
        self._known: list[Tensor] = []
        self._predicted_C = torch.zeros(num_outputs, dtype=torch.bool, device=device)
        self._lowest, self._highest = float("inf"), float("-inf")

    def update(self, decided: Decided, target_B: Tensor) -> None:
        """Add a batch; `target_B` as core/signature.py's Target says."""
        self._num_records += target_B.shape[0]
        if self._target.task == "single_label":
            self._add(decided.prediction_B, target_B)
        elif self._target.task == "multi_label":
            assert decided.probability_BC is not None
            known_BC = target_B.long()
            self._probabilities.append(decided.probability_BC)
            self._known.append(known_BC)
            self._predicted_C |= decided.prediction_B.bool().any(dim=0)
            self._add(decided.prediction_B, known_BC)
        elif target_B.shape[0]:
            value_B = in_own_units(self._target, target_B)
            self._lowest = min(self._lowest, float(value_B.min()))
            self._highest = max(self._highest, float(value_B.max()))
            self._add(decided.prediction_B, value_B)

    def compute(self) -> dict[str, float]:
        """The figures that are defined for what was added."""
        if self._num_records == 0:
            return {}
        if self._target.task == "single_label":
            confusion_CC = self._value("confusion")
            support_C = confusion_CC.sum(dim=1)
            recall_C = confusion_CC.diagonal()[support_C > 0] / support_C[support_C > 0]
            return {
                "accuracy": self._value("accuracy").item(),
                "balanced_accuracy": recall_C.double().mean().item(),
                "macro_f1": self._value("macro_f1").item(),
            }
        if self._target.task == "multi_label":
            figures: dict[str, float] = {}
            probability_NC, known_NC = torch.cat(self._probabilities), torch.cat(self._known)
            known_C = known_NC.any(dim=0)
            met_C = known_C | self._predicted_C
            if met_C.any():
                figures["micro_f1"] = self._value("micro_f1").item()
                f1_C = self._value("f1_C").reshape(-1)  # of one label torchmetrics makes a scalar
                figures["macro_f1"] = f1_C[met_C].mean().item()
            occurring = known_C.nonzero()[:, 0].tolist()
            if occurring:
                each = [binary_average_precision(probability_NC[:, c], known_NC[:, c]) for c in occurring]
                figures["mean_average_precision"] = torch.stack(each).mean().item()
            return figures
        names = ["rmse", "mae"] + (["r2"] if self._highest > self._lowest else [])
        return {name: self._value(name).item() for name in names}

    def confusion(self) -> npt.NDArray[np.int64] | None:
        """Single label: how often each true class (row) was taken for each class (column)."""
        if self._target.task != "single_label":
            return None
        num = self._target.num_outputs
        if self._num_records == 0:
            return np.zeros((num, num), np.int64)
        found: npt.NDArray[np.int64] = self._value("confusion")[:num, :num].cpu().numpy()
        return found

    def _add(self, predicted: Tensor, known: Tensor) -> None:
        for metric in self._metrics.values():
            metric.update(predicted, known)

    def _value(self, name: str) -> Tensor:
        value = self._metrics[name].compute()
        assert isinstance(value, Tensor)
        return value
