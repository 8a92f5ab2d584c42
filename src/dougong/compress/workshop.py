"""Candidates made into models, and models into what can be asked.

Here        Workshop: a candidate's shape, its model with the teacher's weights or with those that it learnt, carried
            out by its engine; Asked, whatever answers where a network is judged; `model_of`; `fullest`.
Elsewhere   what a candidate is (candidate.py); making students (student.py); letting them learn (search.py).
Promise     the same candidate is the same model, whenever it is made. What is handed out is not to be changed: engines
            convert a model once.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from dougong.bundle.model import Model
from dougong.compress.candidate import EAGER, Backend, Candidate, EagerRunner, Point, Runner
from dougong.compress.importance import Importance, measure_importance
from dougong.compress.prune import pruned_shape
from dougong.compress.search_config import SearchConfig
from dougong.compress.sensitivity import rows_of
from dougong.compress.structure import Structure, structure_of
from dougong.compress.student import Shape, build_student, inherit, shape_of
from dougong.core.bundle import Manifest
from dougong.core.errors import ConfigError
from dougong.core.seeds import derive_seed
from dougong.data.collate import View
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.split import sample_table
from dougong.data.table import Table
from dougong.engine.batches import to_tensors
from dougong.engine.checkpoint import best_weights, load_weights
from dougong.engine.random_state import random_state_kept
from dougong.engine.weights import distinct_weights, mapped_weights, put_weights, write_weights
from dougong.model.sandwich import Sandwich
from dougong.nn.batch import Batch
from dougong.nn.block_stack import BlockStack

RECOVERED: Final = "weights.safetensors"
AT_ONCE: Final = 64
"""Records of a batch to calibrate with."""


class Workshop:
    """What all candidates of one teacher are made of."""

    def __init__(
        self, teacher: Model, learn: Table, config: SearchConfig, folder: Path, backends: Mapping[str, Backend]
    ) -> None:
        """`learn`: the records that calibrate and tell what is important; `folder` is where candidates learn.

        Raises:
            ConfigError: there are fewer records than are to be answered at once.
        """
        self.teacher, self.config, self.folder, self.backends = teacher, config, folder, backends
        self.calibration = _batches(teacher, learn, config.importance.num_records, AT_ONCE, config.seed)
        together = self.calibration
        if max(batch.num_records for batch in together) < config.batch_size:
            together = _batches(teacher, learn, config.batch_size, config.batch_size, config.seed)
        self.probe = fullest(together, config.batch_size)
        """What is answered where time is measured."""

        self.structure: Structure = structure_of(teacher.network)
        self.importance: Importance = measure_importance(
            teacher.network, self.structure, self.calibration, teacher.preparation.target, config.importance
        )
        self._held: tuple[str, str, Model] | None = None
        """The model that was last asked for, by shape and stage."""

    def network_of(self, point: Point) -> Model:
        """The model of a candidate that has learnt, with its best weights; it is not to be changed."""
        candidate, stage = point.candidate, ""
        if candidate.recovered:
            stage = f"recovered-{candidate.key}"
        elif not self.is_untaught(candidate):
            done = self.stage(candidate, "final") / "done.json"
            better = done.is_file() and json.loads(done.read_text(encoding="utf-8"))["better"]
            stage = "final" if better else "try"
        if self._held is None or self._held[:2] != (candidate.shape_key, stage):
            model = self.built(candidate)
            if candidate.recovered:
                file = self.stage(candidate, stage) / RECOVERED
                put_weights(model.network, mapped_weights(file), where=str(file))
            elif stage:
                load_weights(model.network, best_weights(self.stage(candidate, stage)))
            model.network.eval()
            self.hold(candidate, stage, model)
        assert self._held is not None
        return self._held[2]

    def hold(self, candidate: Candidate, stage: str, model: Model) -> None:
        """Take this model for the candidate's at this stage, without reading it again."""
        self._held = (candidate.shape_key, stage, model)

    def keep_recovered(self, candidate: Candidate, taught: Model) -> None:
        """Keep the weights of a candidate that was taught to live with its bits."""
        folder = self.stage(candidate, f"recovered-{candidate.key}")
        folder.mkdir(parents=True, exist_ok=True)
        write_weights(folder / RECOVERED, distinct_weights(taught.network))
        self._held = None

    def runner_of(self, point: Point) -> Runner:
        """The same, carried out by its engine."""
        return self.carried_out(point.candidate, self.network_of(point))

    def is_untaught(self, candidate: Candidate) -> bool:
        """Whether it is shipped with the teacher's own weights, as they are."""
        return candidate.is_teacher and self.config.sparse is None

    def carried_out(self, candidate: Candidate, model: Model) -> Runner:
        """Its model, as its engine carries it out at its bits. The one before is taken away."""
        if candidate.engine == EAGER:
            return EagerRunner(model)
        folder = self.folder / "engine"  # of one at a time
        shutil.rmtree(folder, ignore_errors=True)
        calibration = [self.seen_by(model, batch) for batch in self.calibration]
        backend = self.backends[candidate.engine]
        return backend.carry_out(model, candidate.bits, calibration, folder, nearest=candidate.recovered)

    def built(self, candidate: Candidate) -> Model:
        """A candidate's model with the teacher's weights, before it has learnt anything."""
        shape = self.shape(candidate)
        signature = self.teacher.manifest.signature
        with random_state_kept():
            torch.manual_seed(derive_seed(self.config.seed, "student"))
            network, signature = build_student(self.teacher.network, signature, shape)
        inherit(self.teacher.network, network, shape, self.importance)
        return model_of(network, self.teacher)

    def shape(self, candidate: Candidate) -> Shape:
        """Exactly what stays of the teacher."""
        base = shape_of(candidate.student, self.structure, self.importance)
        return pruned_shape(
            self.teacher.network, self.structure, self.importance, base, candidate.keep, self.config.prune
        )

    def seen_by(self, model: Model, batch: Batch) -> Batch:
        """What of a batch this model reads."""
        return Batch({name: batch.media[name] for name in model.network.names}, batch.target)

    def stage(self, candidate: Candidate, stage: str) -> Path:
        """Where a candidate's shape keeps what it learns at this stage."""
        return self.folder / "learn" / candidate.shape_key / stage


