"""Learns how much each vote weighs, from records that training did not see.

Here        `weigh_votes`, and `learn_weights` of votes alone.
Elsewhere   the votes (model/votes.py); training those who vote (recipes/run.py).
Promise     only the weights of the votes change; they are none below zero, and on the records given no worse than the
            votes' plain mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from dougong.core.signature import Task
from dougong.data.batch import BatchArrays
from dougong.engine.batches import to_tensors
from dougong.engine.evaluate import evaluating
from dougong.model.sandwich import Sandwich
from dougong.model.votes import Ballot, weigh
from dougong.objectives.decision import decision_loss

SHRINK = 1e-3
"""How strongly weights are drawn to one another, in nats a record: what few records say is not believed."""

STEPS = 100


class Learnt(NamedTuple):
    """What suits the records best; the weights' mean is 1."""

    weight_V: Tensor
    scale: Tensor


def weigh_votes(model: Sandwich, batches: Iterable[BatchArrays], task: Task) -> None:
    """Set the weights that are best on these records."""
    learnt = learn_weights(*_votes(model, batches), task)
    model.votes.weight_V.copy_(learnt.weight_V)
    model.votes.scale.copy_(learnt.scale)


def learn_weights(ballot: Ballot, target_B: Tensor, task: Task) -> Learnt:
    """Those of the least mean loss of the weighed votes. Shapes: B records, V voters.

    Minimised over the logarithms of the weights, so that no vote counts against what it says, and of the scale, which
    makes the probabilities as sure as they are right (temperature scaling, Guo et al. 2017, arXiv:1706.04599); of a
    number the scale stays 1.
    """
    free_V = torch.zeros(ballot.present_BV.shape[1], dtype=torch.float64, requires_grad=True)
    surer = torch.zeros((), dtype=torch.float64, requires_grad=task != "regression")
    free = [free_V] if task == "regression" else [free_V, surer]
    optimizer = torch.optim.LBFGS(free, max_iter=STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = decision_loss(weigh(ballot, free_V.exp(), surer.exp()), target_B, task) / len(target_B)
        found = found + SHRINK * (free_V - free_V.mean()).square().sum()
        found.backward()  # type: ignore[no-untyped-call]
        return found

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    weight_V = free_V.detach().exp()
    return Learnt(weight_V / weight_V.mean(), surer.detach().exp())


def _votes(model: Sandwich, batches: Iterable[BatchArrays]) -> tuple[Ballot, Tensor]:
    """Of all records, in float64: weights that are hard to tell apart are still learnt the same everywhere."""
    device = next(model.parameters()).device
    logits, present, targets = [], [], []
    with evaluating(model), torch.inference_mode():
        for arrays in batches:
            batch = to_tensors(arrays, device)
            ballot = model(batch).ballot
            assert ballot is not None
            assert batch.target is not None
            logits.append(ballot.logit_BVC.double())
            present.append(ballot.present_BV)
            targets.append(batch.target)
    # Clones: what was made without gradients cannot be saved for a backward pass.
    return Ballot(torch.cat(logits).cpu().clone(), torch.cat(present).cpu().clone()), torch.cat(targets).cpu().clone()
