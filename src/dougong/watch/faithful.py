"""Whether a map of where a model looks is true: what becomes of the answer where it is followed.

Here        `curves` (deletion and insertion, against chance), `followed` (the same of any figure), `sanity` (the same
            map of a model with random weights), `captum_relevance`, `without`; `picture_tails`, `patches`.
Elsewhere   the maps (watch/attention.py); the pages (watch/inside.py, watch/pairs.py); easy-VQA's figures
            (benchmarks/attention.py).
Promise     the same records and seed give the same curves; chance is measured on the same records with the same steps,
            never assumed; the model that is asked is left as it was.

Shapes: B records, T tokens that entered (a picture's class token is none of them), K steps of a curve.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dougong.core.errors import ConfigError
from dougong.core.seeds import derive_seed
from dougong.engine.evaluate import evaluating
from dougong.model.encoders.image import ImageTail
from dougong.model.sandwich import FinishBlock, Sandwich
from dougong.nn.batch import Batch, MediaBatch
from dougong.nn.block_stack import BlockStack
from dougong.watch.attention import METHODS, look_inside, unshared

STEPS: Final = 10
RANDOM_ORDERS: Final = 4


class Curve(NamedTuple):
    """How sure the model is of what it had answered, as tokens go or come."""

    share_K: list[float]
    """Of the tokens that are gone, or are there."""

    sure_K: list[float]
    """Mean over records of the probability of the answer; of a number, exp(-|distance|) in its standard deviations."""

    @property
    def area(self) -> float:
        """Under the curve, 0 to 1. Of deletion less is better, of insertion more."""
        return float(np.trapezoid(self.sure_K, self.share_K))


class Faithful(NamedTuple):
    """The curves of one map, and of chance (the mean of several random orders)."""

    deletion: Curve
    insertion: Curve
    random_deletion: Curve
    random_insertion: Curve

    @property
    def deletion_gain(self) -> float:
        """By how much of chance's area deletion is below it; 0.3 is 30 % below."""
        return 1 - self.deletion.area / max(self.random_deletion.area, 1e-9)

    @property
    def full_gain(self) -> float:
        """`deletion_gain` of an answer that falls at once to what is left of it when everything that may be taken has
        gone."""
        return 1 - self.random_deletion.sure_K[-1] / max(self.random_deletion.area, 1e-9)


def curves(
    network: Sandwich,
    batch: Batch,
    relevance: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    target_B: Tensor,
    *,
    names: Sequence[str] | None = None,
    steps: int = STEPS,
    random_orders: int = RANDOM_ORDERS,
    seed: int = 0,
) -> Faithful:
    """Deletion and insertion (Petsiuk et al. 2018, arXiv:1806.07421) over the tokens of `names`; None: of all
    modalities.

    The most relevant tokens of a record go (come) first, all modalities in one order. A patch that is gone has the
    picture's median colour, where the paper takes grey; a word is masked; a stretch of sound or signal is silent; a
    column is unknown. What has gone before a network answers is all that differs.
    """
    batch = unshared(batch)
    before_B = _sure(network, batch, target_B, None)
    return followed(
        network,
        batch,
        relevance,
        masks,
        lambda given: _sure(network, given, target_B, before_B),
        names=names,
        steps=steps,
        random_orders=random_orders,
        seed=seed,
    )


def followed(
    network: BlockStack[Any, Any],
    batch: Batch,
    relevance: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    sure: Callable[[Batch], Tensor],
    *,
    names: Sequence[str] | None = None,
    steps: int = STEPS,
    random_orders: int = RANDOM_ORDERS,
    seed: int = 0,
) -> Faithful:
    """The same of any model of encoders, and of any figure of its records: `sure` says it, (B,). Each record has media
    of its own (`unshared`)."""
    chosen = [name for name in relevance if names is None or name in names]
    if not chosen:
        raise ConfigError(f"no tokens of {', '.join(names or ())} to take away. Use some of {', '.join(relevance)}.")

    def both(score: Mapping[str, Tensor]) -> tuple[Curve, Curve]:
        rank = _ranks(score, masks, chosen)
        share = [step / steps for step in range(steps + 1)]
        going, coming = [], []
        for part in share:
            gone = {name: masks[name] & (rank[name] < part - 1e-9) for name in chosen}
            going.append(float(sure(without(network, batch, gone)).mean()))
            absent = {name: masks[name] & ~(rank[name] < part - 1e-9) for name in chosen}
            coming.append(float(sure(without(network, batch, absent)).mean()))
        return Curve(share, going), Curve(share, coming)

    deletion, insertion = both(relevance)
    generator = torch.Generator().manual_seed(derive_seed(seed, "orders"))
    found = [
        both({name: torch.rand(relevance[name].shape, generator=generator) for name in chosen})
        for _ in range(random_orders)
    ]
    return Faithful(deletion, insertion, _mean([each[0] for each in found]), _mean([each[1] for each in found]))


