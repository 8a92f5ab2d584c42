from typing import Any

import pytest
import torch
from pydantic import ValidationError

from dougong.engine.contribution import Removals
from dougong.engine.sampling import ModalitySampler, SamplingConfig, SamplingState, merit
from dougong.nn.batch import Batch, MediaBatch

STILL = SamplingConfig(rate=0.5, highest=0.5)


def batch_of(num_records: int, *names: str, present: float = 1.0, quality: bool = False) -> Batch:
    random = torch.Generator().manual_seed(0)
    media = {}
    for name in names:
        present_B = torch.rand(num_records, generator=random) < present
        quality_UQ = torch.arange(num_records)[:, None] % 2 * torch.ones(1, 3) if quality else None
        values = {"v": torch.arange(float(num_records))[:, None]}
        media[name] = MediaBatch(values, torch.arange(num_records), present_B, quality_UQ=quality_UQ)
    return Batch(media, torch.zeros(num_records))


def present_BM(batch: Batch) -> torch.Tensor:
    return torch.stack([media.present_B for media in batch.media.values()], dim=1)


def lost(**score: float) -> Removals:
    """All is learnt from .1 to .9; the score without each."""
    return Removals(0.9, 0.1, score)


# What a step leaves out ----------------------------------------------------------------------------------------------


def test_modalities_are_left_out_at_their_rates() -> None:
    sampler = ModalitySampler(
        SamplingConfig(rate=0.3), 0, SamplingState(rate={"a": 0.1, "b": 0.6}, reliance={"a": 1, "b": 1})
    )

    kept_BM = present_BM(sampler(batch_of(40_000, "a", "b", "c"), step=0)).double()

    # c has the rate of the start, .3. Who would lose all keeps one, so that somewhat fewer are left out.
    all_lost = 0.1 * 0.6 * 0.3
    left_out = 1 - kept_BM.mean(dim=0)
    assert left_out.sum().item() == pytest.approx(0.1 + 0.6 + 0.3 - all_lost, abs=0.01)
    assert left_out[1].item() == pytest.approx(0.6, abs=0.02)
    assert left_out[0].item() == pytest.approx(0.1 - all_lost, abs=0.02)


def test_a_record_never_loses_its_last_modality_and_gets_none_that_it_lacked() -> None:
    batch = batch_of(2000, "a", "b", "c", present=0.5)
    before = present_BM(batch)

    after = present_BM(ModalitySampler(SamplingConfig(rate=0.9, highest=0.9), 0)(batch, step=0))

    assert not (after & ~before).any()
    assert (after.any(dim=1) == before.any(dim=1)).all()
    assert (~before.any(dim=1)).any()
    assert after.sum() < 0.7 * before.sum()


def test_what_is_left_out_follows_from_seed_step_and_part_alone() -> None:
    batch = batch_of(50, "a", "b")

    def draw(seed: int = 0, step: int = 7, part: int = 1) -> list[Any]:
        torch.rand(3)  # of the generator that a checkpoint keeps nothing is taken
        state = torch.get_rng_state()
        drawn = present_BM(ModalitySampler(STILL, seed)(batch, step=step, part=part)).tolist()
        assert torch.equal(torch.get_rng_state(), state)
        return drawn

    assert draw() == draw()
    assert draw() != draw(seed=1)
    assert draw() != draw(step=8)
    assert draw() != draw(part=0)


def test_media_that_are_left_out_are_not_encoded_unless_asked_for() -> None:
    batch = batch_of(100, "a", "b")

    got = ModalitySampler(STILL, 0)(batch, step=0).media["a"]
    beside = ModalitySampler(STILL.model_copy(update={"beside": True}), 0)(batch, step=0).media["a"]

    assert len(got.values["v"]) == int(got.present_B.sum()) < 100
    kept = got.present_B.nonzero()[:, 0]
    assert got.values["v"][got.index_B[kept], 0].tolist() == kept.tolist()
    assert len(beside.values["v"]) == 100
    assert beside.present_B.tolist() == got.present_B.tolist()
    assert beside.there_B is not None
    assert beside.there_B.all()


def test_what_stood_beside_a_view_stays_there() -> None:
    batch = batch_of(100, "a", "b")
    hidden = batch.media["b"]._replace(present_B=torch.zeros(100).bool(), there_B=torch.ones(100).bool())

    got = ModalitySampler(STILL, 0)(batch._replace(media={**batch.media, "b": hidden}), step=0).media["b"]

    assert got.there_B is not None
    assert got.there_B.all()
    assert not got.present_B.any()


def test_bad_media_are_left_out_more_often_up_to_the_highest_rate() -> None:
    config = SamplingConfig(rate=0.2, quality=0.3, highest=0.4)
    batch = batch_of(20_000, "a", "b", quality=True)  # media with even numbers have figures of 0, the others of 1
    good = ("sharpness", "contrast", "snr")

    left_out_B = ~ModalitySampler(config, 0, figures={"a": good, "b": good})(batch, step=0).media["a"].present_B

    both_lost = (0.4**2 / 2, 0.2**2 / 2)  # in half of which this one is kept
    assert left_out_B[::2].double().mean().item() == pytest.approx(0.4 - both_lost[0], abs=0.02)
    assert left_out_B[1::2].double().mean().item() == pytest.approx(0.2 - both_lost[1], abs=0.02)


