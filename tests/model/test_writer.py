"""The writer looks only back, a cache changes nothing, and what is not told leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from dougong.core.errors import ConfigError
from dougong.core.signature import ImageInput, Signature, Target, TextInput
from dougong.model.completion import parts
from dougong.model.sampling import SamplingConfig
from dougong.model.writer import CompleteBlock, Direction, JoinStreams, Writer, WriterConfig, WriterState
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
COMPLETES: dict[str, Any] = {"completion": {"num_tokens": 2, "num_heads": 2}}

both_ways = pytest.mark.parametrize("settings", [{}, COMPLETES], ids=["plain", "completes"])


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


def without(batch: Batch, name: str) -> Batch:
    """The same where nobody has that modality."""
    media = batch.media[name]
    values = {key: value[:0] for key, value in media.values.items()}
    nothing = MediaBatch(values, torch.zeros_like(media.index_B), torch.zeros_like(media.present_B))
    return batch._replace(media={**batch.media, name: nothing})


def joined(model: Writer, batch: Batch) -> WriterState:
    """What the decoder's first layer is given."""
    state = model.embed(batch)
    for block in model.blocks:
        state = block(state)
        if isinstance(block, JoinStreams):
            break
    return state


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


@both_ways
@pytest.mark.parametrize("direction", ["caption", "draw"])
def test_cached_writing_scores_what_reading_the_whole_scores(direction: Direction, settings: dict[str, Any]) -> None:
    """What greedy writing chose is, read again as if it were the truth, the likeliest at every place."""
    model, batch = build(**settings).eval(), batch_of()

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


@both_ways
def test_a_token_does_not_see_itself_or_what_comes_after(settings: dict[str, Any]) -> None:
    model, batch = build(**settings).eval(), batch_of()
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


@both_ways
def test_what_is_not_told_leaves_no_trace(settings: dict[str, Any]) -> None:
    model = build(condition_dropped=0.999999, **settings).train()
    batch = batch_of()
    other = with_values(batch, "photo", {"pixels_UCHW": torch.randn(5, 3, 16, 24)})

    torch.testing.assert_close(
        model(other).written["caption"].score_RNV, model(batch).written["caption"].score_RNV, rtol=0, atol=0
    )


@both_ways
def test_an_absent_condition_is_no_condition_and_an_absent_content_is_not_due(settings: dict[str, Any]) -> None:
    model, batch = build(**settings).eval(), batch_of()
    blind = without(batch, "photo")

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


@both_ways
def test_training_leaves_the_tokenizer_as_it_was_and_reaches_all_else(settings: dict[str, Any]) -> None:
    model = build(align=True, **settings).train()
    before = {name: weight.clone() for name, weight in model.tokenizer.state_dict().items()}

    output = model(batch_of())
    parts = [*(each.score_RNV.square().mean() for each in output.written.values()), *output.aligned.values()]
    sum(part.sum() for part in [*parts, output.temperature]).backward()

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


@both_ways
def test_the_same_seed_writes_the_same_and_guidance_of_1_is_none(settings: dict[str, Any]) -> None:
    model, batch = build(**settings).eval(), batch_of()

    def draw(seed: int, **sampling: Any) -> Tensor:
        return model.write(batch, "draw", SamplingConfig(**sampling), torch.Generator().manual_seed(seed))

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
    with pytest.raises(ValidationError, match=r"completion\.num_heads=5 cannot share out width=96: .* Use completion"):
        WriterConfig.model_validate({"completion": {"num_heads": 5}})
    with pytest.raises(ValidationError, match=r"directions=\['caption'\] and align=false nothing teaches that encoder"):
        WriterConfig.model_validate({"completion": {}, "directions": ["caption"]})
    with pytest.raises(ValidationError, match="temperature=0.2 cannot take effect with align=false"):
        WriterConfig(temperature=0.2)


@pytest.mark.parametrize("direction", ["caption", "draw"])
def test_what_was_completed_is_read_alike_at_once_and_token_by_token(direction: Direction) -> None:
    model, batch = build(**COMPLETES).eval(), batch_of()
    with torch.no_grad():
        at_once = model(batch).written[direction]
        before_BND = model._before(direction, at_once.target_RN)
        x_BTD, mask_BT = model._given(batch, direction)
        caches: list[Cache | None] = [None] * len(model.layers)
        scores = []
        for place in range(before_BND.shape[1]):
            new_BTD = before_BND[:, place : place + 1]
            mask_BT = torch.nn.functional.pad(mask_BT, (0, 1), value=True)
            x_BTD = model._through(torch.cat([x_BTD, new_BTD], dim=1) if not place else new_BTD, mask_BT, caches)
            scores.append(model._score(direction, x_BTD[:, -1]))

    due_BN = at_once.due_RN
    torch.testing.assert_close(torch.stack(scores, dim=1)[due_BN], at_once.score_RNV[due_BN], rtol=0, atol=1e-5)


