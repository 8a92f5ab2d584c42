"""Holds distil.py to its promises."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from dougong.bundle.model import Model
from dougong.compress.distil import DistilConfig, Lessons, Teacher, agreement, distil, judge_on, shown_to
from dougong.compress.importance import ImportanceConfig, measure_importance
from dougong.compress.records import Records, split_records, without_target
from dougong.compress.run import _interval
from dougong.compress.structure import structure_of
from dougong.compress.student import Shape, StudentConfig, build_student, inherit, shape_of
from dougong.compress.workshop import model_of
from dougong.core.config import parse
from dougong.core.errors import ConfigError
from dougong.core.events import Event, StepDone
from dougong.core.signature import Signature
from dougong.data.collate import View
from dougong.data.table import Table, open_table, table_of_rows
from dougong.engine.trainer import TrainConfig
from dougong.model.sandwich import Sandwich
from dougong.nn.batch import Batch

Build = Callable[..., Sandwich]


def student_of(teacher: Sandwich, signature: Signature, batch: Batch, config: StudentConfig) -> Sandwich:
    structure = structure_of(teacher)
    importance = measure_importance(
        teacher, structure, [batch], signature.target, ImportanceConfig(criterion="magnitude")
    )
    shape = shape_of(config, structure, importance)
    student, _ = build_student(teacher, signature, shape)
    inherit(teacher, student, shape, importance)
    return student


@pytest.mark.parametrize(
    "kind",
    ["cross", pytest.param("merged", marks=pytest.mark.slow), pytest.param("bottleneck", marks=pytest.mark.slow)],
)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(
    build: Build, batch: Batch, signature: Signature, kind: str
) -> None:
    teacher = build(bridge={"kind": kind, "num_blocks": 2}, own_heads="taught")
    student = student_of(teacher, signature, batch, StudentConfig()).train()
    config = DistilConfig(label_weight=0.0, relation_weight=1.0, attention_weight=1.0, gate_weight=1.0)
    lessons = Lessons(student, Teacher(teacher, teacher.names), (), config, "single_label")

    with lessons.listening():
        loss = lessons(student(batch), batch)
        loss.backward()  # type: ignore[no-untyped-call]

    assert lessons.left_out == []
    assert loss.item() == pytest.approx(0.0, abs=1e-4)
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-3 for p in student.parameters())


@pytest.mark.parametrize(
    "weight",
    [
        "relation_weight",
        "attention_weight",
        *(pytest.param(f"{name}_weight", marks=pytest.mark.slow) for name in ("answer", "gate", "own")),
    ],
)
def test_each_lesson_brings_any_shape_nearer_to_its_teacher(
    build: Build, batch: Batch, signature: Signature, weight: str
) -> None:
    teacher = build(own_heads="taught")
    config = StudentConfig(width=0.5, layers=0.5, blocks=0.5, pool={"image": 2})
    student = student_of(teacher, signature, batch, config).train()
    # Something must be learnt besides; of the labels next to nothing.
    weights = dict.fromkeys(("relation_weight", "attention_weight", "gate_weight", "own_weight"), 0.0)
    settings = weights | {"answer_weight": 0.0, "label_weight": 1e-9, weight: 1.0}
    lessons = Lessons(
        student, Teacher(teacher, teacher.names), (), parse(DistilConfig, settings, where="distil"), "single_label"
    )
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-3)
    losses = []
    with lessons.listening():
        for _ in range(6):
            loss = lessons(student(batch), batch)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())

    assert losses[0] > 1e-4
    assert losses[-1] < 0.85 * losses[0]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(module._forward_hooks for module in (*student.modules(), *teacher.modules()))


def test_a_teacher_sees_what_is_hidden_from_the_student(build: Build, batch: Batch) -> None:
    teacher = build()
    there_B = batch.media["text"].present_B
    hidden = batch.media["text"]._replace(present_B=torch.zeros(4, dtype=torch.bool), there_B=there_B)
    seen = shown_to(Teacher(teacher, teacher.names), Batch(batch.media | {"text": hidden}, batch.target))

    assert torch.equal(teacher(seen).output_BC, teacher(batch).output_BC)
    alone = shown_to(Teacher(teacher, ("image",)), batch)
    assert not alone.media["text"].present_B.any()
    assert torch.equal(alone.media["image"].present_B, batch.media["image"].present_B)


# On records ---------------------------------------------------------------------------------------------------


def halved(colours: Model, modalities: tuple[str, ...] | None = None) -> Model:
    structure = structure_of(colours.network)
    importance = measure_importance(
        colours.network, structure, [], colours.preparation.target, ImportanceConfig(criterion="magnitude")
    )
    config = StudentConfig(width=0.5, modalities=modalities)
    shape = shape_of(config, structure, importance)
    network, _ = build_student(colours.network, colours.manifest.signature, shape)
    inherit(colours.network, network, shape, importance)
    return model_of(network, colours)


def few(colour_table: Path, start: int = 0, count: int = 120) -> Table:
    return table_of_rows(pq.read_table(colour_table).slice(start, count), colour_table.parent)


def settings(steps: int, **more: object) -> DistilConfig:
    train = TrainConfig(steps=steps, precision="fp32", checkpoint_every=5, checkpoint_seconds=None)
    return parse(
        DistilConfig,
        {"train": train.model_dump(), "loader": {"batch_size": 32, "workers": 0}, **more},
        where="distil",
    )


def test_records_without_answers_are_enough(colours: Model, colour_table: Path, tmp_path: Path) -> None:
    target = colours.preparation.target.name
    learn, choose = (without_target(few(colour_table, start), target) for start in (0, 120))
    student = halved(colours)
    told = judge_on(colours.network, choose, colours.preparation)
    before = agreement(judge_on(student.network, choose, student.preparation), told)

    distil(student.network, student.preparation, colours, learn, choose, settings(30), tmp_path / "run")

    after = judge_on(student.network, choose, student.preparation)
    assert after.target_B is None
    assert before < 0.9 < agreement(after, told)
    with pytest.raises(ConfigError, match="answer_weight is 0, and .* has no column 'colour'"):
        distil(
            student.network,
            student.preparation,
            colours,
            learn,
            choose,
            settings(1, answer_weight=0.0),
            tmp_path / "other",
        )


def test_what_a_training_needed_is_let_go_of_at_its_end(colours: Model, colour_table: Path, tmp_path: Path) -> None:
    student, learn, choose = halved(colours), few(colour_table), few(colour_table, 120)
    made: list[weakref.ref[torch.optim.Optimizer]] = []
    gc.disable()
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: made.append(weakref.ref(optimizer)))
    try:
        distil(student.network, student.preparation, colours, learn, choose, settings(3), tmp_path / "run")
        still = [each() for each in made]
    finally:
        handle.remove()
        gc.enable()

    assert made
    assert still == [None] * len(made)


@pytest.mark.slow
def test_a_student_of_fewer_modalities_learns_from_a_teacher_of_all(
    colours: Model, colour_table: Path, tmp_path: Path
) -> None:
    names = tuple(colours.preparation.modalities)
    student = halved(colours, modalities=("remark", "table"))
    views = [View(keep=("remark", "table"), beside=names).model_dump()]
    distil(
        student.network,
        student.preparation,
        colours,
        few(colour_table),
        few(colour_table, 120),
        settings(25, views=views),
        tmp_path / "run",
    )

    student.save(tmp_path / "bundle")
    assert tuple(student.manifest.signature.inputs) == ("remark", "table")
    answers = student.predict([{"remark": "it is cold like the sea"}, {"remark": "it is warm like fire"}])
    assert [answer.answer for answer in answers] == ["blue", "red"]


@pytest.mark.slow
def test_a_modality_may_have_a_teacher_of_its_own(colours: Model, colour_table: Path, tmp_path: Path) -> None:
    """Here the same one: the student's answer to pictures alone then comes nearer to its."""
    only = {"photo": halved(colours, modalities=("photo",))}
    student = halved(colours)
    result = distil(
        student.network,
        student.preparation,
        colours,
        few(colour_table),
        few(colour_table, 120),
        settings(3),
        tmp_path / "run",
        beside=only,
    )
    assert result.step == 3
    with pytest.raises(ConfigError, match="the teacher of 'clip' reads it otherwise"):
        distil(
            student.network,
            student.preparation,
            colours,
            few(colour_table),
            few(colour_table, 120),
            settings(3),
            tmp_path / "other",
            beside={"clip": only["photo"]},
        )


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_losses(colours: Model, colour_table: Path, tmp_path: Path) -> None:
    learn, choose = few(colour_table), few(colour_table, 120)

    def run(folder: Path, *, kill_at: int | None = None, resume: bool = False) -> list[float]:
        losses: list[float] = []

        def listen(event: Event) -> None:
            if isinstance(event, StepDone):
                losses.append(event.loss)
                if event.step == kill_at:
                    raise Killed

        student = halved(colours)
        distil(
            student.network,
            student.preparation,
            colours,
            learn,
            choose,
            settings(12, withhold=0.2),
            folder,
            listeners=[listen],
            resume=resume,
        )
        return losses

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill_at=8)
    assert run(tmp_path / "killed", resume=True) == whole[5:]


