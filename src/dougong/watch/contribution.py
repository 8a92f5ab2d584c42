"""What each modality contributes to a model's answers: per record, per data set, alone and together.

Here        `study`, Study: exact Shapley values of every record, interactions of pairs, what is lost where a modality
            is withheld, shuffled or spoilt, and calibration for every set of modalities that is there; `of_records`,
            `interactions`, `calibration_error`.
Elsewhere   the measures that already judge a bundle (bundle/contribution.py: MM-SHAP, EMAP, perceptual scores), and
            those of a model seen as a function (engine/contribution.py); the page (watch/inside.py,
            watch/dashboard.py).
Promise     a record's values add up, exactly, to its answer's probability with everything less that with nothing; those
            of a data set are their means. Every set of modalities is asked for once, and all figures come from these.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from dougong.bundle.model import Model
from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.data.corruption import Corruption
from dougong.data.table import Table, open_table
from dougong.engine.contribution import ABSENT, Probe, perceptual_scores, shapley_values

MOST_MODALITIES: Final = 8
"""Up to which every set is asked for: 256."""

BINS: Final = 15
SPOILT: Final = 1.0
"""Level of corruption at which a modality counts as spoilt."""

Floats = npt.NDArray[np.float64]


class StudyConfig(Config):
    """How much is measured."""

    num_records: int = Field(default=256, gt=1)
    """Drawn from the table."""

    num_permutations: int = Field(default=4, gt=0)
    """Of a modality over the records, for what is lost where it is another record's."""

    spoil: bool = True
    """Also judge the table with each modality corrupted by every kind of damage that it has, which reads it anew."""

    seed: int = 0


class Pattern(NamedTuple):
    """Records of which so much is there."""

    kept: tuple[str, ...]
    accuracy: float
    confidence: float
    calibration_error: float


class Study(NamedTuple):
    """Of one model on one table. Figures of the metric are negative where less of it is better."""

    names: tuple[str, ...]
    metric: str
    num_records: int
    value: dict[str, float]
    """Shapley value of the metric; they add up to `with_all - with_none`."""

    with_all: float
    with_none: float
    without: dict[str, float]
    """The metric where one is withheld."""

    shuffled: dict[str, float]
    """Where it is another record's; with_all less the perceptual score's drop."""

    spoilt: dict[str, float]
    """Where it is corrupted; empty where that was not asked for."""

    together: dict[tuple[str, str], float]
    """What two add beyond the sum of what each adds, in the metric: above 0 synergy, below 0 redundancy."""

    record_value_BM: Floats
    """Of each record's probability of the model's own answer (of a number: minus its distance from the whole
    answer)."""

    record_all_B: Floats
    record_none_B: Floats
    row_B: list[int]
    """Places of the records among those drawn."""

    gate: dict[str, float]
    """Mean weight; empty without a gate."""

    patterns: tuple[Pattern, ...]
    """Empty where the target is no class."""


def study(model: Model, table: Table | str | Path, config: StudyConfig | None = None) -> Study:
    """Ask a model about every set of its modalities.

    Raises:
        ConfigError: the model has one modality, or too many for every set.
        DataError: the table has no target, or no usable record.
    """
    config = config or StudyConfig()
    names = tuple(model.preparation.modalities)
    _check(names)
    opened = table if isinstance(table, Table) else open_table(table)
    probe = Probe.on(model.network, opened, model.preparation, most=config.num_records, seed=config.seed)
    outputs = ask_all(probe)
    num = len(names)
    score = np.array([probe.score(output_BC) for output_BC in outputs])
    everything = len(outputs) - 1
    value_M = shapley_values(functools.partial(_looked_up, score), num)
    records = of_records(outputs, model.preparation.target.task)
    perceptual = perceptual_scores(
        probe.answer,
        probe.score,
        names,
        probe.presence(),
        num_permutations=config.num_permutations,
        commonest=probe.commonest(),
        seed=config.seed,
    )
    with torch.inference_mode():
        weight_BM = model.network(probe.batch).weight_BM
    return Study(
        names=names,
        metric=probe.metric.name,
        num_records=probe.num_records,
        value=dict(zip(names, value_M.tolist(), strict=True)),
        with_all=float(score[everything]),
        with_none=float(score[0]),
        without={name: float(score[everything - (1 << place)]) for place, name in enumerate(names)},
        shuffled={name: float(score[everything]) - perceptual[name].drop for name in names},
        spoilt=_spoilt(model, opened, probe, config) if config.spoil else {},
        together={(names[first], names[second]): found for (first, second), found in interactions(score, num).items()},
        record_value_BM=records.value_BM,
        record_all_B=records.all_B,
        record_none_B=records.none_B,
        row_B=list(range(probe.num_records)),
        gate={} if weight_BM is None else dict(zip(names, weight_BM.mean(dim=0).tolist(), strict=True)),
        patterns=tuple(_patterns(outputs, probe, names)),
    )


def ask_all(probe: Probe) -> list[torch.Tensor]:
    """The answers (B, C) to all records with each set of modalities; set k has modality m where bit m of k is set."""
    num = len(probe.names)
    _check(probe.names)
    own_B = np.arange(probe.num_records)[:, None]
    return [
        probe.answer(np.where([bool(number >> place & 1) for place in range(num)], own_B, ABSENT))
        for number in range(2**num)
    ]


class OfRecords(NamedTuple):
    """Shapes: B records, M modalities."""

    value_BM: Floats
    all_B: Floats
    none_B: Floats
    target_B: npt.NDArray[np.int64]
    """The output that is explained: the strongest with everything."""


