import math
from typing import Any

import pytest
import torch
from photo_and_words import ENCODERS, SIGNATURE, records
from torch import Tensor

from dougong.model.bridge import BridgeConfig
from dougong.model.sandwich import Sandwich, SandwichConfig
from dougong.nn.batch import Batch
from dougong.watch.attention import METHODS, catching, look_inside, survey, unshared
from dougong.watch.faithful import curves, sanity, without


def network(fusion: str = "bridge", kind: str = "cross", **more: Any) -> Sandwich:
    torch.manual_seed(0)
    config = SandwichConfig(
        fusion=fusion,  # type: ignore[arg-type]
        width=16,
        bridge=BridgeConfig(kind=kind, num_blocks=2, num_heads=2),  # type: ignore[arg-type]
        encoders=ENCODERS,
        **more,
    )
    return config.build(SIGNATURE).eval()


KINDS: list[dict[str, Any]] = [
    {"kind": "cross"},
    {"kind": "merged"},
    {"kind": "bottleneck"},
    {"fusion": "late"},
    {"fusion": "late", "decide": "mean"},
    {"decide": "gated"},
]


@pytest.mark.parametrize("given", KINDS, ids=str)
def test_what_is_looked_into_is_the_models_own_answer(given: dict[str, Any]) -> None:
    model, batch = network(**given), records()

    found = look_inside(model, batch)

    with torch.no_grad():
        torch.testing.assert_close(found.output.output_BC, model(batch).output_BC, rtol=1e-4, atol=1e-5)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("given", KINDS, ids=str)
def test_relevance_is_shared_out_among_real_tokens_alone(given: dict[str, Any]) -> None:
    found = look_inside(network(**given), records())

    for method in METHODS:
        maps: dict[str, Tensor] = getattr(found, method)
        assert {name: tuple(each.shape) for name, each in maps.items()} == {"photo": (4, 16), "words": (4, 9)}
        together = torch.cat(list(maps.values()), dim=1)
        assert bool((together >= 0).all())
        torch.testing.assert_close(together.sum(dim=1), torch.ones(4), rtol=0, atol=1e-4)
        for name, each in maps.items():
            assert float(each.masked_fill(found.masks[name], 0.0).abs().max()) == 0.0
        assert float(maps["words"][2].sum()) == float(maps["photo"][3].sum()) == 0.0
    assert found.masks["words"].sum(dim=1).tolist() == [9, 5, 0, 7]


def test_rollout_of_one_merged_block_is_half_identity_and_half_attention() -> None:
    torch.manual_seed(0)
    model = network(kind="merged").eval()
    batch = records()

    found = look_inside(model, batch)

    first = next(each for each in found.maps if each.asking == "words" and each.keys == (("words", 9),))
    encoded = 0.5 * torch.eye(9) + 0.5 * first.weight_BHTS[0].mean(dim=0)
    photo = next(each for each in found.maps if each.keys == (("photo", 17),))
    seen = 0.5 * torch.eye(17) + 0.5 * photo.weight_BHTS[0].mean(dim=0)
    pooled = seen[1:].view(2, 2, 2, 2, 17).mean(dim=(1, 3)).flatten(0, 1)
    held = torch.block_diag(pooled, encoded)
    for block in sorted({each.block for each in found.maps if len(each.keys) == 2}):
        rows = [each.weight_BHTS[0].mean(dim=0) for each in found.maps if each.block == block]
        held = (0.5 * torch.eye(13) + 0.5 * torch.cat(rows)) @ held
    explained = model.explain(unshared(batch))
    gate = explained.output.weight_BM[0]
    weights = torch.cat([gate[0] * explained.pooled["photo"][0], gate[1] * explained.pooled["words"][0]])
    want = (weights @ held)[1:]  # without the class token
    got = torch.cat([found.rollout["photo"][0], found.rollout["words"][0]])

    torch.testing.assert_close(got, want / want.sum(), rtol=1e-4, atol=1e-6)