class Asked(BlockStack[Any, Any]):
    """Whatever answers, where a network is judged."""

    def __init__(self, runner: Runner) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        self.place = nn.Parameter(torch.zeros(()))  # says on which device it is
        self._runner = runner

    def embed(self, batch: Batch) -> Any:
        return self._runner(batch)

    def head(self, state: Any) -> Any:
        return state


def model_of(network: Sandwich, teacher: Model) -> Model:
    """A student with what feeds it and what is known of it."""
    preparation = teacher.preparation
    if network.names != tuple(preparation.modalities):
        preparation = preparation.only(network.names)
    manifest = Manifest(
        name=f"{teacher.manifest.name}-compressed",
        signature=preparation.signature(),
        model=network.config.model_dump(mode="json"),
        provenance=dict(teacher.manifest.provenance),
    )
    return Model(network, preparation, manifest)


def fullest(batches: Sequence[Batch], count: int) -> Batch:
    """So many records, those that lack least: what an answer takes is asked of them.

    Raises:
        ConfigError: no batch has so many.
    """
    most = max((batch.num_records for batch in batches), default=0)
    if most < count:
        raise ConfigError(
            f"batch_size={count} records are timed at once, and {most} can be learnt from. Ask for fewer."
        )
    batches = [batch for batch in batches if batch.num_records >= count]
    rows: list[tuple[int, int, int]] = []
    for number, batch in enumerate(batches):
        here_B = torch.stack([media.present_B for media in batch.media.values()]).sum(dim=0)
        rows += [(-int(here), number, row) for row, here in enumerate(here_B.tolist())]
    (_, number, _), *_ = sorted(rows)
    batch = batches[number]  # records of one batch can be asked together
    chosen = sorted((lacks, row) for lacks, other, row in rows if other == number)[:count]
    return rows_of(batch, torch.tensor([row for _, row in chosen]))


def _batches(teacher: Model, learn: Table, most: int, size: int, seed: int) -> list[Batch]:
    """Some records to learn from, as they are."""
    table = sample_table(learn, most, seed=seed)
    views = (View(keep=tuple(teacher.preparation.modalities)),)
    loader = Loader(table, teacher.preparation, LoaderConfig(batch_size=size, workers=0), views=views)
    return [to_tensors(arrays) for arrays in loader.one_pass() if len(arrays.row_B)]
