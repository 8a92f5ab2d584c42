"""Which task is a record of, where nobody says?

Here        `frozen_features`, `num_features`, Traits (what is kept of each task) and `joined` ones, Recognition (who
            decides), Guess.
Elsewhere   what a record is by itself (continual/surface.py); asking adapters how sure they are (continual/taught.py).
Promise     it is decided in features of records themselves and of the frozen base, so that a task learnt later changes
            no feature of an earlier one; what is kept of a task are sums, means and a few held-out features, never a
            record; "none of these" is an answer.

Distances are Mahalanobis's to the nearest class mean, with one covariance for all tasks (Lee et al. 2018,
arXiv:1807.03888; kept as running sums as in Hayes and Kanan 2020, arXiv:1909.01520), modality by modality, so that
tasks that share only some modalities are compared by those. How likely a task has records of just these modalities is
counted besides. What we do differently: distances, keys and confidences are put on one scale by numbers that are
chosen on held-out features, and a record that is well farther from its task than that task's held-out records is of
none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from dougong.continual.surface import SURFACE, surface_of
from dougong.model.sandwich import EncoderBlock, FinishBlock, Sandwich
from dougong.nn.batch import Batch

HELD_OUT: Final = 64
"""Features that are kept of a task's held-out records."""

SHRINKS: Final = (0.005, 0.02, 0.08, 0.3)
"""How much of the covariance is taken to be that of features that have nothing to do with each other."""

BROAD: Final = 0.3
"""The same where it is asked whether a record is of any task: so that what hardly ever differed among few records does
not count a hundredfold."""

FARTHER: Final = 1.3
"""Times a task's farthest held-out record: beyond that, a record is of none."""

FEWEST: Final = 20
"""Held-out records below which the farthest says little; then it is taken to be four standard deviations out."""

SHARPNESS: Final = tuple(2.0**power for power in range(-9, 2))
"""Of squared distances; 1 were right if features were as normal as is assumed."""

KEY_WEIGHTS: Final = (0.0, 5.0, 20.0)


class Features(NamedTuple):
    """Of B records: each medium's surface, mean and spread of its tokens. Shapes: F = SURFACE and twice the base's
    width."""

    x: dict[str, Tensor]
    """(B, F); zeros where a record lacks the modality."""

    present: dict[str, Tensor]
    """(B,)."""


@torch.no_grad()
def frozen_features(base: Sandwich, batch: Batch) -> Features:
    """What records are by themselves, and what the base's encoders make of them before modalities meet. The batch has
    all of the base's modalities."""
    state = base.embed(batch)
    for block in base.blocks:
        if isinstance(block, EncoderBlock | FinishBlock):
            state = block(state)
    found, present = {}, {}
    for place, name in enumerate(base.names):
        present_B = state.present_BM[:, place]
        x_BF = torch.zeros(len(present_B), num_features(base), device=present_B.device)
        if name in state.tokens:
            mean_UD, spread_UD = _mean_and_spread(state.tokens[name].float(), state.masks[name])
            x_UF = torch.cat([surface_of(batch.media[name].values), mean_UD, spread_UD], dim=1)
            x_BF = x_UF.index_select(0, state.medium[name]).masked_fill(~present_B[:, None], 0.0)
        found[name], present[name] = x_BF, present_B
    return Features(found, present)


def num_features(base: Sandwich) -> int:
    """F."""
    return SURFACE + 2 * base.width


def _mean_and_spread(x_UTD: Tensor, mask_UT: Tensor) -> tuple[Tensor, Tensor]:
    x_UTD = x_UTD.masked_fill(~mask_UT[..., None], 0.0)
    count_U1 = mask_UT.sum(dim=1, keepdim=True).clamp(min=1)
    mean_UD = x_UTD.sum(dim=1) / count_U1
    spread_UD = ((x_UTD - mean_UD[:, None]).square() * mask_UT[..., None]).sum(dim=1) / count_U1
    return mean_UD, spread_UD.clamp(min=0.0).sqrt()


