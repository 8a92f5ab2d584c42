import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from task_builders import Rows, quick, stripes, table_of, tones

import dougong
from dougong.continual.elastic import Elastic
from dougong.continual.learn import learn
from dougong.continual.tasks import (
    add_part,
    export_task,
    import_task,
    merge_tasks,
    read_parts,
    remove_task,
    tasks_in,
)
from dougong.continual.taught import open_taught
from dougong.core.bundle import read_bundle
from dougong.core.errors import BundleError, ConfigError, DataError, RunError
from dougong.core.events import CheckpointSaved, Event

Records = Callable[..., list[dict[str, Any]]]


def sums(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_what_the_bundle_could_stays_as_it_was(base: Path, taught: Path, records: Records) -> None:
    rows = records(40, seed=9, missing=0.2)
    before, after = sums(base), sums(taught)

    assert {name: after[name] for name in before if name != "bundle.json"} == {
        name: value for name, value in before.items() if name != "bundle.json"
    }
    assert dougong.load(taught).predict(rows) == dougong.load(base).predict(rows)
    told = open_taught(taught).predict(rows, "original")
    assert [answer.probabilities for answer in told] == [a.probabilities for a in dougong.load(base).predict(rows)]


def test_what_judges_a_task_has_no_picture_of_what_was_learnt(base: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(base, bundle)
    rows = [{**row, "asked": f"question {number}"} for row in stripes(60, seed=3) for number in range(3)]

    learnt = learn(bundle, "stripes", table_of(rows), quick(), target="lies", columns={"photo": "picture"})

    assert learnt.task.provenance["held out"].endswith("records, by picture")
    assert learnt.evaluation.num_records % 3 == 0
    assert 6 < learnt.evaluation.num_records < 75
    few = learn(bundle, "few", table_of([*rows[:9], *rows[-3:]]), quick(), target="lies", columns={"photo": "picture"})
    assert few.evaluation.num_records == 3  # of four pictures one
    same = table_of([{**row, "picture": rows[0]["picture"]} for row in rows])
    with pytest.raises(DataError, match=r"all of its 180 records hang together\. Give more records, of others too"):
        learn(bundle, "one", same, quick(), target="lies", columns={"photo": "picture"})


@pytest.mark.parametrize(("name", "make", "label"), [("stripes", stripes, "lies"), ("tones", tones, "pitch")])
def test_a_task_is_learnt_in_few_numbers(taught: Path, name: str, make: Callable[..., Rows], label: str) -> None:
    found = open_taught(taught)
    rows = make(60, seed=11)

    answers = found.predict(rows, name)

    assert sum(a.answer == row[label] for a, row in zip(answers, rows, strict=True)) >= 54
    task = found.task(name)
    assert task.of_base <= 0.1
    assert task.num_parameters == sum(p.numel() for p in found.elastic.part(task.key).parameters())
    assert sum(path.stat().st_size for path in (taught / "tasks" / name).rglob("*.*")) < 600_000


def test_a_batch_of_many_tasks_answers_as_batches_of_one(taught: Path, mixed: tuple[Rows, list[str]]) -> None:
    found = open_taught(taught)
    rows, names = mixed

    together = found.predict(rows, names)

    for name in set(names):
        places = [place for place, each in enumerate(names) if each == name]
        alone = found.predict([rows[place] for place in places], name)
        for place, answer in zip(places, alone, strict=True):
            assert together[place].answer == answer.answer
            for label, chance in answer.probabilities.items():
                assert together[place].probabilities[label] == pytest.approx(chance, abs=2e-6)


def test_the_task_of_a_record_is_found(taught: Path, mixed: tuple[Rows, list[str]]) -> None:
    rows, names = mixed

    answers = open_taught(taught).predict(rows)

    assert sum(answer.task == name for answer, name in zip(answers, names, strict=True)) >= 57
    assert all(answer.task_confidence is not None for answer in answers)


def test_a_record_of_none_of_the_tasks_has_no_answer(taught: Path) -> None:
    random = np.random.default_rng(0)
    strange = []
    for _ in range(10):
        content = io.BytesIO()
        Image.fromarray((random.integers(0, 2, (20, 24, 3)) * 255).astype(np.uint8)).save(content, format="PNG")
        strange.append({"picture": {"bytes": content.getvalue(), "path": None}})

    answers = open_taught(taught).predict(strange)

    assert sum(answer.task is None and answer.answer is None for answer in answers) >= 8


def test_traits_of_another_version_are_refused_in_one_line(taught: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dougong.continual.taught.num_features", lambda base: 2 * base.width)
    with pytest.raises(BundleError, match="keeps other traits .*Learn the tasks again"):
        open_taught(taught)


def test_removal_brings_back_what_was(taught: Path, copied: Path, mixed: tuple[Rows, list[str]]) -> None:
    rows, names = mixed
    before = open_taught(copied).predict(rows, names)
    learn(copied, "more", table_of(tones(60, seed=8)), quick(), target="pitch")
    assert {inner.split("/")[1] for inner in tasks_in(read_bundle(copied))} == {"stripes", "tones", "more"}

    remove_task(copied, "more")

    assert open_taught(copied).predict(rows, names) == before
    assert sums(copied) == sums(taught)


def test_new_classes_leave_the_old_ones_as_they_were(copied: Path) -> None:
    old = stripes(30, seed=12)
    before = open_taught(copied).predict(old, "stripes")
    learn(copied, "stripes", table_of(stripes(120, seed=14, ways=("chequered", "diced"))), quick(), target="lies")
    found = open_taught(copied)
    assert [part.task.number for part in found.parts if part.task.name == "stripes"] == [1, 2]

    after = found.predict(old, "stripes")
    same = [a for a, b in zip(after, before, strict=True) if a.probabilities == b.probabilities]
    assert len(same) >= 27  # the others were taken to be of the new classes
    remove_task(copied, "stripes", last_part=True)
    assert open_taught(copied).predict(old, "stripes") == before


def test_a_new_modality_of_an_old_task_changes_nothing_for_who_lacks_it(copied: Path) -> None:
    random = np.random.default_rng(0)
    old = stripes(30, seed=15)
    before = open_taught(copied).predict(old, "stripes")

    def with_trace(rows: Rows) -> Rows:
        return [
            {**row, "trace": (random.standard_normal(40) + (3.0 if row["lies"] == "along" else -3.0)).tolist()}
            for row in rows
        ]

    learnt = learn(copied, "stripes", table_of(with_trace(stripes(80, seed=16))), quick(), target="lies")
    assert set(learnt.task.extras) == {"stripes.trace"}

    found = open_taught(copied)
    assert found.predict(old, "stripes") == before
    more = with_trace(stripes(30, seed=17))
    assert sum(a.answer == row["lies"] for a, row in zip(found.predict(more, "stripes"), more, strict=True)) >= 27
    told = found.predict(more, "stripes")
    mute = found.predict([{**row, "trace": None} for row in more], "stripes")
    assert any(a.probabilities != b.probabilities for a, b in zip(told, mute, strict=True))


def test_a_task_goes_alone_and_comes_back(taught: Path, base: Path, tmp_path: Path) -> None:
    rows = tones(20, seed=18)
    size = export_task(taught, "tones", tmp_path / "tones")
    assert size < 300_000
    other = Path(shutil.copytree(base, tmp_path / "other"))

    import_task(other, tmp_path / "tones")

    assert open_taught(other).predict(rows, "tones") == open_taught(taught).predict(rows, "tones")
    with pytest.raises(ConfigError, match="has a task 'tones' already"):
        import_task(other, tmp_path / "tones")
    with pytest.raises(ConfigError, match="is there already"):
        export_task(taught, "tones", tmp_path / "tones")


def test_an_adapter_of_another_base_is_refused(taught: Path, tmp_path: Path) -> None:
    export_task(taught, "tones", tmp_path / "tones")
    about = tmp_path / "tones" / "1" / "task.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "base": "0" * 64}))

    with pytest.raises(BundleError, match="another base"):
        import_task(taught, tmp_path / "tones")


def test_merged_with_itself_a_task_is_itself(copied: Path) -> None:
    rows = tones(20, seed=19)
    part = next(part for part in read_parts(copied, read_bundle(copied)) if part.task.name == "tones")
    add_part(copied, part.task.model_copy(update={"name": "again"}), part.weights, part.traits)

    merge_tasks(copied, dougong.load(copied).network, ["tones", "again"], "both")

    found = open_taught(copied)
    for own, merged in zip(found.predict(rows, "tones"), found.predict(rows, "both"), strict=True):
        assert merged.probabilities == pytest.approx(own.probabilities, abs=1e-4)
    with pytest.raises(ConfigError, match="other labels"):
        merge_tasks(copied, dougong.load(copied).network, ["tones", "stripes"], "neither")


def test_a_merged_task_is_found_once_those_it_is_of_are_gone(copied: Path) -> None:
    rows = tones(20, seed=19)
    part = next(part for part in read_parts(copied, read_bundle(copied)) if part.task.name == "tones")
    add_part(copied, part.task.model_copy(update={"name": "again"}), part.weights, part.traits)
    merge_tasks(copied, dougong.load(copied).network, ["tones", "again"], "both")
    assert {answer.task for answer in open_taught(copied).predict(rows)} <= {"tones", "again", None}

    remove_task(copied, "tones")
    remove_task(copied, "again")

    found = open_taught(copied).predict(rows)
    assert sum(answer.task == "both" for answer in found) >= 18
    assert sum(answer.task == "stripes" for answer in open_taught(copied).predict(stripes(20, seed=23))) >= 18


def test_a_kill_at_any_moment_leaves_the_task_whole_or_absent(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = read_parts(copied, read_bundle(copied))[0]
    rename, replace = Path.rename, Path.replace
    outcomes = set()
    for moment in range(12):
        calls = 0

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(path: Path, target: Any, real: Callable[..., Any] = real) -> Any:
                nonlocal calls
                calls += 1
                if calls > moment:  # noqa: B023
                    raise KeyboardInterrupt
                return real(path, target)

            return call

        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", counted(rename))
            patched.setattr(Path, "replace", counted(replace))
            with contextlib.suppress(KeyboardInterrupt):
                add_part(copied, part.task.model_copy(update={"name": "killed"}), part.weights, part.traits)
        manifest = read_bundle(copied)
        there = [inner for inner in tasks_in(manifest) if inner.split("/")[1] == "killed"]
        outcomes.add(len(there))
        assert len(read_parts(copied, manifest)) == 2 + len(there)
        if there:
            break
    assert outcomes == {0, 1}


def test_numbers_outside_training_are_the_base_s_own_business(taught: Path) -> None:
    found = open_taught(taught)
    assert isinstance(found.elastic, Elastic)
    trained = {name for name, _ in found.elastic.named_parameters()}
    assert trained
    assert all(name.startswith("parts_by_key") for name in trained)
    assert not any(parameter.requires_grad for parameter in found.base.parameters())


def test_what_cannot_be_learnt_is_said_in_one_line(copied: Path) -> None:
    table = table_of(tones(60, seed=20))
    with pytest.raises(ConfigError, match="budget allows a task"):
        learn(copied, "small", table, quick(budget=1e-4), target="pitch")
    with pytest.raises(ConfigError, match="beyond budget"):
        learn(copied, "small", table, quick(rank=10_000), target="pitch")
    with pytest.raises(DataError, match="'height' is not a column"):
        learn(copied, "small", table, quick(), target="height")
    with pytest.raises(ConfigError, match="is no modality of the base"):
        learn(copied, "small", table, quick(), target="pitch", columns={"smell": "clip"})
    with pytest.raises(DataError, match="has no column that the base reads"):
        learn(copied, "small", table_of([{"n": i, "y": i % 2} for i in range(60)]), quick(), target="y")
    with pytest.raises(ConfigError, match="cannot be used"):
        learn(copied, "../out", table, quick(), target="pitch")
    assert not any("small" in name for name in read_bundle(copied).files)


def test_an_unknown_task_is_named_with_those_that_are_there(taught: Path) -> None:
    found = open_taught(taught)
    with pytest.raises(ConfigError, match="'smells' is no task of this bundle. It has stripes, tones"):
        found.predict(tones(1, seed=1), "smells")
    with pytest.raises(ConfigError, match="1 tasks are named for more records"):
        found.predict(tones(2, seed=1), ["tones"])


def test_many_tasks_in_one_forward_leave_no_state_behind(taught: Path, mixed: tuple[Rows, list[str]]) -> None:
    found = open_taught(taught)
    rows, names = mixed
    first = found.predict(rows, names)
    found.predict(rows)
    assert found.predict(rows, names) == first
    assert torch.is_grad_enabled()
    assert os.environ.get("DOUGONG_REHEARSAL_KEY") is None


class Stop:
    """Ends learning as a kill would, once so many checkpoints have been written."""

    def __init__(self, checkpoints: int) -> None:
        self.left = checkpoints

    def __call__(self, event: Event) -> None:
        if isinstance(event, CheckpointSaved):
            self.left -= 1
            if self.left < 0:
                raise SystemExit


def test_learning_that_was_stopped_goes_on_to_the_same_part(copied: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(copied, tmp_path / "other" / "bundle"))
    table = table_of(tones(60, seed=21))
    # Checkpoints are written beside the steps, and told of up to one later: enough of them are left after each stop.
    config = quick(train=quick().train.model_copy(update={"steps": 20, "evaluate_every": 10, "checkpoint_every": 2}))
    learn(copied, "more", table, config, target="pitch")

    for checkpoints in (1, 3):
        with pytest.raises(SystemExit):
            learn(other, "more", table, config, target="pitch", resume=True, listeners=[Stop(checkpoints)])
        assert not any(inner.startswith("tasks/more") for inner in tasks_in(read_bundle(other)))
    with pytest.raises(RunError, match="holds learning of 'more' that was stopped"):
        learn(other, "more", table, config, target="pitch")
    learn(other, "more", table, config, target="pitch", resume=True)

    assert sums(other / "tasks" / "more") == sums(copied / "tasks" / "more")
    assert not any((tmp_path / "other").glob(".*.learning/*"))


def test_a_stop_after_the_part_was_added_adds_it_once(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of(tones(60, seed=22))
    config = quick(train=quick().train.model_copy(update={"steps": 4}))

    def then_killed(*given: Any) -> None:
        add_part(*given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("dougong.continual.learn.add_part", then_killed)
        with pytest.raises(KeyboardInterrupt):
            learn(copied, "more", table, config, target="pitch", work=copied.parent / "work")
    before = sums(copied)
    assert "tasks/more/1/task.json" in before

    learnt = learn(copied, "more", table, config, target="pitch", work=copied.parent / "work", resume=True)

    assert learnt.task.key == "more/1"
    assert sums(copied) == before
    with pytest.raises(ConfigError, match="nothing of task 'more' was stopped, and it is there, in 1 part"):
        learn(copied, "more", table, config, target="pitch", work=copied.parent / "work", resume=True)
