"""One rank of a tiny run, as a process of its own; started by parallel/test_supervise.py.

`as_rank.py FOLDER FAULTS` goes on with the run in FOLDER. FAULTS are [rank, step, kind] as JSON, each of which happens
once: in that step the rank is killed, hangs in the middle of a block, or makes a mistake.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # tiny_run

import torch
from tiny_run import TinyLoader, TinyModel, tiny_loss
from torch import nn

from dougong.core.errors import DataError, DougongError, RankError
from dougong.data.batch import BatchArrays
from dougong.data.position import Share
from dougong.engine.parallel.ranks import Ranks, connected_ranks
from dougong.engine.trainer import TrainConfig, train

LIMIT_SECONDS = 4.0


class Parted(TinyModel):
    """Its block is of the modality x."""

    def parts(self) -> dict[str, list[nn.Parameter]]:
        return {"x": list(self.blocks.parameters())}


class Shared(TinyLoader):
    """A share of TinyLoader's batches."""

    def __init__(self, share: Share) -> None:
        super().__init__(40, 8)
        self.share = share

    def collate(self, order: Any, number: int) -> BatchArrays:
        rows = order[number * self.batch_size :][: self.batch_size]
        return TinyLoader.collate(TinyLoader(len(self.x_ND), len(rows)), rows[self.share.of(len(rows))], 0)


def run(folder: Path, ranks: Ranks, faults: list[Any]) -> None:
    model = Parted(norm=False)
    into = model.blocks[0].forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        for rank, step, kind in faults:
            done = folder / f"{kind}-{step}"
            if rank == ranks.rank and _step(ranks) == step and not done.exists():
                done.touch()
                if kind == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if kind == "mistake":
                    raise DataError("a mistake of one rank")
                time.sleep(600)
        found: torch.Tensor = into(x)
        return found

    model.blocks[0].forward = forward
    config = TrainConfig(steps=12, precision="fp32", checkpoint_every=4)
    train(model, tiny_loss, Shared(ranks.share), config, folder=folder, ranks=ranks, resume=True)


def _step(ranks: Ranks) -> int:
    assert ranks.heartbeat is not None
    return ranks.heartbeat.step


def main() -> int:
    os.fsync = lambda handle: None
    torch.set_num_threads(1)
    folder, faults = Path(sys.argv[1]), json.loads(sys.argv[2])
    rank = os.environ["RANK"]
    try:
        with connected_ranks(notes=folder / "ranks", limit_seconds=LIMIT_SECONDS) as ranks:
            run(folder, ranks, faults)
    except DougongError as error:
        print(f"dougong (rank {rank}): {error}", file=sys.stderr)
        return 3 if isinstance(error, RankError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
