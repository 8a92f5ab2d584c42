"""Why two media lie close together in a model that gives each a vector, and the page of it.

Here        `look_at_pair` (maps of what makes two vectors alike), Alike; `look_at_pairs`, records of a table as plain
            values; `write_pairs`, the page of them.
Elsewhere   the rules by which attention is followed (watch/attention.py); taking tokens away (watch/faithful.py);
            vectors themselves (bundle/aligner.py); how the page looks (watch/pairs.html).
Promise     the likeness that is explained is the model's own, within rounding; a token that is padding or absent has
            exactly no relevance; each side's map adds up to 1 by itself, since neither is alike without the other.

What a bridge on top says of a pair is not explained here: it sees both media at once, and the vectors do not need it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dougong.bundle.aligner import Aligner
from dougong.core.errors import ConfigError
from dougong.core.files import write_atomic
from dougong.data.table import Table
from dougong.engine.batches import to_tensors
from dougong.engine.evaluate import evaluating
from dougong.model.dual import Dual, VectorBlock
from dougong.model.encoders.image import ImageTail
from dougong.model.heads import ContrastiveHead
from dougong.model.sandwich import EncoderBlock, FinishBlock, SandwichState
from dougong.nn.batch import Batch
from dougong.watch import charts
from dougong.watch.attention import METHODS, Method, by_record, catching, evened, finished, positive, unshared
from dougong.watch.faithful import Faithful, followed
from dougong.watch.inside import SAYS, curves_as_json, drawn_input, input_told
from dougong.watch.media import arrays_of, check_rows
from dougong.watch.pages import page_template


class Alike(NamedTuple):
    """Of B records, two media each."""

    alike_B: Tensor
    """The cosine of their vectors."""

    relevance: dict[str, Tensor]
    """(B, T) by side, of the tokens that entered; a row's sum is 1, or 0 where a record lacks one of the two."""

    rollout: dict[str, Tensor]
    masks: dict[str, Tensor]
    """(B, T): which of these tokens are real."""


def look_at_pair(network: Dual, batch: Batch, left: str, right: str) -> Alike:
    """Hold two media of each record against each other, and say which of their tokens that came from.

    `relevance` is that of Chefer et al. 2021 (arXiv:2103.15679), `rollout` that of Abnar and Zuidema 2020
    (arXiv:2005.00928), both as `attention.look_inside` has them; what is explained is the cosine. The network should be
    in evaluation mode.

    Raises:
        ConfigError: there is no such side, or no record of the batch has it.
    """
    sides = (left, right)
    strange = [name for name in sides if name not in network.names]
    if strange or left == right:
        raise ConfigError(f"{left!r} and {right!r} are no pair of this model. Use two of {', '.join(network.names)}.")
    batch = unshared(batch)
    with torch.enable_grad(), catching(network) as caught:
        first = state = network.embed(batch)
        absent = [name for name in sides if name not in state.tokens]
        if absent:
            raise ConfigError(f"no record has {absent[0]}, and a pair needs both. Choose records that do.")
        attended: dict[str, list[Tensor]] = {name: [] for name in network.names}
        ends: dict[str, FinishBlock] = {}
        before: dict[str, Tensor] = {}
        heads: dict[str, VectorBlock] = {}
        for block in network.blocks:
            if not isinstance(block, EncoderBlock | FinishBlock | VectorBlock):
                break  # what scores pairs needs no vectors
            begun = len(caught.attended)
            if isinstance(block, FinishBlock):
                ends[block.name], before[block.name] = block, state.masks.get(block.name, torch.zeros(0))
            elif isinstance(block, VectorBlock):
                heads[block.name] = block
            state = block(state)
            if isinstance(block, EncoderBlock):
                attended[block.name] += [weight for _, weight in caught.attended[begun:]]
        one_BD, other_BD = (by_record(state.aligned[name], state, name, network.names) for name in sides)
        alike_B = (one_BD * other_BD).sum(dim=1)
        weights = caught.weights()
        found = torch.autograd.grad(alike_B.sum(), weights, allow_unused=True) if weights else ()
    gradients = {id(weight): gradient for weight, gradient in zip(weights, found, strict=True) if gradient is not None}

    def map_of(name: str, method: Method) -> Tensor:
        mask_UT = first.masks[name]
        held_UTN = torch.eye(mask_UT.shape[1], device=mask_UT.device) * mask_UT[:, :, None]
        for weight in attended[name]:
            how_UTS = positive(weight, gradients, method).mean(dim=1) * mask_UT[:, :, None] * mask_UT[:, None, :]
            held_UTN = held_UTN + how_UTS @ held_UTN
            if method == "rollout":
                held_UTN = 0.5 * held_UTN
        if method == "relevance":
            held_UTN = evened(held_UTN, mask_UT)
        held_UTN = finished(ends[name].finisher, held_UTN, before[name])
        head = heads[name].contrastive
        if isinstance(head, ContrastiveHead):
            pool_UT = positive(caught.pooled[id(head.pool)], gradients, method)
        else:  # a plain mean
            real_UT = state.masks[name].float()
            pool_UT = real_UT / real_UT.sum(dim=1, keepdim=True).clamp(min=1)
        own_UN = (pool_UT[:, None] @ held_UTN)[:, 0, _classes(ends[name]) :]
        own_BN = by_record(own_UN, state, name, network.names) * _both(state, network, sides)[:, None]
        return own_BN / own_BN.sum(dim=1, keepdim=True).clamp(min=torch.finfo(own_BN.dtype).tiny)

    with torch.no_grad():
        maps = {method: {name: map_of(name, method) for name in sides} for method in METHODS}
        masks = {
            name: by_record(first.masks[name][:, _classes(ends[name]) :], first, name, network.names) for name in sides
        }
    return Alike(alike_B.detach(), maps["relevance"], maps["rollout"], masks)