def of_records(outputs: Sequence[torch.Tensor], task: str) -> OfRecords:
    """Each record's own Shapley values, from the answers to every set (`ask_all`)."""
    num = int(math.log2(len(outputs)))
    whole_BC = outputs[-1]
    target_B = whole_BC.argmax(dim=1)
    sure_KB = np.stack([_sure(output_BC, whole_BC, target_B, task) for output_BC in outputs])
    value_BM = np.zeros((len(whole_BC), num))
    for record in range(len(whole_BC)):
        sure_K = sure_KB[:, record]
        value_BM[record] = shapley_values(functools.partial(_looked_up, sure_K), num)
    return OfRecords(value_BM, sure_KB[-1], sure_KB[0], target_B.cpu().numpy())


def interactions(score_K: Floats, num: int) -> dict[tuple[int, int], float]:
    """What two modalities do together: the Shapley interaction index (Grabisch and Roubens 1999), from the score of
    every set. Above 0 they say more together than the sum of each alone (synergy), below 0 they say the same
    (redundancy)."""
    found = {}
    for first, second in itertools.combinations(range(num), 2):
        one, other = 1 << first, 1 << second
        total = 0.0
        for number in range(2**num):
            if number & (one | other):
                continue
            size = number.bit_count()
            weight = math.factorial(size) * math.factorial(num - size - 2) / math.factorial(num - 1)
            together = score_K[number | one | other] - score_K[number | one] - score_K[number | other] + score_K[number]
            total += weight * float(together)
        found[first, second] = total
    return found


def calibration_error(confidence_B: Floats, right_B: npt.NDArray[np.bool_], bins: int = BINS) -> float:
    """How far confidence is from accuracy: the expected calibration error over bins of equal width (Guo et al. 2017,
    arXiv:1706.04599)."""
    if not len(confidence_B):
        return 0.0
    bin_B = np.minimum((confidence_B * bins).astype(int), bins - 1)
    total = 0.0
    for place in range(bins):
        inside = bin_B == place
        if inside.any():
            total += inside.mean() * abs(float(confidence_B[inside].mean()) - float(right_B[inside].mean()))
    return float(total)


def _check(names: Sequence[str]) -> None:
    if len(names) < 2:
        raise ConfigError(f"this model has one modality, {names[0]}: what it contributes is everything.")
    if len(names) > MOST_MODALITIES:
        raise ConfigError(
            f"this model has {len(names)} modalities, whose sets are too many to ask for all. "
            "Use dougong evaluate --contribution, which draws orders."
        )


def _numbers(sets_KM: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    found: npt.NDArray[np.int64] = sets_KM.astype(np.int64) @ (1 << np.arange(sets_KM.shape[1]))
    return found


def _looked_up(value_K: Floats, sets_KM: npt.NDArray[np.bool_]) -> Floats:
    found: Floats = value_K[_numbers(sets_KM)]
    return found


def _sure(output_BC: torch.Tensor, whole_BC: torch.Tensor, target_B: torch.Tensor, task: str) -> Floats:
    if task == "regression":
        return -np.asarray((output_BC - whole_BC)[:, 0].abs().double().cpu())
    chances_BC = output_BC.double().softmax(dim=1) if task == "single_label" else output_BC.double().sigmoid()
    return np.asarray(chances_BC.gather(1, target_B[:, None])[:, 0].cpu())


def _patterns(outputs: Sequence[torch.Tensor], probe: Probe, names: Sequence[str]) -> list[Pattern]:
    if probe.target.task != "single_label" or probe.batch.target is None:
        return []
    presence_BM, truth_B = probe.presence(), probe.batch.target
    found = []
    for number in range(1, len(outputs)):
        kept = tuple(name for place, name in enumerate(names) if number >> place & 1)
        there_B = presence_BM[:, [name in kept for name in names]].all(axis=1)
        if there_B.sum() < 2:
            continue
        confidence_B, answer_B = outputs[number].double().softmax(dim=1).max(dim=1)
        right_B = np.asarray((answer_B == truth_B).cpu())[there_B]
        sure_B = np.asarray(confidence_B.cpu())[there_B]
        found.append(Pattern(kept, float(right_B.mean()), float(sure_B.mean()), calibration_error(sure_B, right_B)))
    return found


def _spoilt(model: Model, table: Table, probe: Probe, config: StudyConfig) -> dict[str, float]:
    """The metric with each modality corrupted as strongly as its kind of damage goes, on the whole table."""
    found = {}
    sign = 1.0 if probe.metric.higher_is_better else -1.0
    for name, modality in model.preparation.modalities.items():
        if not modality.damages:
            continue
        judged = model.evaluate(table, corruptions=[Corruption(modality=name, level=SPOILT)], seed=config.seed)
        found[name] = sign * judged.metrics[probe.metric.name]
    return found


def as_json(found: Study) -> Mapping[str, object]:
    """For programs; records' own values are left to Python."""
    return {
        "metric": found.metric,
        "num_records": found.num_records,
        "with_all": found.with_all,
        "with_none": found.with_none,
        "modalities": {
            name: {
                "shapley": found.value[name],
                "without": found.without[name],
                "shuffled": found.shuffled[name],
                "spoilt": found.spoilt.get(name),
                "gate": found.gate.get(name),
            }
            for name in found.names
        },
        "together": {" + ".join(pair): value for pair, value in found.together.items()},
        "patterns": [
            {
                "kept": list(one.kept),
                "accuracy": one.accuracy,
                "confidence": one.confidence,
                "calibration_error": one.calibration_error,
            }
            for one in found.patterns
        ],
    }
