import pytest
import torch

from dougong.engine.precision.exponents import (
    HIGHEST,
    LOWEST,
    SAMPLE,
    Exponents,
    counted,
    has_broken,
    largest,
    quantile,
)


def test_each_number_counts_at_the_power_of_two_below_it() -> None:
    counts = counted(torch.tensor([1.0, 1.99, 2.0, -0.5, 2.0**-149, 1.5 * 2.0**127]))
    assert {place + LOWEST: int(n) for place, n in enumerate(counts[:-2]) if n} == {0: 2, 1: 1, -1: 1, -149: 1, 127: 1}
    assert largest(counts) == HIGHEST
    assert not has_broken(counts)


def test_zeros_and_what_is_not_finite_are_counted_apart() -> None:
    counts = counted(torch.tensor([0.0, -0.0, torch.inf, torch.nan, -torch.inf, 4.0]))
    assert counts[-2:].tolist() == [2, 3]
    assert has_broken(counts)
    assert largest(counts) == 2
    assert largest(counted(torch.zeros(5))) is None
    assert quantile(counted(torch.zeros(5)), 0.5) is None
    assert counted(torch.zeros(0)).sum() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_scale_is_taken_off_again(dtype: torch.dtype) -> None:
    assert largest(counted(torch.tensor([2.0**10], dtype=dtype), shift=7)) == 3


def test_of_a_large_tensor_all_rows_and_channels_are_met() -> None:
    x = torch.zeros(1000, 64)
    x[:, 17] = 8.0
    counts = counted(x)
    assert counts.sum() <= 2 * SAMPLE
    assert counts[3 - LOWEST] / counts.sum() == pytest.approx(1 / 64, rel=0.3)


def test_what_was_seen_fades_and_quantiles_follow() -> None:
    history = Exponents(decay=0.5)
    history.observe(torch.full((100,), 2.0**-20))
    history.settle(history.fresh.clone())
    assert history.quantile(0.5) == -20
    for _ in range(3):
        history.observe(torch.full((100,), 1.0))
        history.settle(history.fresh.clone())
    assert history.quantile(0.5) == 0
    assert history.quantile(0.01) == -20  # 12.5 of 187.5 are left
    history.settle(torch.zeros_like(history.fresh))  # nobody has looked: nothing fades
    assert history.quantile(0.01) == -20