def _classes(end: FinishBlock) -> int:
    """Tokens before the first that has a place: a vision transformer's class token."""
    return int(isinstance(end.finisher, ImageTail))


def _both(state: SandwichState, network: Dual, sides: Sequence[str]) -> Tensor:
    return state.present_BM[:, [network.names.index(name) for name in sides]].all(dim=1)


def follow_pair(network: Dual, batch: Batch, found: Alike, *, method: Method = "relevance", seed: int = 0) -> Faithful:
    """What becomes of the likeness (0 where the cosine is below) as tokens of both sides go and come by a map."""
    relevance: dict[str, Tensor] = getattr(found, method)
    left, right = relevance

    def alike(given: Batch) -> Tensor:
        with torch.inference_mode(), evaluating(network):
            vectors = network(given).vectors
        sides = [vectors[name].index_select(0, given.media[name].index_B) for name in (left, right)]
        here_B = given.media[left].present_B & given.media[right].present_B
        cosine_B: Tensor = (sides[0] * sides[1]).sum(dim=1) * here_B
        return cosine_B.clamp(min=0)

    return followed(network, unshared(batch), relevance, found.masks, alike, seed=seed)


# Records ---------------------------------------------------------------------------------------------------------


def look_at_pairs(model: Aligner, table: Table, rows: Sequence[int]) -> dict[str, Any]:
    """Say of some records of a table why their media are alike, pair by pair, as the model was taught them. Of a side
    that stands in several columns, the first that is there is looked at.

    Raises:
        ConfigError: no such record, or too many, or the table lacks a side.
        DataError: a record cannot be read.
    """
    check_rows(rows, table)
    columns = {side: [c for c in model.columns(side) if c in table.schema.names] for side in model.network.names}
    for side, found in columns.items():
        if not found:
            wanted = ", ".join(model.columns(side))
            raise ConfigError(f"{table.path.name} has no column to read as {side}. Give it one that is named {wanted}.")
    every = list(dict.fromkeys(column for found in columns.values() for column in found))
    cells = [
        {side: next((row[c] for c in found if row[c] is not None), None) for side, found in columns.items()}
        for row in table.records(list(rows), every)
    ]
    return {
        "model": model.manifest.name,
        "table": table.path.name,
        "records": [
            {"row": row, "pairs": _pairs(model, row, record, table.folder)}
            for row, record in zip(rows, cells, strict=True)
        ],
    }


def _pairs(model: Aligner, row: int, record: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    columns = {name: modality.columns[0] for name, modality in model.preparation.modalities.items()}
    arrays = arrays_of(model.preparation, row, {columns[name]: record[name] for name in columns}, folder)
    batch = to_tensors(arrays, next(model.network.parameters()).device)
    told: list[dict[str, Any]] = []
    for left, right in model.network.pairs:
        lacking = [name for name in (left, right) if not bool(batch.media[name].present_B.any())]
        if lacking:
            told.append({"sides": [left, right], "lacks": lacking[0]})
            continue
        found = look_at_pair(model.network, batch, left, right)
        maps: dict[str, dict[str, Tensor]] = {method: getattr(found, method) for method in METHODS}
        inputs = [
            input_told(model, name, arrays, {columns[name]: record[name]}, maps, found.masks) for name in (left, right)
        ]
        curves = {method: curves_as_json(follow_pair(model.network, batch, found, method=method)) for method in METHODS}
        alike = float(found.alike_B[0])
        told.append({"sides": [left, right], "lacks": None, "alike": alike, "inputs": inputs, "faithful": curves})
    return told


def write_pairs(path: Path, told: Mapping[str, Any]) -> Path:
    """Write the page of what `look_at_pairs` told."""
    records = [
        {**record, "pairs": [_drawn(pair, f"{record['row']}-{place}") for place, pair in enumerate(record["pairs"])]}
        for record in told["records"]
    ]
    write_atomic(path, page_template("pairs.html").render(told=told, says=SAYS, records=records).encode())
    return path


def _drawn(pair: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A pair as the template wants it."""
    if pair["lacks"] is not None:
        return dict(pair)
    curves = list(pair["faithful"].values())
    lines = [charts.Line(each["deletion"]["share"], each["deletion"]["sure"], at) for at, each in enumerate(curves)]
    chance = curves[0]["random_deletion"]
    lines.append(charts.Line(chance["share"], chance["sure"], len(lines)))
    label = "How alike the two stay as the tokens that a map names first go first, beside a random order"
    chart = charts.line_chart(f"alike{name}", label, lines, across="share of tokens that are gone")
    gains = {method: each["deletion_gain"] for method, each in pair["faithful"].items()}
    return {**pair, "inputs": [drawn_input(each) for each in pair["inputs"]], "curve": chart, "gains": gains}
