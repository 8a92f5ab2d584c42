"""Which of a sequence's tokens are here, and what each of them may see.

Here        Context (all are here), HasContext, Seen.
Elsewhere   tokens that several ranks share out (engine/parallel/context.py); attention (nn/latent_attention.py).
Promise     a token sees itself and what came before it, in whatever part of the sequence it is asked; where nothing but
            the end is missing, no mask is made.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from dougong.nn.rotary import Rotation, rotation

Runs = tuple[range, ...]
"""Places of tokens in a whole sequence: runs of equal length, in order."""


class Context:
    """How a layer meets tokens that it was not given: it was given all of them, and every answer is what came in.

    What an engine puts in its place lets every rank hold a part. Shapes: B records, T tokens, H heads.
    """

    def padded(self, num: int) -> int:
        """How many tokens there are with those added at the end, so that they can be shared out."""
        return num

    def here(self, num: int) -> Runs:
        """Which of so many tokens are here."""
        return (range(num),)

    def asking(self, num: int) -> Runs:
        """Which of so many tokens are those that ask, once `to_heads` has been called."""
        return (range(num),)

    def own(self, x_BT: Tensor) -> Tensor:
        """Of all tokens those that are here, filled up with nought to `padded`."""
        return x_BT

    def whole(self, x_BT: Tensor) -> Tensor:
        """All tokens from those that are here, the added ones too. Each rank may go on to use any of them."""
        return x_BT

    def told(self, x_BT: Tensor) -> Tensor:
        """The same of an answer, from which all ranks go on alike and without weights."""
        return x_BT

    def to_heads(self, x_BTH: Tensor) -> Tensor:
        """From tokens that are here to tokens that ask; of these perhaps not all heads."""
        return x_BTH

    def to_tokens(self, x_BTH: Tensor) -> Tensor:
        """Back again."""
        return x_BTH


@runtime_checkable
class HasContext(Protocol):
    """A module that meets tokens by its context alone."""

    context: Context


class Seen(NamedTuple):
    """What tokens may see, and where they stand. Shapes: B records, T tokens here, Q tokens that ask, S all tokens."""

    by: Rotation
    """Of the tokens here."""

    key_by: Rotation
    """Of all that are read now: what is remembered has been turned."""

    asking: Runs
    mask_BQS: Tensor | None
    """None: itself and all before."""

    real_BT: Tensor
    """Which of the tokens here are real."""

    @classmethod
    def of(
        cls,
        mask_BS: Tensor,
        frequency_R: Tensor,
        scale: float,
        *,
        context: Context | None = None,
        num_new: int | None = None,
    ) -> Seen:
        """From which of all tokens are real. Places count real tokens alone.

        `context` says which of them are here; None: the last `num_new`, or all.
        """
        num_all = mask_BS.shape[1]
        first = 0 if num_new is None else num_all - num_new
        new = (range(first, num_all),)
        here, asking = (new, new) if context is None else (context.here(num_all), context.asking(num_all))
        position_BS = (mask_BS.long().cumsum(dim=1) - 1).clamp(min=0)
        key_by = rotation(position_BS[:, first:], frequency_R, scale)
        by, real_BT = key_by, mask_BS[:, first:]
        if here != new:
            here_T = _places(here, mask_BS.device)
            by, real_BT = rotation(position_BS[:, here_T], frequency_R, scale), mask_BS[:, here_T]
        if _only_ends(mask_BS):
            return cls(by, key_by, asking, None, real_BT)
        asking_Q1 = _places(asking, mask_BS.device)[:, None]
        place_S = torch.arange(num_all, device=mask_BS.device)
        # Each sees itself, real or not: a softmax over nothing has no finite gradient.
        mask_BQS = ((place_S <= asking_Q1) & mask_BS[:, None]) | (place_S == asking_Q1)
        return cls(by, key_by, asking, mask_BQS, real_BT)


def _only_ends(mask_BS: Tensor) -> bool:
    """Whether no real token has a missing one before it: then none is seen by whoever sees what came before."""
    # A compiled graph cannot branch on what a tensor holds; one without numbers (meta) is measured as if full.
    if mask_BS.is_meta:
        return True
    return not torch.compiler.is_compiling() and bool((mask_BS[:, 1:] <= mask_BS[:, :-1]).all())


def _places(runs: Runs, device: torch.device) -> Tensor:
    return torch.cat([torch.arange(run.start, run.stop, device=device) for run in runs])
