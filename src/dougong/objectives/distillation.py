"""Learning what another decides, and how surely.

Here        `distillation_loss`.
Elsewhere   who teaches whom (recipes/losses.py).
Promise     a sum over records; the teacher gets no gradient, and one who is agreed with gives the learner none.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from dougong.core.signature import Task


def distillation_loss(output_BC: Tensor, teacher_BC: Tensor, task: Task) -> Tensor:
    """How far the learner's outputs are from the teacher's, in float32. Shapes: B records, C outputs.

    Cross entropy against the teacher's probabilities, less its least: the Kullback-Leibler divergence from the teacher
    to the learner (Hinton et al. 2015, arXiv:1503.02531, at temperature 1). For several labels the mean of each one's;
    for a number the squared distance.
    """
    output_BC, teacher_BC = output_BC.float(), teacher_BC.detach().float()
    if task == "single_label":
        told_BC = teacher_BC.log_softmax(dim=-1)
        return functional.kl_div(output_BC.log_softmax(dim=-1), told_BC, reduction="sum", log_target=True)
    if task == "multi_label":
        told_BC = teacher_BC.sigmoid()
        least_BC = functional.binary_cross_entropy_with_logits(teacher_BC, told_BC, reduction="none")
        loss_BC = functional.binary_cross_entropy_with_logits(output_BC, told_BC, reduction="none") - least_BC
        return loss_BC.mean(dim=-1).sum()
    return functional.mse_loss(output_BC[:, 0], teacher_BC[:, 0], reduction="sum")
