import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from dougong.engine.parallel.gather import all_gather_rows

SIZES = {2: [3, 1], 4: [2, 0, 3, 1]}
WIDTH = 3


def rows_of(rank: int, count: int, *, seed: int) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(100 * seed + rank), dtype=torch.float64)


def loss_of(rank: int, a_GD: Tensor, b_G: Tensor) -> Tensor:
    """Each rank makes something else of all rows, by gradients that lie transposed and expanded in memory."""
    weight_DG = rows_of(rank, len(a_GD), seed=7).T
    crossed = (a_GD.T * weight_DG).sum() + (rank + 1) * a_GD.T.square().sum()
    return crossed + (a_GD @ a_GD.T * b_G[:, None]).sum() + b_G.sum()


def gathered(sizes: list[int]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    rank = dist.get_rank()
    a_ND = rows_of(rank, sizes[rank], seed=1).requires_grad_(sizes[rank] > 0)
    b_N = rows_of(rank, sizes[rank], seed=2)[:, 0].clone().requires_grad_(sizes[rank] > 0)
    group = dist.group.WORLD
    assert group is not None
    a_GD, b_G = all_gather_rows([a_ND, b_N], group)
    loss_of(rank, a_GD, b_G).backward()
    return a_GD.detach(), b_G.detach(), a_ND.grad, b_N.grad


@pytest.mark.parametrize("world", [2, 4])
def test_rows_and_gradients_are_those_of_one_process_however_uneven_the_ranks_are(world: int) -> None:
    sizes = SIZES[world]
    a_GD = torch.cat([rows_of(rank, size, seed=1) for rank, size in enumerate(sizes)]).requires_grad_()
    b_G = torch.cat([rows_of(rank, size, seed=2)[:, 0] for rank, size in enumerate(sizes)]).requires_grad_()
    torch.stack([loss_of(rank, a_GD, b_G) for rank in range(world)]).sum().backward()
    assert a_GD.grad is not None
    assert b_G.grad is not None

    found = run_ranks(gathered, sizes, world=world)

    for rank, (a, b, a_grad, b_grad) in enumerate(found):
        torch.testing.assert_close(a, a_GD.detach(), rtol=0, atol=0)
        torch.testing.assert_close(b, b_G.detach(), rtol=0, atol=0)
        if sizes[rank]:
            torch.testing.assert_close(a_grad, a_GD.grad.split(sizes)[rank], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(b_grad, b_G.grad.split(sizes)[rank], rtol=1e-12, atol=1e-12)


def gathered_numbers() -> list[Tensor]:
    rank = dist.get_rank()
    group = dist.group.WORLD
    assert group is not None
    nobody, some = all_gather_rows(
        [torch.zeros(0, 2, dtype=torch.int64), torch.full((rank, 2), rank, dtype=torch.int64)], group
    )
    return [nobody, some]


def test_whole_numbers_go_too_and_rows_that_nobody_has_keep_their_shape() -> None:
    for nobody, some in run_ranks(gathered_numbers, world=2):
        assert nobody.shape == (0, 2)
        assert some.tolist() == [[1, 1]]