class Traits(NamedTuple):
    """What is kept of a task. Shapes: C classes, F features, H held-out records, M of the base's modalities."""

    mean: dict[str, Tensor]
    """(C, F) by modality; of a class that never has it, the mean of all."""

    scatter: dict[str, Tensor]
    """(F, F): the sum of squares around those means."""

    count: dict[str, int]  # type: ignore[assignment]  # a tuple counts too, which nobody asks here
    """Records behind it."""

    held_out: dict[str, Tensor]
    """(H, F)."""

    held_present_HM: Tensor
    patterns: dict[str, int]
    """How many training records have just these modalities: "0110" in the base's order."""

    sure: float = 0.0
    """Mean logarithm of the adapter's confidence on its own held-out records."""

    def tensors(self) -> dict[str, Tensor]:
        """What is written, half of it in half precision: distances need no more."""
        named: dict[str, Tensor] = {"held_present_HM": self.held_present_HM}
        for what in ("mean", "held_out"):
            named.update({f"{what}/{name}": x.half() for name, x in getattr(self, what).items()})
        for name, x_FF in self.scatter.items():
            row, column = torch.tril_indices(*x_FF.shape)
            # As a mean: sums over many records leave the range of 16 bits.
            named[f"scatter/{name}"] = (x_FF / max(1, self.count[name]))[row, column].half()
        return named

    @classmethod
    def read(
        cls, tensors: Mapping[str, Tensor], *, count: Mapping[str, int], patterns: Mapping[str, int], sure: float
    ) -> Traits:
        """What `tensors` wrote."""
        found: dict[str, dict[str, Tensor]] = {"mean": {}, "held_out": {}, "scatter": {}}
        for key, x in tensors.items():
            what, slash, name = key.partition("/")
            if slash:
                found[what][name] = x.float()
        scatter = {}
        for name, lower in found["scatter"].items():
            size = found["mean"][name].shape[1]
            row, column = torch.tril_indices(size, size)
            x_FF = torch.zeros(size, size)
            x_FF[row, column] = lower
            scatter[name] = (x_FF + x_FF.t() - torch.diag(x_FF.diagonal())) * max(1, count[name])
        held = tensors["held_present_HM"].bool()
        return cls(found["mean"], scatter, dict(count), found["held_out"], held, dict(patterns), sure)


def traits_of(features: Features, class_B: Tensor, num_classes: int, held_out: Features) -> Traits:
    """From training records' features and classes (all 0 for a number), and held-out records' features."""
    mean, scatter, count, held = {}, {}, {}, {}
    for name, x_BF in features.x.items():
        there_B = features.present[name]
        x_NF, class_N = x_BF[there_B].double(), class_B[there_B]
        if not len(x_NF):
            continue
        all_F = x_NF.mean(dim=0)
        number_C1 = torch.zeros(num_classes, 1, dtype=torch.float64).index_add(
            0, class_N, torch.ones(len(class_N), 1, dtype=torch.float64)
        )
        sum_CF = torch.zeros(num_classes, x_NF.shape[1], dtype=torch.float64).index_add(0, class_N, x_NF)
        mean_CF = torch.where(number_C1 > 0, sum_CF / number_C1.clamp(min=1), all_F)
        apart_NF = x_NF - mean_CF[class_N]
        mean[name], scatter[name], count[name] = mean_CF.float(), (apart_NF.t() @ apart_NF).float(), len(x_NF)
        held[name] = held_out.x[name][:HELD_OUT]
    names = list(features.x)
    pattern_BM = torch.stack([features.present[name] for name in names], dim=1)
    patterns: dict[str, int] = {}
    for row in pattern_BM.tolist():
        key = "".join("01"[there] for there in row)
        patterns[key] = patterns.get(key, 0) + 1
    held_HM = torch.stack([held_out.present[name][:HELD_OUT] for name in names], dim=1)
    return Traits(mean, scatter, count, held, held_HM, patterns)


def joined(traits: Sequence[Traits]) -> Traits:
    """What a task is known by that stands for several of the same modalities: what is near one of them is near it."""
    names = [name for name in traits[0].mean if all(name in each.mean for each in traits)]
    patterns: dict[str, int] = {}
    for each in traits:
        for pattern, count in each.patterns.items():
            patterns[pattern] = patterns.get(pattern, 0) + count
    return Traits(
        mean={name: torch.cat([each.mean[name] for each in traits]) for name in names},
        scatter={name: torch.stack([each.scatter[name] for each in traits]).sum(dim=0) for name in names},
        count={name: sum(each.count[name] for each in traits) for name in names},
        held_out={name: torch.cat([each.held_out[name] for each in traits]) for name in names},
        held_present_HM=torch.cat([each.held_present_HM for each in traits]),
        patterns=patterns,
        sure=sum(each.sure for each in traits) / len(traits),
    )