def test_answers_are_held_against_each_other_by_record(colours: Model, colour_table: Path) -> None:
    """Who is shown fewer media finds fewer records with one that cannot be read."""
    told = judge_on(colours.network, open_table(colour_table), colours.preparation)
    some = slice(3, None)
    fewer = dataclasses.replace(
        told, row_B=told.row_B[some], prediction_B=told.prediction_B[some], num_records=told.num_records - 3
    )

    assert agreement(fewer, told) == agreement(told, fewer) == 1.0
    assert _interval(told, fewer)["low"] == 0.0


def test_a_column_of_empty_answers_is_none(colours: Model, colour_table: Path) -> None:
    rows = open_table(colour_table).head(240, open_table(colour_table).schema.names)
    place = rows.schema.get_field_index("colour")

    def split(column: list[str | None]) -> Records:
        table = table_of_rows(rows.set_column(place, "colour", pa.array(column, pa.string())), colour_table.parent)
        return split_records(table, colours.preparation, share=0.2, unit=None, judge=None, seed=0)

    assert not split([None] * rows.num_rows).labelled
    some = split([None] * 100 + rows.column("colour").to_pylist()[100:])
    assert some.labelled
    assert any("is not known of" in note and "left out" in note for note in some.notes)


def test_a_search_knows_its_records_by_more_than_their_number(colours: Model, colour_table: Path) -> None:
    rows = open_table(colour_table).head(240, open_table(colour_table).schema.names)

    def identity(rows: pa.Table) -> list[str]:
        table = table_of_rows(rows, colour_table.parent)
        return split_records(table, colours.preparation, share=0.2, unit="maker", judge=None, seed=0).identity("colour")

    turned = rows.column("colour").to_pylist()[::-1]
    other = rows.set_column(rows.schema.get_field_index("colour"), "colour", pa.array(turned))
    assert identity(rows) == identity(rows)
    assert identity(rows) != identity(other)


