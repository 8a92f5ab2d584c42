"""How much each modality of a model counts, measured on a table.

Here        ContributionConfig, ModalityContribution, Contribution, `measure_contribution`.
Elsewhere   the measures themselves (engine/contribution.py); the command (recipes/judge.py, cli/).
Promise     any model that can be loaded can be asked; the same table and seed give the same figures; with one modality
            there is nothing to compare, and that is said.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from dougong.bundle.model import Model
from dougong.core.config import Config
from dougong.core.errors import ConfigError
from dougong.core.seeds import derive_seed
from dougong.data.table import Table, open_table
from dougong.engine.contribution import (
    ROWS_AT_ONCE,
    Probe,
    additive_projection,
    perceptual_scores,
    recombine,
    token_shares,
)
from dougong.engine.evaluate import evaluating
from dougong.model.sandwich import JoinBlock, OwnBlock, Sandwich, SandwichState


class ContributionConfig(Config):
    """How many records each measure is taken on. All of these are asked for many times over, in memory."""

    num_records: int = Field(default=512, gt=1)
    """Drawn from the table, for Shapley values and perceptual scores."""

    num_projected: int = Field(default=128, gt=1)
    """Of these, for the additive projection, which needs the square of it."""

    num_with_tokens: int = Field(default=16, gt=0)
    """Of these, for the tokens' shares, which need some hundred answers for each."""

    num_permutations: int = Field(default=4, gt=0)
    """Of a modality over the records; and orders of tokens, each with its reverse."""

    seed: int = 0


class ModalityContribution(Config):
    """One modality."""

    shapley: float
    """What it adds to the metric; those of all modalities add up to `all - none`."""

    share: float
    """Its part of all that is gained."""

    perceptual: float
    """What the metric loses where this modality is another record's."""

    perceptual_of_model: float | None
    perceptual_of_task: float | None
    """The same, normalised; see engine/contribution.py."""

    token_share: float
    """Its tokens' part of what moves the answer, right or wrong; the mean over records."""


class Contribution(Config):
    """All modalities. Figures of the metric are negative where less of it is better."""

    metric: str
    num_records: int
    modalities: dict[str, ModalityContribution]
    all: float
    """With everything."""

    none: float
    """With nothing."""

    sets: dict[str, float]
    """With each set of modalities that was asked for, their names joined by ' + '."""

    additive: float
    """Of the nearest additive model (EMAP)."""

    additive_original: float
    """Of the model itself, on the same records."""

    num_projected: int
    num_with_tokens: int


def measure_contribution(
    model: Model, table: Table | str | Path, config: ContributionConfig | None = None
) -> Contribution:
    """Shapley values, perceptual scores, additive projection and tokens' shares of a model on a table.

    Raises:
        ConfigError: the model has one modality.
        DataError: the table has no target, or too few usable records.
    """
    config = config or ContributionConfig()
    names = tuple(model.preparation.modalities)
    if len(names) < 2:
        raise ConfigError(f"this model has one modality, {names[0]}: what it contributes is everything.")
    opened = table if isinstance(table, Table) else open_table(table)
    probe = Probe.on(model.network, opened, model.preparation, most=config.num_records, seed=config.seed)
    shapley = probe.shapley(seed=config.seed)
    perceptual = perceptual_scores(
        probe.answer,
        probe.score,
        names,
        probe.presence(),
        num_permutations=config.num_permutations,
        commonest=probe.commonest(),
        seed=config.seed,
    )
    projection = additive_projection(probe.answer, min(config.num_projected, probe.num_records), len(names))
    num_with_tokens = min(config.num_with_tokens, probe.num_records)
    shares = [_token_shares(model.network, probe, record, config) for record in range(num_with_tokens)]
    moved = [share for share in shares if any(share.values())]
    return Contribution(
        metric=probe.metric.name,
        num_records=probe.num_records,
        modalities={
            name: ModalityContribution(
                shapley=shapley.value[name],
                share=shapley.share[name],
                perceptual=perceptual[name].drop,
                perceptual_of_model=perceptual[name].of_model,
                perceptual_of_task=perceptual[name].of_task,
                token_share=float(np.mean([share[name] for share in moved])) if moved else 0.0,
            )
            for name in names
        },
        all=shapley.with_all,
        none=shapley.with_none,
        sets={" + ".join(kept) or "nothing": value for kept, value in shapley.sets.items()},
        additive=probe.score(projection.output_BC),
        additive_original=probe.score(projection.original_BC),
        num_projected=len(projection.output_BC),
        num_with_tokens=len(moved),
    )


def _token_shares(network: Sandwich, probe: Probe, record: int, config: ContributionConfig) -> dict[str, float]:
    """MM-SHAP of one record, over the tokens that enter the bridge. Shapes: K sets of tokens, T tokens.

    The paper masks words and patches before the encoders. An encoder mixes tokens of its own modality alone, so it
    moves nothing from one modality to another: a mask behind it serves for shares by modality, and costs one encoding.
    A modality that keeps no token is absent. The output is the score, before any softmax, of the model's own answer.
    """
    with torch.inference_mode(), evaluating(network):
        state = network.embed(recombine(probe.batch, np.full((1, len(probe.names)), record)))
        # What a modality decides by itself follows from its tokens too; late fusion joins vectors, at the end.
        after = [place for place, block in enumerate(network.blocks) if isinstance(block, OwnBlock | JoinBlock)]
        behind = after[0] if after else len(network.blocks)
        for block in network.blocks[:behind]:
            state = block(state)

        def answers(keep_KT: npt.NDArray[np.bool_]) -> Tensor:
            following = _with_tokens(state, network.names, torch.from_numpy(keep_KT))
            for block in network.blocks[behind:]:
                following = block(following)
            output_KC: Tensor = network.head(following).output_BC.double()
            return output_KC

        owner_T = [name for name, mask_UT in state.masks.items() for _ in range(int(mask_UT.sum()))]
        own = int(answers(np.ones((1, len(owner_T)), np.bool_))[0].argmax())

        def score(keep_KT: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
            parts = [
                answers(keep_KT[start : start + ROWS_AT_ONCE])[:, own].cpu().numpy()
                for start in range(0, len(keep_KT), ROWS_AT_ONCE)
            ]
            return np.concatenate(parts)

        seed = derive_seed(config.seed, "tokens", record)
        return token_shares(score, owner_T, probe.names, num_permutations=config.num_permutations, seed=seed)


def _with_tokens(state: SandwichState, names: tuple[str, ...], keep_KT: Tensor) -> SandwichState:
    """The one record of `state` as K records, each with some of its tokens."""
    num_sets, first = len(keep_KT), 0
    tokens, masks, medium, present = {}, {}, {}, {}
    for name, mask_UT in state.masks.items():
        real_T = mask_UT[0]
        last = first + int(real_T.sum())
        masks[name] = mask_UT.new_zeros(num_sets, len(real_T))
        masks[name][:, real_T] = keep_KT[:, first:last].to(real_T.device)
        tokens[name] = state.tokens[name].expand(num_sets, -1, -1)
        medium[name] = torch.arange(num_sets, device=real_T.device)
        present[name] = masks[name].any(dim=1)
        first = last
    nothing = state.present_BM.new_zeros(num_sets)
    present_BM = torch.stack([present.get(name, nothing) for name in names], dim=1)
    return state._replace(tokens=tokens, masks=masks, medium=medium, present_BM=present_BM)