def test_relevance_of_merged_blocks_adds_up_what_was_weighed_with_encoders_brought_to_one_weight() -> None:
    torch.manual_seed(0)
    model, batch = network(kind="merged").eval(), unshared(records())
    found = look_inside(model, batch)

    with catching(model) as caught:
        output = model(batch)
    score = output.output_BC.gather(1, found.target_B[:, None]).sum()
    weights = caught.weights()
    positive = [
        (weight * gradient)[0].clamp(min=0).detach()
        for weight, gradient in zip(weights, torch.autograd.grad(score, weights), strict=True)
    ]
    photo, words, first, second = (each.mean(dim=0) for each in positive[:4])
    encoders = [torch.eye(len(each)) + each / each.sum(dim=1, keepdim=True) for each in (photo, words)]
    pooled = encoders[0][1:].view(2, 2, 2, 2, 17).mean(dim=(1, 3)).flatten(0, 1)
    held = torch.block_diag(pooled, encoders[1])
    for bridge in (first, second):
        held = held + bridge @ held
    want = (torch.cat(positive[4:]) @ held)[1:]  # without the class token
    got = torch.cat([found.relevance["photo"][0], found.relevance["words"][0]])

    assert [tuple(each.shape) for each in positive] == [(2, 17, 17), (2, 9, 9), (2, 13, 13), (2, 13, 13), (4,), (9,)]
    torch.testing.assert_close(got, want / want.sum(), rtol=1e-4, atol=1e-6)


def test_a_records_map_does_not_depend_on_who_shares_its_photo() -> None:
    model, batch = network(), records()
    alone = Batch(
        {name: one._replace(index_B=one.index_B[:1], present_B=one.present_B[:1]) for name, one in batch.media.items()},
        None,
    )

    together, by_itself = look_inside(model, batch), look_inside(model, alone)

    torch.testing.assert_close(together.relevance["photo"][:1], by_itself.relevance["photo"], rtol=1e-3, atol=1e-5)


def test_the_bridge_asks_the_other_modality_and_nobody_else() -> None:
    flow = look_inside(network(), records()).flow_BMM

    torch.testing.assert_close(flow[0], torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert float(flow[2].sum()) == 0.0  # nobody to ask


def test_a_survey_finds_attention_on_padding() -> None:
    model, batch = network(), records()
    clean = {(one.block, one.asking): one for one in survey(model, [batch])}
    encoder = model.blocks[2].layer.layer.attention.self

    inner = encoder.forward
    encoder.forward = lambda *args, **kwargs: inner(args[0], attention_mask=None)
    leaking = {(one.block, one.asking): one for one in survey(model, [batch])}

    assert max(one.padding_mass for one in clean.values()) < 1e-6
    assert leaking[2, "words"].padding_mass > 0.05
    assert all(0 <= one.entropy <= 1 + 1e-9 for one in clean.values())
    assert clean[4 + 1, "words"].asked.keys() == {"photo"}


def test_taking_everything_away_leaves_what_an_empty_record_says() -> None:
    model, batch = network(), unshared(records())
    found = look_inside(model, batch)

    gone = without(model, batch, found.masks)

    pixels = gone.media["photo"].values["pixels_UCHW"]
    assert float((pixels - pixels[..., :1, :1]).abs().max()) == 0.0
    assert not bool(gone.media["words"].values["mask_UT"].any())
    assert bool(batch.media["words"].values["mask_UT"].any())


def test_curves_of_a_map_that_is_right_fall_below_chance() -> None:
    """The words' third token alone decides."""
    model, batch = network(), unshared(records())
    real = model.forward

    def only_third(given: Batch) -> Any:
        output = real(given)
        words = given.media["words"]
        there_U = words.values["mask_UT"][:, 2]
        there_B = there_U[words.index_B] & words.present_B
        logit_BC = torch.zeros(len(there_B), 3)
        logit_BC[:, 0] = torch.where(there_B, 4.0, 0.0)
        return output._replace(output_BC=logit_BC)

    model.forward = only_third  # type: ignore[method-assign]
    masks = {"words": torch.ones(4, 9).bool() & (torch.tensor([9, 5, 0, 7])[:, None] > torch.arange(9))}
    true_map = torch.zeros(4, 9)
    true_map[:, 2] = 1.0

    found = curves(model, batch, {"words": true_map}, masks, torch.zeros(4, dtype=torch.long))

    assert found.deletion.sure_K[0] == found.random_deletion.sure_K[0]
    assert 0.2 < found.deletion_gain < found.full_gain < 1
    assert found.insertion.area > found.random_insertion.area


def test_a_map_of_random_weights_is_another_one() -> None:
    model, batch = network(), records()

    found = sanity(model, batch)

    assert set(found) == set(METHODS)
    assert all(-1 <= value <= 1 and math.isfinite(value) for each in found.values() for value in each.values())
    assert abs(found["relevance"]["photo"]) < 0.9