def test_parts_of_a_table_share_no_medium(colours: Model, colour_table: Path) -> None:
    table = open_table(colour_table)
    found = split_records(table, colours.preparation, share=0.2, unit="maker", judge=None, seed=0)
    parts = (found.learn, found.choose, found.judge)
    makers = [set(part.column("maker").to_pylist()) - {None} for part in parts]  # whom nobody knows, they do not share
    assert not makers[0] & makers[1]
    assert not makers[0] & makers[2]
    assert not makers[1] & makers[2]
    assert sum(part.num_rows for part in parts) == table.num_rows
    with pytest.raises(ConfigError, match="--unit 'patient' is no column. Use one of photo, clip"):
        split_records(table, colours.preparation, share=0.1, unit="patient", judge=None, seed=0)


def test_copies_far_down_a_table_are_in_one_part_and_a_judge_that_was_learnt_from_is_told(
    colours: Model, colour_table: Path
) -> None:
    rows = open_table(colour_table).head(240, open_table(colour_table).schema.names).to_pylist()
    again = [{**row, "photo": row["photo"] and {**row["photo"], "path": "again.png"}, "clip": None} for row in rows]
    table = table_of_rows(pa.Table.from_pylist([*rows, *again]), colour_table.parent)

    found = split_records(table, colours.preparation, share=0.2, unit=None, judge=None, seed=0)
    photos = [
        {cell["bytes"] for cell in part.column("photo").to_pylist() if cell is not None}
        for part in (found.learn, found.choose, found.judge)
    ]
    assert found.unit == "photo"
    assert sum(map(len, photos)) == len(set().union(*photos))
    judge = table_of_rows(pa.Table.from_pylist(rows[:40]), colour_table.parent)
    told = split_records(table, colours.preparation, share=0.2, unit=None, judge=judge, seed=0).notes
    assert any("image media of 'photo' are in what is learnt from and in what judges" in note for note in told)


def test_what_cannot_be_held_together_is_told_of_either_split(colours: Model, colour_table: Path) -> None:
    # Every picture in two records and every recording in two, so that they hang together as one chain.
    rows = open_table(colour_table).head(240, open_table(colour_table).schema.names).to_pylist()
    whole = [row for row in rows if row["photo"] and row["clip"]]
    order = np.random.default_rng(0).permutation(2 * len(whole))
    chained = [{**row, "clip": whole[place // 2]["clip"]} for row, place in zip([*whole, *whole], order, strict=True)]
    table = table_of_rows(pa.Table.from_pylist(chained), colour_table.parent)

    found = split_records(table, colours.preparation, share=0.2, unit=None, judge=None, seed=0)

    clips = [{cell["bytes"] for cell in part.column("clip").to_pylist()} for part in (found.learn, found.judge)]
    assert clips[0] & clips[1]
    assert sum(note.startswith("clip: what several records share may be on both sides") for note in found.notes) == 1


def test_settings_that_teach_nothing_are_refused() -> None:
    for values, message in (
        ({"answer_weight": 0.0, "label_weight": 0.0}, "answer_weight and label_weight are both 0"),
        ({"temperature": 0.0}, "0.0 must be above 0: it divides the scores"),
        ({"gate_weight": -1.0}, "-1.0 must not be below 0"),
        ({"withhold": 0.1, "views": [{"keep": ["photo"]}]}, "views and withhold both say what is left out"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse(DistilConfig, values, where="distil")
    assert Shape().units == {}
