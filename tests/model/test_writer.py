"""The writer looks only back, a cache changes nothing, and what is not told leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dougong.core.errors import ConfigError
from dougong.core.signature import ImageInput, Signature, Target, TextInput
from dougong.model.sampling import SamplingConfig
from dougong.model.writer import Direction, Writer, WriterConfig
from dougong.nn.batch import Batch, MediaBatch
from dougong.nn.causal import Cache, CausalLayer

SIGNATURE = Signature(
    inputs={"photo": ImageInput(height=16, width=24), "remark": TextInput(vocabulary_size=12, max_tokens=7)},
    target=Target(name="kind", task="single_label", labels=("a", "b")),
)
SMALL: dict[str, Any] = {
    "width": 16,
    "num_layers": 2,
    "num_heads": 2,
    "image_encoder": {"width": 16, "num_layers": 1, "num_heads": 2, "patch_size": 8},
    "text_encoder": {"width": 8, "num_layers": 1, "num_heads": 2},
    "tokenizer": {"cell": 8, "width": 8, "num_codes": 10, "code_width": 4},
}


def build(**settings: Any) -> Writer:
    torch.manual_seed(0)
    return WriterConfig.model_validate(SMALL | settings).build(SIGNATURE)


def batch_of(num_records: int = 5) -> Batch:
    """Each record with its own picture and text; the texts are of 3 to 7 tokens, the last record lacks everything."""
    generator = torch.Generator().manual_seed(1)
    length_U = torch.arange(num_records) % 5 + 3
    present_B = torch.arange(num_records) < num_records - 1
    index_B = torch.arange(num_records)
    text = {
        "ids_UT": torch.randint(1, 12, (num_records, 7), generator=generator),
        "mask_UT": torch.arange(7) < length_U[:, None],
    }
    pixels = {"pixels_UCHW": torch.randn(num_records, 3, 16, 24, generator=generator)}
    return Batch(
        {"photo": MediaBatch(pixels, index_B, present_B), "remark": MediaBatch(text, index_B, present_B)}, None
    )


def with_values(batch: Batch, name: str, values: dict[str, Tensor]) -> Batch:
    return batch._replace(media={**batch.media, name: batch.media[name]._replace(values=values)})


def test_reading_one_by_one_with_a_cache_is_reading_at_once() -> None:
    torch.manual_seed(0)
    layer = CausalLayer(width=8, num_heads=2, feedforward_ratio=2.0).eval()
    x_BTD, mask_BT = torch.randn(3, 6, 8), torch.ones(3, 6, dtype=torch.bool)
    mask_BT[1, 2:4] = False

    whole_BTD, _ = layer(x_BTD, mask_BT)
    cache: Cache | None = None
    for place in range(6):
        one_B1D, cache = layer(x_BTD[:, place : place + 1], mask_BT[:, : place + 1], cache)
        torch.testing.assert_close(one_B1D[:, 0], whole_BTD[:, place], rtol=0, atol=1e-5)


def test_a_masked_token_leaves_no_trace_and_the_future_is_not_seen() -> None:
    torch.manual_seed(0)
    layer = CausalLayer(width=8, num_heads=2, feedforward_ratio=2.0).eval()
    x_BTD, mask_BT = torch.randn(1, 5, 8), torch.tensor([[True, False, True, True, True]])
    spoiled_BTD = x_BTD.clone()
    spoiled_BTD[:, 1] = 100.0
    spoiled_BTD[:, 4] = -100.0

    torch.testing.assert_close(layer(spoiled_BTD, mask_BT)[0][:, 2:4], layer(x_BTD, mask_BT)[0][:, 2:4], rtol=0, atol=0)


@pytest.mark.parametrize("direction", ["caption", "draw"])
def test_cached_writing_scores_what_reading_the_whole_scores(direction: Direction) -> None:
    """What greedy writing chose is, read again as if it were the truth, the likeliest at every place."""
    model, batch = build().eval(), batch_of()

    written_BN = model.write(batch, direction, SamplingConfig(temperature=0), torch.Generator().manual_seed(0))

    if direction == "caption":
        start_B1 = torch.ones(5, 1, dtype=torch.long)
        ids_UT = torch.cat([start_B1, written_BN], dim=1)
        full = with_values(batch, "remark", {"ids_UT": ids_UT, "mask_UT": torch.ones_like(ids_UT, dtype=torch.bool)})
        score_BNV = model(full).written["caption"].score_RNV
    else:
        model.tokenizer.encode = lambda pixels_UCHW: written_BN[: len(pixels_UCHW)]  # type: ignore[method-assign]
        score_BNV = model(batch).written["draw"].score_RNV
    best_BN = score_BNV.argmax(dim=-1)
    # After the end of a caption the filling is not what the model would say.
    due_BN = (written_BN == model.config.end_of_words).cumsum(dim=1) <= (written_BN == model.config.end_of_words)
    due_BN = due_BN if direction == "caption" else torch.ones_like(due_BN)
    due_BN = due_BN & (torch.arange(5) < 4)[:, None]  # nothing is known of what the last should say
    assert due_BN.sum() > len(due_BN)
    assert torch.equal(best_BN[due_BN], written_BN[due_BN])


def test_a_token_does_not_see_itself_or_what_comes_after() -> None:
    model, batch = build().eval(), batch_of()
    ids_UT = batch.media["remark"].values["ids_UT"]
    other_UT = ids_UT.clone()
    other_UT[:, 4:] = (other_UT[:, 4:] + 1) % 12
    changed = with_values(batch, "remark", {**batch.media["remark"].values, "ids_UT": other_UT})

    score, other = (model(each).written["caption"].score_RNV for each in (batch, changed))

    torch.testing.assert_close(other[:, :4], score[:, :4], rtol=0, atol=0)  # the fifth id is the fourth target
    assert not torch.allclose(other[:, 4:], score[:, 4:])


def test_a_code_does_not_see_itself_or_what_comes_after() -> None:
    """Though it is told what stands above it and to the right of that."""
    model = build().eval()
    code_RN = torch.randint(0, 10, (2, 6))
    before_RND = model._before("draw", code_RN)

    for place in range(6):
        other_RN = code_RN.clone()
        other_RN[:, place:] = (other_RN[:, place:] + 1) % 10
        torch.testing.assert_close(
            model._before("draw", other_RN)[:, : place + 1], before_RND[:, : place + 1], rtol=0, atol=0
        )


def test_what_is_not_told_leaves_no_trace() -> None:
    model = build(condition_dropped=0.999999).train()
    batch = batch_of()
    other = with_values(batch, "photo", {"pixels_UCHW": torch.randn(5, 3, 16, 24)})

    torch.testing.assert_close(
        model(other).written["caption"].score_RNV, model(batch).written["caption"].score_RNV, rtol=0, atol=0
    )


def test_an_absent_condition_is_no_condition_and_an_absent_content_is_not_due() -> None:
    model, batch = build().eval(), batch_of()
    nothing = MediaBatch({"pixels_UCHW": torch.zeros(0, 3, 16, 24)}, torch.zeros(5).long(), torch.zeros(5).bool())
    blind = batch._replace(media={**batch.media, "photo": nothing})

    seen, unseen = model(batch).written["caption"], model(blind).written["caption"]

    assert not seen.due_RN[-1].any()
    assert torch.equal(seen.due_RN[:-1], unseen.due_RN[:-1])
    torch.testing.assert_close(seen.score_RNV[-1], unseen.score_RNV[-1], rtol=0, atol=1e-6)
    assert not model(blind).written["draw"].due_RN.any()


def test_records_take_turns_in_training_and_all_are_judged() -> None:
    model, batch = build(), batch_of()

    training = model.train()(batch).written
    judged = model.eval()(batch).written

    assert training["caption"].row_R.tolist() == [0, 2, 4]
    assert training["draw"].row_R.tolist() == [1, 3]
    assert judged["caption"].row_R.tolist() == judged["draw"].row_R.tolist() == [0, 1, 2, 3, 4]
    assert judged["draw"].score_RNV.shape == (5, 6, 10)
    assert judged["caption"].score_RNV.shape == (5, 6, 12)


def test_training_leaves_the_tokenizer_as_it_was_and_reaches_all_else() -> None:
    model = build(align=True).train()
    before = {name: weight.clone() for name, weight in model.tokenizer.state_dict().items()}

    output = model(batch_of())
    parts = [*(each.score_RNV.square().mean() for each in output.written.values()), *output.aligned.values()]
    sum(part.sum() for part in parts).backward()

    assert all(torch.equal(weight, before[name]) for name, weight in model.tokenizer.state_dict().items())
    untouched = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert untouched == []
    assert set(output.aligned) == {"photo", "remark"}


def test_one_direction_needs_one_encoder() -> None:
    model = build(directions=["caption"]).eval()

    assert set(model(batch_of()).written) == {"caption"}
    assert set(model.parts()) == {"photo"}
    with pytest.raises(ConfigError, match="has learnt to caption, not to draw"):
        model.write(batch_of(), "draw", SamplingConfig(), torch.Generator())


def test_the_same_seed_writes_the_same_and_guidance_of_1_is_none() -> None:
    model, batch = build().eval(), batch_of()

    def draw(seed: int, **settings: Any) -> Tensor:
        return model.write(batch, "draw", SamplingConfig(**settings), torch.Generator().manual_seed(seed))

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))
    # Guidance 0 ignores the condition: every record is written alike, and as the record that lacks it.
    free_BP = draw(3, guidance=0.0, temperature=0.0)
    assert torch.equal(free_BP, free_BP[-1:].expand_as(free_BP))
    assert torch.equal(free_BP[-1], draw(3, temperature=0.0)[-1])
    assert model.pictures(draw(3)).shape == (5, 3, 16, 24)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="trained with condition_dropped=0. Use guidance 1"):
        build(condition_dropped=0.0).eval().write(batch_of(), "draw", SamplingConfig(guidance=2), torch.Generator())
    with pytest.raises(ConfigError, match="a writer needs one text, and the records have 0"):
        WriterConfig.model_validate(SMALL).build(
            SIGNATURE.model_copy(update={"inputs": {"photo": ImageInput(height=16, width=24)}})
        )
    with pytest.raises(ConfigError, match="end_of_words=99 is no word"):
        build(end_of_words=99)
    with pytest.raises(ValidationError, match="must name caption, draw or both"):
        WriterConfig(directions=())
    with pytest.raises(ValidationError, match="cannot share out width=96"):
        WriterConfig(num_heads=5)
