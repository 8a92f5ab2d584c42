import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from dougong.core.errors import RunError
from dougong.core.signature import Signature, TableInput, Target, TextInput
from dougong.engine.parallel.heartbeat import (
    PATIENCE,
    Heartbeat,
    Sign,
    Watcher,
    following,
    lost_rank,
    modalities_of_blocks,
    read_sign,
    watched,
)
from dougong.engine.parallel.replicate import add_up
from dougong.model.sandwich import SandwichConfig

LIMIT = 0.05


def sign(folder: Path, rank: int = 0) -> Sign:
    found = read_sign(folder, rank)
    assert found is not None
    return found


def test_what_a_rank_notes_can_be_read_at_any_time_and_nothing_is_left_of_it(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path / "ranks", 2)
    assert sign(tmp_path / "ranks", 2).doing == "before its first step, starting"
    heartbeat.mark("reading", 7)
    heartbeat.modality("Bild\u00e4" * 40)
    found = sign(tmp_path / "ranks", 2)
    assert (found.pid, found.step, found.phase, found.state) == (os.getpid(), 7, "reading", "running")
    assert found.modality.startswith("Bild\u00e4Bild")
    heartbeat.mark("saving")
    assert sign(tmp_path / "ranks", 2).doing == "in step 7, saving"
    heartbeat.fail("x" * 5000)
    assert sign(tmp_path / "ranks", 2).said == "x" * 2048
    heartbeat.close()
    assert not (tmp_path / "ranks").exists()
    assert read_sign(tmp_path / "ranks", 2) is None
    (tmp_path / "rank-0").write_text("something else")
    assert read_sign(tmp_path, 0) is None
    with pytest.raises(RunError, match="cannot be written .*Name another folder by --out"):
        Heartbeat(tmp_path / "rank-0", 0)


def in_this_thread(heartbeat: Heartbeat, *, waits: bool) -> None:
    """Note that it stands in an exchange, or does not."""
    heartbeat.look(threading.get_ident() if waits else -1)


def test_the_rank_that_does_nothing_is_named_and_not_those_that_wait_for_it(tmp_path: Path) -> None:
    heartbeats = [Heartbeat(tmp_path, rank) for rank in range(3)]
    watcher = Watcher(tmp_path, 3, LIMIT)
    for heartbeat in heartbeats:
        heartbeat.mark("working", 5)
    heartbeats[1].mark("reading", 6)
    heartbeats[1].modality("photo")
    for rank, heartbeat in enumerate(heartbeats):
        in_this_thread(heartbeat, waits=rank != 1)
    assert watcher.look() is None
    time.sleep(2 * LIMIT)
    for rank, heartbeat in enumerate(heartbeats):
        in_this_thread(heartbeat, waits=rank != 1)
    found = watcher.look()
    assert found is not None
    assert found.rank == 1
    assert found.message.startswith("rank 1 of 3 has shown no sign of life for 0 seconds in step 6, reading photo")

    heartbeats[1].modality("photo")  # the next one
    assert watcher.look() is None


def test_a_process_that_does_not_even_look_is_named_though_it_stood_in_an_exchange(tmp_path: Path) -> None:
    heartbeats = [Heartbeat(tmp_path, rank) for rank in range(2)]
    for heartbeat in heartbeats:
        heartbeat.mark("working", 5)
        in_this_thread(heartbeat, waits=True)
    watcher = Watcher(tmp_path, 2, LIMIT)
    watcher.look()
    time.sleep(2 * LIMIT)
    in_this_thread(heartbeats[0], waits=True)
    found = watcher.look()
    assert found is not None
    assert found.rank == 1


def test_one_that_looks_for_the_rank_that_was_lost_waits_while_files_keep_it(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 0)
    os.mkfifo(tmp_path / "rank-1")  # whoever opens it is kept until there is a writer
    looking = threading.Thread(target=lost_rank, args=(tmp_path, 2, 0), daemon=True)
    looking.start()
    until = time.monotonic() + 30
    thread = looking.ident
    assert thread is not None
    while "lost_rank" not in sign(tmp_path).where and "read_sign" not in sign(tmp_path).where:
        assert time.monotonic() < until
        heartbeat.look(thread)
    time.sleep(LIMIT)
    heartbeat.look(thread)

    found = sign(tmp_path)
    os.close(os.open(tmp_path / "rank-1", os.O_WRONLY))
    (tmp_path / "rank-1").unlink()
    looking.join(timeout=30)

    assert found.waits
    assert found.where.startswith("parallel/heartbeat.py:")
    assert not looking.is_alive()


