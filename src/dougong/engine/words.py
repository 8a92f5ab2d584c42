"""Judges what a model would write, given the true words before each.

Here        WordsJudged, WordSums, `judge_words`.
Elsewhere   decisions (engine/evaluate.py); the same of two directions at once (recipes/generate.py).
Promise     figures are means over all words, whatever the batches were. The model is left as it was, each module in the
            mode it had. Ranks that share the records out all get the figures that one process would have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dougong.data.batch import BadRecord
from dougong.data.position import Loader
from dougong.engine.batches import to_tensors
from dougong.engine.evaluate import all_told, evaluating
from dougong.engine.parallel.ranks import ALONE, Ranks
from dougong.nn.block_stack import BlockStack


class WordsJudged(NamedTuple):
    """What a model knew of the words of some records."""

    metrics: dict[str, float]
    """`loss` (nats a word), `bits` (the same in bits) and `token_accuracy` (how often the likeliest word was the true
    one). Empty where there was no word."""

    num_records: int
    """That have words."""

    bad: tuple[BadRecord, ...] = ()


@dataclass
class WordSums:
    """Words of batches, added up. Shapes: B records, N words, V words of the vocabulary."""

    sums: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    """Nats, right words, words, records."""

    def add(self, score_BNV: Tensor, target_BN: Tensor, loss_BN: Tensor, due_BN: Tensor) -> None:
        """Count the words that are due."""
        right_BN = score_BNV.argmax(dim=-1) == target_BN
        counted = (loss_BN[due_BN].double(), right_BN[due_BN], due_BN, due_BN.any(dim=1))
        self.sums += torch.stack([each.sum().double() for each in counted]).cpu()

    def judged(self, ranks: Ranks = ALONE, bad: tuple[BadRecord, ...] = ()) -> WordsJudged:
        """The figures, of all ranks together."""
        nats, right, words, records = ranks.rows(self.sums[None]).sum(dim=0).tolist()
        metrics = {}
        if words:
            loss = nats / words
            metrics = {"loss": loss, "bits": loss / math.log(2), "token_accuracy": right / words}
        return WordsJudged(metrics, int(records), bad)


def judge_words(model: BlockStack[Any, Any], loader: Loader, text: str, *, ranks: Ranks = ALONE) -> WordsJudged:
    """Judge `model` on every record of the loader. Its output must have `score_BNV`, `loss_BN` and `due_BN` of the
    words of the modality `text`.

    With `ranks`, all of them call this, each with a loader of its share. It computes as the caller's surroundings do.
    """
    device = next(model.parameters()).device
    sums = WordSums()
    bad: list[tuple[int, BadRecord]] = []
    with torch.inference_mode(), evaluating(model):
        for number, arrays in enumerate(loader.one_pass()):
            bad += [(number, record) for record in arrays.bad]
            if not len(arrays.row_B) and ranks.world == 1:
                continue
            batch = to_tensors(arrays, device)
            output = model(batch)  # also of nothing: ranks may compute it together
            media = batch.media[text]
            if len(arrays.row_B) and len(media.values["ids_UT"]):
                target_BN = media.values["ids_UT"].index_select(0, media.index_B)[:, 1:]
                sums.add(output.score_BNV[:, :-1], target_BN, output.loss_BN, output.due_BN)
    return sums.judged(ranks, all_told(ranks, bad))
