"""Which layout a recipe should have on some devices, and what it would cost.

Here        plan_recipe, chosen_plan, read_cluster, read_varied, PlanResult; Planned, Varied.
Elsewhere   formulas, search and rehearsal (engine/planner/); carrying a layout out (recipes/run.py).
Promise     nothing is trained. The model is built and run once, on a real batch of the recipe's training records. Only
            layouts that the engine can carry out are among those found.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias, cast, get_args

from dougong.core.config import from_yaml, parse
from dougong.core.errors import ConfigError
from dougong.core.sizes import bytes_as_text
from dougong.data.loader import Loader
from dougong.data.position import WHOLE, Position, Share
from dougong.data.preparation import Preparation
from dougong.engine.batches import to_tensors
from dougong.engine.memory.account import StepBytes
from dougong.engine.memory.config import MemoryConfig, keep_of, settled_keep
from dougong.engine.memory.offload import OffloadConfig
from dougong.engine.memory.recompute import KEEPS, Keep
from dougong.engine.memory.segments import SegmentChoice, choose_segments
from dougong.engine.parallel.plan import PlanConfig
from dougong.engine.planner.cluster import KNOWN, ClusterConfig, this_machine
from dougong.engine.planner.predict import KEEP_ALL, MIXED, Activations, Choice, Prediction, bytes_of
from dougong.engine.planner.rehearse import Rehearsal, rehearse
from dougong.engine.planner.search import Found, SearchConfig, describe, divisors, find_layouts, reason
from dougong.engine.planner.shape import SHAPES, ModelShape, measure_shape
from dougong.engine.precision.choice import Chosen
from dougong.engine.prepare import check_model
from dougong.nn.batch import Batch
from dougong.recipes.build import (
    LaidOut,
    belongs_together,
    build_model,
    check_layout,
    learn_preparation,
    loss_of,
    makes_once,
    open_records,
)
from dougong.recipes.room import MEMORY_SHARE, building, check_state
from dougong.recipes.tables import Tables

EVERYTHING_ANEW: Final = Activations("nothing")
ANEW: Final = (KEEP_ALL, Activations("products"), EVERYTHING_ANEW)
"""What may be chosen among where recompute varies."""

Varied: TypeAlias = Literal["micro-batches", "precision", "recompute", "offload"]
"""What may be chosen besides how ranks stand. A step has the recipe's records, whatever is chosen."""


class PlanResult(NamedTuple):
    """What was found."""

    recipe: LaidOut | None
    """None: of a shape that is known by its name."""

    name: str
    cluster: ClusterConfig
    shape: ModelShape
    found: Found
    held: tuple[StepBytes, ...]
    """By rank of the best layout's pipeline; nothing where it could not be rehearsed."""

    notes: tuple[str, ...] = ()
    """What was asked to vary and cannot."""

    @property
    def best(self) -> Prediction:
        return self.found.predictions[0]

    def as_json(self) -> dict[str, Any]:
        return {
            "recipe": self.name,
            "cluster": self.cluster.model_dump(mode="json"),
            "parameters": self.shape.parameters,
            "considered": self.found.considered,
            "layouts": [_as_json(each, self.recipe) for each in self.found.predictions],
            "reason": reason(self.found),
            "rehearsed": [each._asdict() for each in self.held],
            "notes": list(self.notes),
        }


def plan_recipe(
    recipe: LaidOut, cluster: ClusterConfig, *, vary: Collection[Varied] = (), most: int = 10
) -> PlanResult:
    """Predict every layout of the recipe on these devices that can be carried out, and rehearse the best.

    What varies is chosen with the layout. By offload, also what the engine cannot do yet; neither that nor what lies on
    the disk is rehearsed.

    Raises:
        ConfigError: none fits; the message says what is nearest.
    """
    together, notes = belongs_together(recipe), []
    if together is not None and "micro-batches" in vary:
        vary = [each for each in vary if each != "micro-batches"]
        notes.append(f"micro-batches stay as the recipe has them: {together} looks at all records of one")
    tables = open_records(recipe)
    planned = Planned(recipe, tables, learn_preparation(recipe, tables)[0])
    found = planned.search(cluster, vary=vary, most=most)
    held: tuple[StepBytes, ...] = ()
    # What lies on the disk a rehearsal would hold.
    while found.predictions[0].can_be_carried_out and found.predictions[0].choice.offload == "none":
        held = planned.rehearsed(found.predictions[0].choice, cluster.devices)
        if max(each.peak for each in held) <= MEMORY_SHARE * cluster.memory_bytes:
            break
        if len(found.predictions) == 1:
            raise ConfigError(
                f"{describe(found.predictions[0].choice)} was predicted to fit, and takes "
                f"{max(each.peak for each in held) / 2**30:.3g} GiB. Use more devices or smaller batches."
            )
        found = found._replace(predictions=found.predictions[1:])
    return PlanResult(recipe, recipe.name, cluster, planned.shape, found, held, tuple(notes))


