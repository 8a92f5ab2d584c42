"""Many small feed-forwards, of which each token is sent to a few.

Here        GatedFeedForward, Router, Experts, MixtureOfExperts.
Elsewhere   experts on several ranks (engine/parallel/expert.py).
Promise     a token's answer depends on that token only, however many others are sent the same way: no expert has a
            limit that drops any. Balance moves by the loads alone and has no part in any gradient.

DeepSeek-V3 (2024, arXiv:2412.19437): scores by sigmoid; a bias that is added for choosing, not for weighing, and that
moves a little after each step against an expert's load (Wang et al. 2024, arXiv:2408.15664); groups of experts of which
a token may use a few; shared experts that every token uses.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.nn import functional

from dougong.nn.split import Split, same


class GatedFeedForward(nn.Module):
    """Widen twice, let one gate the other, narrow (Shazeer 2020, arXiv:2002.05202, SwiGLU)."""

    def __init__(self, *, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.widen = nn.Linear(width, hidden, bias=False)
        self.narrow = nn.Linear(hidden, width, bias=False)

    def split(self) -> Split:
        return Split(columns=("gate", "widen"), rows=("narrow",))

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD: Tensor = self.narrow(functional.silu(self.gate(x_BTD)) * self.widen(x_BTD))
        return y_BTD


class Routed(NamedTuple):
    """Where each token goes. Shapes: N tokens, A experts chosen for each."""

    expert_NA: Tensor
    weight_NA: Tensor


class Router(nn.Module):
    """Chooses experts for each token. Shapes: N tokens, E experts, G groups, A chosen."""

    exact_weights = ("weight_ED",)
    """Stay in fp32 where others have 16 bits."""

    def __init__(
        self,
        *,
        width: int,
        num_experts: int,
        num_chosen: int,
        num_groups: int = 1,
        groups_chosen: int = 1,
        normalise: bool = True,
        scale: float = 1.0,
        balance_speed: float = 0.001,
    ) -> None:
        super().__init__()
        self.num_chosen, self.num_groups, self.groups_chosen = num_chosen, num_groups, groups_chosen
        self.normalise, self.scale, self.balance_speed = normalise, scale, balance_speed
        self.weight_ED = nn.Parameter(torch.empty(num_experts, width))
        nn.init.normal_(self.weight_ED, std=width**-0.5)
        self.register_buffer("bias_E", torch.zeros(num_experts))
        self.register_buffer("load_E", torch.zeros(num_experts))
        """Tokens sent to each since the last step."""

    bias_E: Tensor
    load_E: Tensor

    def forward(self, x_ND: Tensor, counted_N: Tensor | None = None) -> Routed:
        """`counted_N` is False for tokens that stand for nothing and must not count as load."""
        # In float32 under any precision: a rounded score sends tokens elsewhere.
        with torch.autocast("cpu" if x_ND.is_meta else x_ND.device.type, enabled=False):
            score_NE = functional.linear(x_ND.float(), self.weight_ED.float()).sigmoid()
        expert_NA = self._chosen(score_NE.detach() + self.bias_E)
        weight_NA = score_NE.gather(1, expert_NA)
        if self.normalise:
            weight_NA = weight_NA / (weight_NA.sum(dim=-1, keepdim=True) + 1e-20)
        if self.training:
            with torch.no_grad():
                counts = torch.ones_like(expert_NA, dtype=self.load_E.dtype)
                if counted_N is not None:
                    counts = counts * counted_N[:, None]
                self.load_E.index_add_(0, expert_NA.flatten(), counts.flatten())
        return Routed(expert_NA, weight_NA * self.scale)

    def _chosen(self, liking_NE: Tensor) -> Tensor:
        if self.num_groups > 1:
            liking_NGE = liking_NE.view(len(liking_NE), self.num_groups, -1)
            group_NG = liking_NGE.topk(2, dim=-1)[0].sum(dim=-1)
            best_N = group_NG.topk(self.groups_chosen, dim=-1, sorted=False)[1]
            out_NG = torch.ones_like(group_NG, dtype=torch.bool).scatter(1, best_N, False)
            liking_NE = liking_NGE.masked_fill(out_NG[..., None], -torch.inf).flatten(1)
        return liking_NE.topk(self.num_chosen, dim=-1, sorted=False)[1]

    @torch.no_grad()
    def balance(self) -> None:
        """After a step: experts with more than the mean load become less liked, the others more; loads start anew."""
        self.bias_E += self.balance_speed * torch.sign(self.load_E.mean() - self.load_E)
        self.load_E.zero_()


class Experts(nn.Module):
    """E feed-forwards as three-dimensional weights. Shapes: E experts, F hidden channels, D channels."""

    def __init__(self, *, num_experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.widen_E2FD = nn.Parameter(torch.empty(num_experts, 2, hidden, width))
        self.narrow_EDF = nn.Parameter(torch.empty(num_experts, width, hidden))
        nn.init.normal_(self.widen_E2FD, std=width**-0.5)
        nn.init.normal_(self.narrow_EDF, std=hidden**-0.5)

    def forward(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        """Rows sorted by expert, of which expert e has `counts_E[e]`, through their experts."""
        parts = []
        for expert, x_KD in enumerate(torch.split(x_MD, _counted(counts_E, len(x_MD)))):
            gate_FD, wide_FD = self.widen_E2FD[expert].unbind()
            hidden_KF = functional.silu(functional.linear(x_KD, gate_FD)) * functional.linear(x_KD, wide_FD)
            parts.append(functional.linear(hidden_KF, self.narrow_EDF[expert]))
        return torch.cat(parts)


def _counted(counts_E: Tensor, num_rows: int) -> list[int]:
    """As a list; even where there are no numbers, and a model is only measured."""
    if torch.compiler.is_compiling():  # the numbers are there when it runs
        sizes: list[int] = counts_E.tolist()
        return sizes
    if not is_fake(counts_E) and not counts_E.is_meta:
        found: list[int] = counts_E.tolist()
        return found
    num = len(counts_E)
    return [num_rows * (e + 1) // num - num_rows * e // num for e in range(num)]


class MixtureOfExperts(nn.Module):
    """Shared experts for all tokens, and a few of the routed ones for each. Shapes: B records, T tokens, N = B * T."""

    def __init__(self, *, width: int, hidden: int, num_shared: int, experts: Experts, router: Router) -> None:
        super().__init__()
        self.router = router
        self.experts = experts
        if num_shared:
            self.shared = GatedFeedForward(width=width, hidden=hidden * num_shared)
        self.has_shared = num_shared > 0
        self.tokens = same()
        self.to_experts, self.from_experts = same(), same()

    def split(self) -> Split:
        pieces = (("experts.widen_E2FD", 2), ("experts.narrow_EDF", 2))
        return Split(pieces=pieces, tokens=("tokens",), shared=("to_experts",), summed=("from_experts",))

    def forward(self, x_BTD: Tensor, counted_BT: Tensor | None = None) -> Tensor:
        all_BTD = self.tokens(x_BTD)
        all_ND = all_BTD.flatten(0, -2)
        routed = self.router(all_ND, None if counted_BT is None else counted_BT.flatten())
        sent_ND = self.send(self.to_experts(all_ND), routed._replace(weight_NA=self.to_experts(routed.weight_NA)))
        y_BTD: Tensor = self.from_experts(sent_ND.view_as(all_BTD))
        return y_BTD + self.shared(x_BTD) if self.has_shared else y_BTD

    def send(self, x_ND: Tensor, routed: Routed) -> Tensor:
        """Each token through its experts, weighed and added up."""
        num_chosen = routed.expert_NA.shape[1]
        order_M = routed.expert_NA.flatten().argsort(stable=True)
        token_M = order_M // num_chosen
        expert_M = routed.expert_NA.flatten()
        counts_E = expert_M.new_zeros(self.experts.num_experts).index_add_(0, expert_M, torch.ones_like(expert_M))
        y_MD = self.experts(x_ND.index_select(0, token_M), counts_E)
        weight_M = routed.weight_NA.flatten().index_select(0, order_M).to(y_MD.dtype)
        return torch.zeros_like(x_ND).index_add(0, token_M, (y_MD * weight_M[:, None]).to(x_ND.dtype))