@pytest.mark.parametrize("direction", ["caption", "draw"])
def test_completed_tokens_stand_marked_between_what_is_given_and_what_is_written(direction: Direction) -> None:
    model, batch = build(**COMPLETES).eval(), batch_of()
    (block,) = (block for block in model.blocks if isinstance(block, CompleteBlock))
    with torch.no_grad():
        block.completions[direction].mark_D.fill_(5.0)

    state = joined(model, batch)

    stream, num_given = state.streams[direction], state.read.tokens[model.given[direction]].shape[1]
    stands = slice(1 + num_given, 3 + num_given)
    assert stream.completed is not None
    torch.testing.assert_close(stream.x_RTD[:4, stands], stream.completed.made_RKD[:4] + 5.0, rtol=0, atol=0)
    assert stream.mask_RT[:4, stands].all()
    assert stream.x_RTD.shape[1] == 3 + num_given + stream.target_RN.shape[1]
    # The last record lacks what it would be told: nothing is made for it, and nothing is seen of it.
    assert stream.completed.made_R.tolist() == [True] * 4 + [False]
    assert not stream.x_RTD[4, 1 : 3 + num_given].any()
    assert not stream.completed.made_RKD[4].any()
    assert not stream.mask_RT[4, 1 : 3 + num_given].any()


def test_what_was_completed_counts_for_what_is_written() -> None:
    model, batch = build(**COMPLETES).eval(), batch_of()
    with torch.no_grad():
        first = model(batch).written
        for block in model.blocks:
            if isinstance(block, CompleteBlock):
                for completion in (block.completions[direction] for direction in model.config.directions):
                    completion.question_KD.neg_()
        second = model(batch).written

    for direction in model.config.directions:
        assert not torch.allclose(first[direction].score_RNV[:4], second[direction].score_RNV[:4], atol=1e-4)
        torch.testing.assert_close(first[direction].score_RNV[4], second[direction].score_RNV[4], rtol=0, atol=0)


def test_the_truth_is_what_the_other_encoder_says_and_gets_no_gradient() -> None:
    model, batch = build(**COMPLETES).train(), batch_of()

    written, read = model(batch).written, joined(model, batch).read

    for direction, name in model.content.items():
        completed = written[direction].completed
        assert completed is not None
        assert completed.truth_UKD is not None
        assert not completed.truth_UKD.requires_grad
        wanted_UKD = parts(read.tokens[name], read.masks[name], 2)
        torch.testing.assert_close(completed.truth_UKD, wanted_UKD, rtol=0, atol=0)
    completed.made_RKD.sum().backward()  # of draw: from the words that are given
    reached = {name for name, own in model.parts().items() if any(p.grad is not None for p in own)}
    assert reached == {"remark"}


@pytest.mark.parametrize("lacking", ["photo", "remark"])
@pytest.mark.parametrize("align", [False, True])
def test_completion_works_where_a_whole_batch_lacks_a_side(lacking: str, align: bool) -> None:
    model, batch = build(align=align, **COMPLETES).train(), without(batch_of(), lacking)

    output = model(batch)
    sum(written.score_RNV.square().mean() for written in output.written.values()).backward()

    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    for direction, written in output.written.items():
        if model.given[direction] == lacking:
            assert written.completed is None
        else:
            assert written.completed is not None
            assert written.completed.truth_UKD is None
    for direction in model.config.directions:
        ids_BN = model.eval().write(batch, direction, SamplingConfig(guidance=1.5), torch.Generator().manual_seed(0))
        assert len(ids_BN) == 5


def test_completion_builds_both_encoders_and_reads_them() -> None:
    model = build(directions=["caption"], align=True, **COMPLETES)

    assert set(model.parts()) == {"photo", "remark"}
    for mode in (True, False):
        completed = model.train(mode)(batch_of()).written["caption"].completed
        assert completed is not None
        assert completed.truth_UKD is not None
        assert completed.truth_UKD.shape == (5, 2, 16)


def test_a_temperature_is_learnt_where_vectors_are_aligned_and_nowhere_else() -> None:
    def names(**settings: Any) -> set[str]:
        return {name for name, _ in build(**settings).named_parameters()}

    learnt, fixed = names(align=True), names(align=True, learn_temperature=False)

    assert learnt - fixed == {"temperature.log"}
    assert not {name for name in names() if "temperature" in name}
    model = build(align=True, temperature=0.2).train()
    output = model(batch_of())
    assert output.temperature.item() == pytest.approx(0.2)
    output.temperature.backward()
    assert model.get_parameter("temperature.log").grad is not None
    assert build(align=True, temperature=0.2, learn_temperature=False)(batch_of()).temperature == 0.2


def test_vectors_of_media_alone_are_those_that_training_aligns() -> None:
    model, batch = build(align=True, **COMPLETES).eval(), batch_of()

    aligned = model(batch).aligned

    for name in ("photo", "remark"):
        vector_UD = model.vectors(batch.media[name], name)
        torch.testing.assert_close(vector_UD, aligned[name], rtol=0, atol=1e-6)
        torch.testing.assert_close(vector_UD.norm(dim=1), torch.ones(5))