def plan_shape(name: str, cluster: ClusterConfig, *, vary: Collection[Varied] = (), most: int = 10) -> PlanResult:
    """The same of a model that is known by its sizes alone: one micro-batch on each rank that shares out the records,
    products in bf16, weights in 16 bits and again in fp32 where the optimizer is. Nothing is rehearsed.

    Raises:
        ConfigError: no layout fits.
    """
    shape = SHAPES[name]()
    search = SearchConfig(
        records=round(shape.num_records) * cluster.devices,
        micro_batches=(1,),
        activations=ANEW if "recompute" in vary else (KEEP_ALL,),
        offload=("none", "host", "disk") if "offload" in vary else ("none",),
        memory_share=MEMORY_SHARE,
        most=most,
    )
    found = find_layouts(shape, cluster, search, MIXED)
    return PlanResult(None, name, cluster, shape, found, ())


def chosen_plan(planned: Planned, world: int, per_node: int | None = None) -> PlanConfig:
    """The layout that is predicted to be fastest on so many ranks, `per_node` of them on this machine (None: all).

    Raises:
        ConfigError: none can be carried out, or none fits.
    """
    return planned.search(this_machine(world, per_node), most=1).predictions[0].choice.plan


class Planned:
    """A recipe's model with one of its batches: what can be said of a layout before it is carried out."""

    def __init__(
        self, recipe: LaidOut, tables: Tables, preparation: Preparation, *, run: Path | None = None, per_node: int = 1
    ) -> None:
        """`run` is the folder in which it will be trained, by so many ranks of this machine."""
        self.recipe, self.tables, self.preparation = recipe, tables, preparation
        self._read: dict[tuple[Share, int, int], list[Batch]] = {}
        with building(recipe.memory.offload, run, ranks=per_node):
            self.model = build_model(recipe, preparation)
        self.loss = loss_of(recipe, preparation, None)
        self.shape = measure_shape(self.model, self.batches(WHOLE, 1)[0], self.loss)

    def batches(self, share: Share, count: int, batch_size: int | None = None) -> list[Batch]:
        """The first ones that have records, as far as they are this share's; None: of the recipe's size."""
        size = self.recipe.data.loader.batch_size if batch_size is None else batch_size
        if (share, count, size) in self._read:
            return self._read[share, count, size]
        loader = Loader(
            self.tables.train,
            self.preparation,
            self.recipe.data.loader.model_copy(update={"workers": 0, "batch_size": size}),
            seed=self.recipe.seed,
            train=True,
            share=share,
        )
        found = [to_tensors(arrays) for _, arrays in itertools.islice(loader.batches(Position()), count)]
        self._read[share, count, size] = found
        return found

    @property
    def records(self) -> int:
        """Of a step."""
        return round(self.shape.num_records) * self.recipe.train.accumulation

    def search(self, cluster: ClusterConfig, *, vary: Collection[Varied] = (), most: int) -> Found:
        own = self.choice(PlanConfig())
        search = SearchConfig(
            records=self.records,
            micro_batches=tuple(divisors(self.records)) if "micro-batches" in vary else (own.micro_batches,),
            precisions=("fp32", "bf16") if "precision" in vary else (cast(Chosen, own.precision),),
            activations=self._varied(own.activations) if "recompute" in vary else (own.activations,),
            offload=("none", "host", "disk") if "offload" in vary else (own.offload,),
            memory_share=MEMORY_SHARE,
            most=most,
        )
        train = self.recipe.train
        sizes = bytes_of(self.model, train.weights, train.optimizer.states, accumulation=train.accumulation)
        return find_layouts(self.shape, cluster, search, sizes, check=functools.partial(self.check, cluster.devices))

    def _varied(self, own: Activations) -> tuple[Activations, ...]:
        """What blocks may keep, each as the recipe puts it elsewhere."""
        anew = ANEW if makes_once(self.recipe) else (KEEP_ALL, EVERYTHING_ANEW)
        varied = [each._replace(saved=own.saved, saved_as=own.saved_as) for each in anew]
        return tuple(dict.fromkeys([*varied, own]))

    def choice(self, plan: PlanConfig) -> Choice:
        """This layout, and all else as the recipe has it. What is to be measured yet is reckoned with at its dearest:
        precision as fp32, activations within a budget as all kept, segments as single blocks."""
        train, memory = self.recipe.train, self.recipe.memory
        precision: Chosen = "fp32" if train.precision == "auto" else train.precision
        if train.weights != "fp32":
            precision = "bf16"
        return Choice(
            plan,
            train.accumulation,
            activations=Activations(
                keep=_told_shortly(keep_of(memory, len(self.model.blocks))),
                segment=memory.segments if isinstance(memory.segments, int) else 1,
                saved=memory.saved,
                saved_as=memory.saved_as,
            ),
            offload="disk" if "weights" in memory.offload.on_disk else "none",
            precision=precision,
        )

    def kept(self, plan: PlanConfig, world: int) -> tuple[Keep, ...] | None:
        """What each block is to keep, as the recipe says; where that is a budget, what meets it on every rank. None:
        all.

        Raises:
            ConfigError: nothing meets it.
        """
        choice = self.choice(plan)

        def measured(keep: Sequence[Keep]) -> int:
            return max(each.activations for each in self.rehearsed(choice, world, keep))

        return settled_keep(
            self.recipe.memory,
            self.model,
            self.loss,
            self.batches(WHOLE, 1)[0],
            measured,
            precision=choice.precision or "fp32",
            keeps=KEEPS if makes_once(self.recipe) else ("all", "nothing"),
        )

    def segments(self) -> SegmentChoice:
        """How many blocks make a segment, measured on a batch of the recipe's size."""
        return choose_segments(
            self.model, self.loss, self.batches(WHOLE, 1)[0], precision=self.choice(PlanConfig()).precision or "fp32"
        )

    def check(self, world: int, choice: Choice) -> None:
        """
        Raises:
            ConfigError: so many ranks cannot train this recipe so.
        """
        train = self.recipe.train.model_copy(update={"accumulation": choice.micro_batches})
        memory = self.recipe.memory.model_copy(update=_memory_of(choice.activations))
        check_layout(self.recipe.model_copy(update={"train": train, "memory": memory}), choice.plan, world)
        check_model(self.model, choice.plan, self.recipe.memory.offload)
        if choice.offload == "disk":
            check_model(self.model, choice.plan, OffloadConfig.model_validate("disk"))

    def check_memory(
        self, world: int, plan: PlanConfig, per_node: int | None = None, *, keep: Sequence[Keep] | None = None
    ) -> None:
        """Where blocks `keep` so much; None: as the recipe says.

        Raises:
            ConfigError: a rank would hold more than it has of this machine's free memory; the message says what fits.
        """
        cluster = this_machine(world, per_node)
        room = MEMORY_SHARE * cluster.memory_bytes
        if self.recipe.memory.offload.on_disk:
            check_state(self.model, self.recipe.memory.offload, ranks=per_node or world)
            return  # a rehearsal would hold all that is to lie on the disk
        held = max(self.rehearsed(self.choice(plan), world, keep), key=lambda each: each.peak)
        if held.peak <= room:
            return
        try:
            fits = describe(self.search(cluster, most=1).predictions[0].choice)
            instead = f"Use {fits}, which is predicted to fit, or smaller batches."
        except ConfigError:
            instead = "No layout of them fits: use more devices, or smaller batches."
        raise ConfigError(
            f"a rank of this layout holds {bytes_as_text(held.peak)} ({bytes_as_text(held.weights)} of weights), and "
            f"each of the {per_node or world} ranks here may have {bytes_as_text(room)}. {instead}"
        )

    def rehearsed(self, choice: Choice, world: int, keep: Sequence[Keep] | None = None) -> tuple[StepBytes, ...]:
        """By rank of the pipeline, what its last holds, that has most of the records; None: blocks keep what the choice
        or the recipe says."""
        how = choice.activations
        if keep is None and how.makes_anew:
            keep = how.keeps(len(self.model.blocks))
        count, places = choice.micro_batches, choice.plan.pipeline
        size = None if count == self.recipe.train.accumulation else self.records // count
        what = Rehearsal(
            build=lambda: build_model(self.recipe, self.preparation),
            batches=lambda share: self.batches(share, count, size),
            loss=self.loss,
            optimizer=self.recipe.train.optimizer.build,
            precision=choice.precision or "fp32",
            keep=keep,
            weights=self.recipe.train.weights,
        )
        last = [(place + 1) * world // places - 1 for place in range(places)]
        return tuple(rehearse(what, choice.plan, world, rank) for rank in last)


def read_varied(names: Collection[str]) -> tuple[Varied, ...]:
    """What is to vary, from what was typed.

    Raises:
        ConfigError: no such thing does.
    """
    known = get_args(Varied)
    for name in names:
        if name not in (*known, "all"):
            raise ConfigError(f"{name!r} cannot vary. Use some of {', '.join(known)}, or all.")
    return tuple(each for each in known if each in names or "all" in names)


def read_cluster(name: str, devices: int, memory_bytes: float | None = None) -> ClusterConfig:
    """A cluster by the kind of its devices, or from a YAML file.

    Raises:
        ConfigError: there is no such kind or file, or a setting is wrong.
    """
    if name in KNOWN:
        values = KNOWN[name].model_dump()
    elif name.endswith((".yaml", ".yml")):
        if not Path(name).is_file():
            raise ConfigError(f"{name} does not exist. Use one of {', '.join(KNOWN)}, or a file that does.")
        values = from_yaml(Path(name).read_text(encoding="utf-8"), where=name)
    else:
        raise ConfigError(
            f"{name!r} is no kind of device. Use one of {', '.join(KNOWN)}, or a file that ends in .yaml."
        )
    values["devices"] = devices
    if memory_bytes is not None:
        values["memory_bytes"] = memory_bytes
    return parse(ClusterConfig, values, where=f"cluster {name}")


def _as_json(found: Prediction, recipe: LaidOut | None) -> dict[str, Any]:
    return {
        "layout": describe(found.choice),
        "plan": found.choice.plan.model_dump(mode="json"),
        "settings": None if recipe is None else _settings(found, recipe),
        "micro_batches": found.choice.micro_batches,
        "precision": found.choice.precision,
        "activations": found.choice.activations._asdict(),
        "offload": found.choice.offload,
        "can_be_carried_out": found.can_be_carried_out,
        "host_bytes": found.host_bytes,
        "disk_bytes": found.disk_bytes,
        "seconds": found.seconds,
        "records_per_second": found.records_per_second,
        "work_seconds": found.work_seconds,
        "tensor_seconds": found.tensor_seconds,
        "waiting_ratio": found.waiting_ratio,
        "data_seconds": found.data_seconds,
        "optimizer_seconds": found.optimizer_seconds,
        "memory_bytes": list(found.memory_bytes),
        "state_bytes": list(found.state_bytes),
    }


def _settings(found: Prediction, recipe: LaidOut) -> list[str]:
    """What must be set, beside what is so by default, or by the recipe."""
    choice = found.choice
    values = choice.plan.model_dump(mode="json")
    told = [f"plan.{key}={value}" for key, value in values.items() if value != PlanConfig.model_fields[key].default]
    if choice.micro_batches != recipe.train.accumulation:
        records = round(found.records_per_second * found.seconds)
        told.append(f"train.accumulation={choice.micro_batches}")
        told.append(f"data.loader.batch_size={records // choice.micro_batches}")
    if choice.precision not in (recipe.train.precision, None) and (
        choice.precision == "bf16" or recipe.train.precision != "auto"
    ):
        told.append(f"train.precision={choice.precision}")
    if choice.offload == "disk" and "weights" not in recipe.memory.offload.on_disk:
        told.append("memory.offload=disk")
    wanted, settings = choice.activations, recipe.memory
    if isinstance(wanted.keep, str) and wanted.keep != _all_alike(settings):
        told.append(f"memory.recompute={_RECOMPUTE[wanted.keep]}")
    return told


_RECOMPUTE: Final[dict[Keep, str]] = {"all": "none", "products": "cheap", "nothing": "blocks"}


def _memory_of(activations: Activations) -> dict[str, Any]:
    """The settings by which blocks keep so much."""
    if isinstance(activations.keep, str):
        return {"recompute": _RECOMPUTE[activations.keep], "every": 1, "keep": None, "activations": None}
    return {"recompute": "none", "every": 1, "keep": activations.keep, "activations": None}


def _told_shortly(keep: tuple[Keep, ...] | None) -> Keep | tuple[Keep, ...]:
    if keep is None:
        return "all"
    return keep[0] if len(set(keep)) == 1 else keep


def _all_alike(memory: MemoryConfig) -> Keep | None:
    """What all blocks keep by the recipe; None: not all the same, or a budget says."""
    if memory.keep is not None or memory.activations is not None or memory.every != 1:
        return None
    return next(keep for keep, name in _RECOMPUTE.items() if name == memory.recompute)