def sanity(network: Sandwich, batch: Batch, *, seed: int = 0) -> dict[str, dict[str, float]]:
    """By method and modality, Spearman's correlation of a map with that of the same network with random matrices.

    The model parameter randomisation test of Adebayo et al. 2018 (arXiv:1810.03292), all layers at once: each matrix is
    drawn anew with its own deviation. Near 0 a map says something of what was learnt; near 1 it does not. The mean over
    records.
    """
    spoilt = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(derive_seed(seed, "weights"))
    with torch.no_grad():
        for parameter in spoilt.parameters():
            if parameter.ndim > 1:
                drawn = torch.randn(parameter.shape, generator=generator) * parameter.std().cpu()
                parameter.copy_(drawn.to(parameter))
    with evaluating(network):
        own = look_inside(network, batch)
    other = look_inside(spoilt.eval(), batch, own.target_B)
    return {
        method: {
            name: _correlation(getattr(own, method)[name], getattr(other, method)[name], own.masks[name])
            for name in own.masks
        }
        for method in METHODS
    }


def captum_relevance(network: Sandwich, batch: Batch, target_B: Tensor, *, steps: int = 16) -> dict[str, Tensor]:
    """Integrated gradients (Sundararajan et al. 2017, arXiv:1703.01365) by captum, of the tokens that entered, (1, T).

    From tokens of zeros to the record's own; the positive part of the sum over channels, as shares of their total.

    Raises:
        ConfigError: captum is not installed, or there is more than one record.
    """
    try:
        attribution: Any = importlib.import_module("captum.attr")
    except ImportError:
        raise ConfigError("captum's attributions need captum. Run: pip install 'dougong[watch]'") from None
    batch = unshared(batch)
    if batch.num_records != 1:
        raise ConfigError(f"captum's attributions are of one record, and {batch.num_records} were given.")
    with torch.no_grad():
        first = network.embed(batch)
    names = list(first.tokens)

    def answer(*tokens: Tensor) -> Tensor:
        times = len(tokens[0])
        state = first._replace(
            tokens=dict(zip(names, tokens, strict=True)),
            masks={name: mask.expand(times, -1) for name, mask in first.masks.items()},
            medium={name: torch.arange(times, device=tokens[0].device) for name in first.medium},
            present_BM=first.present_BM.expand(times, -1),
            completed_BM=first.completed_BM.expand(times, -1),
            quality={name: each.expand(times, -1) for name, each in first.quality.items()},
        )
        for block in network.blocks:
            state = block(state)
        output_BC: Tensor = network.head(state).output_BC
        return output_BC[:, int(target_B[0])]

    given = tuple(first.tokens[name].detach() for name in names)
    found = attribution.IntegratedGradients(answer).attribute(
        given, baselines=tuple(torch.zeros_like(each) for each in given), n_steps=steps
    )
    kept = {}
    for name, each in zip(names, found, strict=True):
        first_place = int(name in network.grids)
        positive = each.sum(dim=-1).clamp(min=0)[:, first_place:]
        kept[name] = (positive * first.masks[name][:, first_place:]).detach().float()
    total = torch.cat(list(kept.values()), dim=1).sum().clamp(min=1e-30)
    return {name: each / total for name, each in kept.items()}


# Taking away -------------------------------------------------------------------------------------------------------


def without(network: BlockStack[Any, Any], batch: Batch, gone: Mapping[str, Tensor]) -> Batch:
    """The batch without some of the tokens that would enter; `gone` is (B, T) of records by modality.

    Each record must have media of its own (`unshared`).
    """
    media = dict(batch.media)
    for name, gone_BT in gone.items():
        one = media[name]
        media[name] = one._replace(values=_spoilt(network, name, one, gone_BT[one.present_B]))
    return batch._replace(media=media)


