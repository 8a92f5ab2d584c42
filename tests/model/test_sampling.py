"""Hand-computed: what is left out, what guidance does, and that seeds repeat."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from dougong.model.sampling import SamplingConfig, choose, guided, narrowed

CHANCES = torch.tensor([[0.5, 0.05, 0.3, 0.15]])


def left(**settings: float) -> torch.Tensor:
    return narrowed(CHANCES.log(), SamplingConfig.model_validate(settings)).exp()[0]


def test_top_p_keeps_the_fewest_that_have_enough() -> None:
    torch.testing.assert_close(left(top_p=0.5), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(left(top_p=0.51), torch.tensor([0.5, 0.0, 0.3, 0.0]) / 0.8)
    torch.testing.assert_close(left(top_p=0.94), torch.tensor([0.5, 0.0, 0.3, 0.15]) / 0.95)
    torch.testing.assert_close(left(top_p=1.0), CHANCES[0])
    torch.testing.assert_close(left(top_p=1e-6), torch.tensor([1.0, 0.0, 0.0, 0.0]))


def test_top_k_comes_before_top_p() -> None:
    torch.testing.assert_close(left(top_k=2), torch.tensor([0.5, 0.0, 0.3, 0.0]) / 0.8)
    torch.testing.assert_close(left(top_k=2, top_p=0.6), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(left(top_k=9), CHANCES[0])


def test_temperature_sharpens() -> None:
    squared = CHANCES[0].square()
    torch.testing.assert_close(left(temperature=0.5), squared / squared.sum())
    assert choose(CHANCES, SamplingConfig(temperature=0), torch.Generator()).tolist() == [0]


def test_guidance_goes_from_without_through_with_and_beyond() -> None:
    told, untold = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 1.0, 1.0]])
    told_log, untold_log = told.log_softmax(dim=-1), untold.log_softmax(dim=-1)

    torch.testing.assert_close(guided(told, untold, 1.0), told_log)
    torch.testing.assert_close(guided(told, untold, 0.0), untold_log)
    torch.testing.assert_close(guided(told, untold, 3.0), 3 * told_log - 2 * untold_log)


def test_samples_follow_the_chances_and_repeat_with_the_seed() -> None:
    scores = CHANCES.log().expand(20_000, 4)

    first, again, other = (choose(scores, SamplingConfig(), torch.Generator().manual_seed(s)) for s in (1, 1, 2))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.testing.assert_close(torch.bincount(first, minlength=4) / 20_000, CHANCES[0], rtol=0, atol=0.015)


@pytest.mark.parametrize(
    "settings", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": 0}, {"guidance": -1}]
)
def test_what_makes_no_sense_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        SamplingConfig.model_validate(settings)
