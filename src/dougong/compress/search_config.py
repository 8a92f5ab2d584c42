"""What a search tries, and how long.

Here        SearchConfig.
Elsewhere   searching (search.py).
Promise     settings that contradict each other are refused before anything is measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from dougong.compress.distil import DistilConfig
from dougong.compress.importance import ImportanceConfig
from dougong.compress.prune import PruneConfig, SparseConfig
from dougong.compress.recover import RecoverConfig
from dougong.core.config import Config


class SearchConfig(Config):
    """What is tried, and how long."""

    widths: tuple[float, ...] = (1.0, 0.75, 0.625, 0.5, 0.375, 0.25)
    layers: tuple[float, ...] = (1.0, 0.5)
    blocks: tuple[float, ...] = (1.0, 0.5)
    keeps: tuple[float, ...] = (1.0, 0.6, 0.35)
    """Shares that are combined: of widths, of encoders' layers, of the bridge's blocks, and what pruning leaves."""

    modalities: tuple[str, ...] | None = None
    """All that the result is to be asked with: it learns to do without the others, which its teacher sees. None: all
    that the teacher reads."""

    pool: bool = True
    """Whether twice as many neighbouring tokens of pictures and sounds may become one, too."""

    batch_size: int = Field(default=1, gt=0)
    """Records that are answered at once where time is measured."""

    turns: int = Field(default=15, gt=0)
    """Times that each is measured."""

    ranked: int = Field(default=12, gt=0)
    """Candidates within the budget, those with most parameters, that the proxy ranks."""

    proxy_steps: int = Field(default=20, ge=0)
    """Steps that a candidate learns before its answers are held against the teacher's."""

    tried: int = Field(default=4, gt=0)
    """Of these, how many learn for a while."""

    try_share: float = Field(default=0.3, gt=0, le=1)
    """Of distil.train.steps, for how long."""

    finished: int = Field(default=2, gt=0)
    """Of these, how many at most learn on to the end, the best one first, until one loses no more than it may."""

    held_out: float = Field(default=0.1, gt=0, lt=0.5)
    """Share of the records that choose among candidates; as many judge at the end where no table is given for it."""

    unit: str | None = None
    """A column whose values are on one side each. None: a medium that records share, where there is one."""

    importance: ImportanceConfig = ImportanceConfig()
    prune: PruneConfig = PruneConfig()
    sparse: SparseConfig | None = None
    """Of what learns, make some weights zero where they are. None: no."""

    distil: DistilConfig = DistilConfig()
    recover: RecoverConfig | None = RecoverConfig()
    """Where rounding costs what may not be lost, and the weights as they learnt do not: how long they are taught to
    live with their bits. None: not at all."""

    beside: dict[str, Path] = {}
    """Further teachers of one modality each, by its name: a bundle or a run of that modality alone."""

    seed: int = 0

    @model_validator(mode="after")
    def _steps_to_share_out(self) -> Self:
        if self.distil.train.steps is None:
            raise ValueError(
                "distil.train.steps is not given, and a search shares them out. Set it, for example to 400."
            )
        return self

    @model_validator(mode="after")
    def _one_that_leaves_out(self) -> Self:
        if self.modalities is not None and (self.distil.views or self.distil.withhold):
            raise ValueError(
                "modalities says what the student is shown, and so does distil.views or distil.withhold. Give one of "
                "them."
            )
        strange = [name for name in self.beside if self.modalities is not None and name not in self.modalities]
        if strange:
            raise ValueError(f"beside.{strange[0]} teaches a modality that the student does not read. Leave it out.")
        return self