def _spoilt(network: BlockStack[Any, Any], name: str, one: MediaBatch, gone_UT: Tensor) -> dict[str, Tensor]:
    values = dict(one.values)
    if "pixels_UCHW" in values:
        pixels_UCHW = values["pixels_UCHW"]
        rows, columns = patches(network)[name]
        height, width = pixels_UCHW.shape[2] // rows, pixels_UCHW.shape[3] // columns
        gone_UHW = gone_UT.view(-1, rows, columns).repeat_interleave(height, 1).repeat_interleave(width, 2)
        median_UC11 = pixels_UCHW.flatten(2).median(dim=2).values[..., None, None]
        values["pixels_UCHW"] = torch.where(gone_UHW[:, None], median_UC11, pixels_UCHW)
    elif "ids_UT" in values:
        values["mask_UT"] = values["mask_UT"] & ~gone_UT
    elif "samples_UT" in values or "samples_UCT" in values:
        key = "samples_UT" if "samples_UT" in values else "samples_UCT"
        samples = values[key]
        num = samples.shape[-1]
        each = -(-num // gone_UT.shape[1])
        silent_UT = gone_UT.repeat_interleave(each, 1)[:, :num]
        values[key] = samples.masked_fill(silent_UT if samples.ndim == 2 else silent_UT[:, None], 0.0)
    else:
        count = values["numbers_UN"].shape[1]
        values["known_UN"] = values["known_UN"] & ~gone_UT[:, :count]
        values["categories_UK"] = values["categories_UK"].masked_fill(gone_UT[:, count:], 0)
    return values


def picture_tails(network: BlockStack[Any, Any]) -> dict[str, ImageTail]:
    """The ends of its encoders of pictures: how many patches enter, and how many tokens leave."""
    ends = {block.name: block.finisher for block in network.blocks if isinstance(block, FinishBlock)}
    return {name: tail for name, tail in ends.items() if isinstance(tail, ImageTail)}


def patches(network: BlockStack[Any, Any]) -> dict[str, tuple[int, int]]:
    """Rows and columns of each picture's tokens as they enter."""
    return {name: tail.patches for name, tail in picture_tails(network).items()}


# Measuring ---------------------------------------------------------------------------------------------------------


def _sure(network: Sandwich, batch: Batch, target_B: Tensor, whole_B: Tensor | None) -> Tensor:
    with torch.inference_mode(), evaluating(network):
        output_BC: Tensor = network(batch).output_BC.float()
    if output_BC.shape[1] > 1:
        chances_BC = output_BC.softmax(dim=1) if network.task == "single_label" else output_BC.sigmoid()
        return chances_BC.gather(1, target_B[:, None])[:, 0]
    number_B = output_BC[:, 0]
    return number_B if whole_B is None else (-(number_B - whole_B).abs()).exp()


def _ranks(score: Mapping[str, Tensor], masks: Mapping[str, Tensor], chosen: Sequence[str]) -> dict[str, Tensor]:
    """Each real token's place among all of its record's, from 0 (the most relevant) to below 1."""
    all_BN = torch.cat([score[name].float() for name in chosen], dim=1)
    real_BN = torch.cat([masks[name] for name in chosen], dim=1)
    order_BN = all_BN.masked_fill(~real_BN, -torch.inf).argsort(dim=1, descending=True, stable=True)
    place_BN = order_BN.argsort(dim=1)
    rank_BN = place_BN / real_BN.sum(dim=1, keepdim=True).clamp(min=1)
    ends = np.cumsum([score[name].shape[1] for name in chosen])[:-1].tolist()
    return dict(zip(chosen, rank_BN.tensor_split(ends, dim=1), strict=True))


def _mean(found: Sequence[Curve]) -> Curve:
    return Curve(found[0].share_K, np.mean([each.sure_K for each in found], axis=0).tolist())


def _correlation(left_BT: Tensor, right_BT: Tensor, mask_BT: Tensor) -> float:
    found = []
    for left_T, right_T, mask_T in zip(left_BT, right_BT, mask_BT, strict=True):
        if int(mask_T.sum()) < 3:
            continue
        ranks = torch.stack([_average_ranks(left_T[mask_T]), _average_ranks(right_T[mask_T])])
        if float(ranks.std(dim=1).min()) == 0:
            continue
        found.append(float(torch.corrcoef(ranks)[0, 1]))
    return float(np.mean(found)) if found else 0.0


def _average_ranks(x_T: Tensor) -> Tensor:
    """Equal values share their mean rank: a map that is 0 in most places has many."""
    _, inverse, counts = torch.unique(x_T, return_inverse=True, return_counts=True)
    end = counts.cumsum(0).double()
    ranks_T: Tensor = (end - (counts - 1) / 2)[inverse]
    return ranks_T