def test_where_all_wait_the_one_that_is_least_far_is_named(tmp_path: Path) -> None:
    heartbeats = [Heartbeat(tmp_path, rank) for rank in range(2)]
    for step, heartbeat in zip((6, 5), heartbeats, strict=True):
        heartbeat.mark("working", step)
        in_this_thread(heartbeat, waits=True)
    watchers = Watcher(tmp_path, 2, LIMIT), Watcher(tmp_path, 3, LIMIT)
    for watcher in watchers:
        assert watcher.look() is None
    time.sleep(2 * LIMIT)
    for heartbeat in heartbeats:
        in_this_thread(heartbeat, waits=True)
    all_wait, one_lacks = (watcher.look() for watcher in watchers)
    assert all_wait is not None
    assert one_lacks is not None
    assert all_wait.rank == 1
    assert "all ranks have waited for each other" in all_wait.message
    assert one_lacks.message == "rank 2 of 3 has not begun, and the others wait for it"


def test_before_the_first_step_and_after_the_last_there_is_more_time(tmp_path: Path) -> None:
    heartbeat = Heartbeat(tmp_path, 0)
    in_this_thread(heartbeat, waits=False)
    watcher = Watcher(tmp_path, 1, LIMIT)
    watcher.look()
    time.sleep(2 * LIMIT)
    assert watcher.look() is None
    time.sleep(PATIENCE * LIMIT)
    found = watcher.look()
    assert found is not None
    assert "before its first step, starting" in found.message


def test_a_rank_that_is_gone_or_has_failed_is_found(tmp_path: Path) -> None:
    keep = Heartbeat(tmp_path, 0)
    child = "import sys; from pathlib import Path; from dougong.engine.parallel.heartbeat import Heartbeat\n"
    child += "Heartbeat(Path(sys.argv[1]), 1).mark('working', 4)"
    subprocess.run([sys.executable, "-c", child, str(tmp_path)], check=True)
    found = lost_rank(tmp_path, 3, 0)
    assert found is not None
    assert found == (1, "rank 1 of 3 was killed, or ended by itself, in step 4, working")
    other = Heartbeat(tmp_path, 2)
    other.mark("working", 4)
    other.fail("ValueError: 3")
    found = lost_rank(tmp_path, 3, 0)
    assert found is not None
    assert found.message == "rank 2 of 3 failed in step 4, working: ValueError: 3"
    other.fail("rank 1 is gone", lost=True)  # which only says what is known
    found = lost_rank(tmp_path, 3, 0)
    assert found is not None
    assert found.rank == 1
    assert lost_rank(tmp_path, 1, 0) is None
    keep.close()


def waiting(folder: Path) -> list[list[bool]]:
    """Whether each rank was seen to wait while the second slept: in a plain exchange, and in one that is under way
    already, for which torch has no frame of its own."""
    rank, world = dist.get_rank(), dist.group.WORLD
    assert world is not None
    exchanges = [lambda: dist.all_reduce(torch.ones(1)), lambda: add_up([torch.ones(3)], world)]
    seen = []
    with watched(Heartbeat(folder, rank), lambda: None, 0.02, print):
        dist.barrier()
        for exchange in exchanges:
            if rank == 1:
                time.sleep(0.4)
                seen.append([sign(folder, each).waits for each in range(2)])
            exchange()
    return seen


def test_who_waits_in_an_exchange_is_seen_from_where_it_stands(tmp_path: Path) -> None:
    assert run_ranks(waiting, tmp_path, world=2)[1] == [[True, False], [True, False]]


def test_a_model_s_blocks_are_known_by_their_modality(tmp_path: Path) -> None:
    signature = Signature(
        inputs={
            "remark": TextInput(vocabulary_size=9, max_tokens=4),
            "table": TableInput(num_numbers=1, category_sizes=()),
        },
        target=Target(name="kind", task="single_label", labels=("a", "b")),
    )
    model = SandwichConfig(width=16).build(signature)
    names = modalities_of_blocks(model)
    assert set(names) == {"remark", "table", ""}
    assert names[-1] == ""

    heartbeat = Heartbeat(tmp_path, 0)
    with following(model, heartbeat):
        for block, name in zip(model.blocks, names, strict=True):
            block.forward = lambda state: state
            block(None)
            assert sign(tmp_path).modality == name
    assert not any(block._forward_pre_hooks for block in model.blocks)