class Guess(NamedTuple):
    """Shapes: B records, S tasks, in the order in which Recognition was told them."""

    score_BS: Tensor
    """Logarithms, up to a constant of each record."""

    known_BS: Tensor
    """Whether the record is no farther from the task than the task's own ever are."""


class _Compared(NamedTuple):
    """Shapes: B records, S tasks."""

    distance_BS: Tensor
    """To the nearest class, a mean over the modalities that both the record has and the task reads; infinite where
    there is none."""

    total_BS: Tensor
    """A sum over all modalities that the record has."""

    key_BS: Tensor
    """How alike the record is to the task's key."""


class _Metric(NamedTuple):
    """How distances are measured."""

    whiten: dict[str, Tensor]
    """(F, F) by modality: after it distances are plain."""

    means: list[dict[str, Tensor]]
    """By task, of its classes after that."""


class _Scale(NamedTuple):
    """What distances and keys count."""

    sharpness: float
    key: float


class Recognition:
    """Tells tasks apart. Made anew of what is kept of each task whenever one comes or goes."""

    def __init__(self, names: Sequence[str], traits: Sequence[Traits]) -> None:
        """`names` are the base's modalities."""
        self._names, self._traits = tuple(names), tuple(traits)
        self._metric, self._scale = self._calibrated()
        self._broad = self._measured_by(BROAD)
        self._farthest_S = self._own_farthest()

    def __call__(self, features: Features) -> Guess:
        compared = self._compared(features, self._metric)
        score_BS = _scored(compared, self._pattern_chances(features.present), self._scale)
        # Infinite where a record has nothing that the task reads: then it is not of it.
        return Guess(score_BS, self._compared(features, self._broad).distance_BS <= self._farthest_S)

    def _measured_by(self, share: float) -> _Metric:
        """Take this share of the covariance to be of features that have nothing to do with each other."""
        whiten = {name: self._whitening(name, share) for name in self._names}
        whiten = {name: each for name, each in whiten.items() if len(each)}
        return _Metric(
            whiten, [{name: traits.mean[name] @ whiten[name] for name in traits.mean} for traits in self._traits]
        )

    def _whitening(self, name: str, share: float) -> Tensor:
        """(F, F): after it distances are plain. Empty where no task reads the modality."""
        having = [traits for traits in self._traits if name in traits.scatter]
        if not having:
            return torch.zeros(0, 0)
        number = sum(traits.count[name] for traits in having)
        x_FF = torch.stack([traits.scatter[name].double() for traits in having]).sum(dim=0) / number
        size = len(x_FF)
        # What never differed among them may differ a little elsewhere and mean nothing.
        deviation_F = (x_FF.diagonal() + 1e-4 * x_FF.diagonal().mean() + 1e-12).sqrt()
        x_FF = x_FF / (deviation_F[:, None] * deviation_F)
        one_FF = torch.eye(size, dtype=torch.float64)
        lower, failed = torch.linalg.cholesky_ex((1 - share) * x_FF + share * one_FF)
        while bool(failed):  # it was kept in half precision, and may have lost as much as it is shrunk by
            share = min(1.0, 2 * share)
            lower, failed = torch.linalg.cholesky_ex((1 - share) * x_FF + share * one_FF)
        inverse: Tensor = torch.linalg.solve_triangular(lower, one_FF, upper=False).t()
        inverse = inverse / deviation_F[:, None]
        return inverse.float()

    def _compared(self, features: Features, metric: _Metric) -> _Compared:
        count, num_tasks = len(next(iter(features.x.values()))), len(self._traits)
        total_BS = torch.zeros(count, num_tasks)
        own_BS, key_BS, seen_BS = torch.zeros_like(total_BS), torch.zeros_like(total_BS), torch.zeros_like(total_BS)
        class_BC: dict[int, Tensor] = {}
        for name in self._names:
            reading = [place for place, means in enumerate(metric.means) if name in means]
            if not reading:
                continue
            white_BF, there_B = features.x[name].float() @ metric.whiten[name], features.present[name]
            nearest_BS = torch.full((count, num_tasks), -math.inf)
            for place in reading:
                mean_CF = metric.means[place][name]
                found_BC = torch.cdist(white_BF, mean_CF).square()
                nearest_BS[:, place] = found_BC.amin(dim=1)
                found_BC = found_BC.masked_fill(~there_B[:, None], 0.0)
                class_BC[place] = class_BC[place] + found_BC if place in class_BC else found_BC
                key_F = torch.nn.functional.normalize(mean_CF.mean(dim=0), dim=0)
                alike_B = torch.nn.functional.normalize(white_BF, dim=1) @ key_F
                key_BS[:, place] += alike_B.masked_fill(~there_B, 0.0)
                seen_BS[:, place] += there_B
            # Whoever does not read it is as far as the farthest who does: all are compared by the same.
            far_B1 = nearest_BS.amax(dim=1, keepdim=True).masked_fill(~there_B[:, None], 0.0)
            unread = torch.tensor([place not in reading for place in range(num_tasks)])
            total_BS = total_BS + far_B1 * unread
        for place, found_BC in class_BC.items():
            own_BS[:, place] = found_BC.amin(dim=1)
        total_BS = total_BS + own_BS
        distance_BS = (own_BS / seen_BS.clamp(min=1)).masked_fill(seen_BS == 0, math.inf)
        return _Compared(distance_BS, total_BS, key_BS / seen_BS.clamp(min=1))

    def _pattern_chances(self, present: Mapping[str, Tensor]) -> Tensor:
        there_BM = torch.stack([present[name] for name in self._names], dim=1)
        rows = ["".join("01"[there] for there in row) for row in there_BM.tolist()]
        number = 2 ** len(self._names)
        chance_BS = torch.zeros(len(rows), len(self._traits))
        for place, traits in enumerate(self._traits):
            total = sum(traits.patterns.values())
            for row, key in enumerate(rows):
                # A hundredth of a record for each pattern that was never met.
                chance_BS[row, place] = math.log((traits.patterns.get(key, 0) + 0.01) / (total + 0.01 * number))
        return chance_BS

    def _held_out(self, place: int) -> Features:
        """The held-out features of a task, zeros for what it does not read."""
        traits = self._traits[place]
        count = len(traits.held_present_HM)
        size = next(iter(traits.mean.values())).shape[1]
        x = {name: traits.held_out.get(name, torch.zeros(count, size)) for name in self._names}
        return Features(x, {name: traits.held_present_HM[:, m] for m, name in enumerate(self._names)})

    def _own_farthest(self) -> Tensor:
        """How far a record may be from each task and still be of it."""
        farthest = []
        for place in range(len(self._traits)):
            distance_H = self._compared(self._held_out(place), self._broad).distance_BS[:, place]
            log_H = distance_H[torch.isfinite(distance_H)].clamp(min=1e-6).log()
            if len(log_H) >= FEWEST:
                farthest.append(FARTHER * float(log_H.max().exp()))
            elif len(log_H) > 2:
                farthest.append(float((log_H.mean() + 4 * log_H.std()).exp()))
            else:
                farthest.append(math.inf)
        return torch.tensor(farthest)

    def _calibrated(self) -> tuple[_Metric, _Scale]:
        """Shrinkage and scales of distances and keys, by the likelihood of held-out features."""
        held = [(self._held_out(place), place) for place in range(len(self._traits))]
        held = [(features, place) for features, place in held if len(next(iter(features.x.values())))]
        if len(held) < 2:
            return self._measured_by(SHRINKS[1]), _Scale(SHARPNESS[0], 0.0)
        chances = [self._pattern_chances(features.present) for features, _ in held]
        least = math.inf
        for share in SHRINKS:
            metric = self._measured_by(share)
            compared = [self._compared(features, metric) for features, _ in held]
            for scale in (_Scale(sharpness, key) for sharpness in SHARPNESS for key in KEY_WEIGHTS):
                losses = [
                    -_scored(one, chance_HS, scale).log_softmax(dim=1)[:, place].mean()
                    for one, chance_HS, (_, place) in zip(compared, chances, held, strict=True)
                ]
                loss = float(torch.stack(losses).mean())
                if loss < least:
                    least, best = loss, (metric, scale)
        return best


def _scored(compared: _Compared, chance_BS: Tensor, scale: _Scale) -> Tensor:
    return -0.5 * scale.sharpness * compared.total_BS + scale.key * compared.key_BS + chance_BS