def test_what_is_good_follows_the_side_of_each_figure_that_is_worse() -> None:
    quality_UQ = torch.tensor([[0.9, 0.9, 0.2, 0.7], [0.1, 0.9, 0.2, 0.7], [0.9, 0.9, 0.8, 0.7], [0.9, 0.1, 0.2, 0.7]])

    figures = ("sharpness", "exposure", "noise", "clipped")

    # Sharp is better, noise and clipping are worse, and exposure may be unusual either way.
    assert merit(quality_UQ, figures).tolist() == pytest.approx([2 / 3, 0.4, 1.4 / 3, 2 / 3])
    assert merit(quality_UQ[:, :1], ("exposure",)).tolist() == [1, 1, 1, 1]


def test_a_text_of_unknown_words_is_left_out_more_often() -> None:
    config = SamplingConfig(rate=0.2, quality=0.3, highest=0.5)
    batch = batch_of(20_000, "a", "b", quality=True)  # odd media: as long as can be, and nothing of them is known

    sampler = ModalitySampler(config, 0, figures=dict.fromkeys(("a", "b"), ("length", "unknown", "pieces")))
    left_out_B = ~sampler(batch, step=0).media["a"].present_B

    assert left_out_B[1::2].double().mean() > left_out_B[::2].double().mean() + 0.15
    assert sampler.merits(batch) == pytest.approx({"a": 0.5, "b": 0.5})


# How rates move ------------------------------------------------------------------------------------------------------


def test_a_rate_follows_its_formula() -> None:
    sampler = ModalitySampler(SamplingConfig(rate=0.2, highest=0.6, smoothing=0.5, largest_step=1.0), 0)

    first = sampler.update(lost(a=0.5, b=0.7, c=0.95))
    second = sampler.update(lost(a=0.9, b=0.3, c=0.0))

    # Of .8 that were learnt, .4 and .2 are lost, and less than nothing: halves and quarters of the way from .2 to .6.
    assert first.before == {"a": 0.2, "b": 0.2, "c": 0.2}
    assert first.after == pytest.approx({"a": 0.4, "b": 0.3, "c": 0.2})
    # Half of that and half of 0, .75, and 1 at the most.
    assert second.before == first.after
    assert sampler.state.reliance == pytest.approx({"a": 0.25, "b": 0.5, "c": 0.5})
    assert second.after == pytest.approx({"a": 0.3, "b": 0.4, "c": 0.4})


def test_a_rate_moves_by_its_largest_step_and_rests_near_its_goal() -> None:
    sampler = ModalitySampler(SamplingConfig(rate=0.2, highest=0.5, largest_step=0.15, smallest_step=0.02), 0)

    up = [sampler.update(lost(a=0.1, b=0.9)) for _ in range(3)]
    down = [sampler.update(lost(a=0.9, b=0.86)) for _ in range(7)]

    assert [change.after["a"] for change in up] == pytest.approx([0.35, 0.5, 0.5])
    assert [change.after["a"] for change in down[:3]] == pytest.approx([0.35, 0.275, 0.2375])
    assert down[-1].after["a"] == down[-2].after["a"] < 0.22  # near to .2, and there it stays
    assert all(change.after["b"] == 0.2 for change in down)  # .215 is wanted at most
    assert up[0].reason["a"] == "from 0.200 to 0.350: without it 100% is lost, so 0.500 is wanted"
    assert up[0].reason["b"] == "stays at 0.200: without it 0% is lost, so 0.200 is wanted"


def test_a_reason_says_what_quality_adds() -> None:
    config = SamplingConfig(rate=0.2, quality=0.4, highest=0.6)
    sampler = ModalitySampler(config, 0, figures={"a": ("snr",), "b": ("snr",)})

    change = sampler.update(lost(a=0.5, b=0.9), {"a": 0.75})

    assert change.reason["a"].endswith("is wanted; its media are 0.75 good on average, for which 0.100 is added")
    assert change.reason["b"].endswith("is wanted")


def test_where_nothing_is_learnt_yet_nothing_moves() -> None:
    for found in (Removals(0.3, 0.3, {"a": 0.1}), Removals(0.2, 0.3, {"a": 0.1})):
        change = ModalitySampler(SamplingConfig(), 0).update(found)
        assert change.after == change.before == {"a": 0.3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate": 0.8}, "rate 0.8 must not be above highest 0.7"),
        ({"rate": 0.7, "quality": 0.1}, "quality 0.1 cannot take effect: rate 0.7 is the highest already"),
        ({"highest": 0.95}, "less than or equal to 0.9"),
        ({"largest_step": 0.0}, "greater than 0"),
        ({"smoothing": 1.0}, "less than 1"),
    ],
)
def test_settings_that_cannot_be_obeyed_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SamplingConfig(**settings)  # type: ignore[arg-type]


def test_rates_that_cannot_move_need_no_measuring() -> None:
    assert SamplingConfig().moves
    assert not STILL.moves
