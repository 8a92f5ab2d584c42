"""The decoder against transformers' own, and its promises on several modalities."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from dougong.core.errors import CheckpointError, ConfigError
from dougong.core.signature import ImageInput, Signature, Target, TextInput
from dougong.model.decoder import Decoder, DecoderConfig, ExpertsConfig
from dougong.model.deepseek import read_deepseek, write_deepseek
from dougong.model.sampling import SamplingConfig
from dougong.nn.batch import Batch, MediaBatch
from dougong.nn.experts import MixtureOfExperts, Router

WORDS = 61
TARGET = Target(name="named", task="single_label", labels=("a", "b"))
GREEDY = SamplingConfig(temperature=0)

THEIRS: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "qk_nope_head_dim": 10,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "as published": {},
    "queries without a rank": {"q_lora_rank": None},
    "biases": {"attention_bias": True},
    "one group, not normalised": {"n_group": 1, "topk_group": 1, "norm_topk_prob": False},
    "all dense": {"first_k_dense_replace": 3},
    "stretched": {"rope_parameters": YARN},
}


def theirs(**changes: Any) -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**THEIRS | changes)).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.3 * torch.randn(len(buffer)))  # else the bias could be left out unseen
    return model


def signature(num_words: int = WORDS, **others: Any) -> Signature:
    return Signature(inputs={"words": TextInput(vocabulary_size=num_words, max_tokens=16), **others}, target=TARGET)


def loaded(folder: Path) -> Decoder:
    config, num_words, weights = read_deepseek(folder)
    model = config.build(signature(num_words)).eval()
    model.load_state_dict(weights)
    return model


@pytest.fixture(params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[DeepseekV3ForCausalLM, Decoder]:
    reference = theirs(**VARIANTS[request.param])
    reference.save_pretrained(tmp_path)
    return reference, loaded(tmp_path)


def test_logits_are_those_of_transformers(pair: tuple[DeepseekV3ForCausalLM, Decoder]) -> None:
    reference, ours = pair
    id_BN = torch.randint(WORDS, (3, 14))
    with torch.no_grad():
        expected = reference(id_BN).logits

    found, _ = ours.score_next(id_BN)

    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_cached_logits_are_those_of_transformers_cached(pair: tuple[DeepseekV3ForCausalLM, Decoder]) -> None:
    reference, ours = pair
    id_BN = torch.randint(WORDS, (2, 12))
    with torch.no_grad():
        begun = reference(id_BN[:, :5], use_cache=True)
        expected = [begun.logits]
        kept = begun.cache if hasattr(begun, "cache") else begun.past_key_values
        for place in range(5, 12):
            # Their own cached step, not their reading at once.
            expected.append(reference(id_BN[:, place : place + 1], cache=kept, use_cache=True).logits)

    score, caches = ours.score_next(id_BN[:, :5])
    found = [score]
    for place in range(5, 12):
        score, caches = ours.score_next(id_BN[:, place : place + 1], caches=caches)
        found.append(score)

    torch.testing.assert_close(torch.cat(found, dim=1), torch.cat(expected, dim=1), rtol=0, atol=1e-5)


def test_a_cache_remembers_the_latents_alone(pair: tuple[DeepseekV3ForCausalLM, Decoder]) -> None:
    _, ours = pair
    _, caches = ours.score_next(torch.randint(WORDS, (2, 5)))

    assert [tuple(part.shape) for part in caches[0]] == [(2, 5, 16), (2, 5, 8)]


def test_padding_on_either_side_changes_no_logit(pair: tuple[DeepseekV3ForCausalLM, Decoder]) -> None:
    _, ours = pair
    id_BN = torch.randint(WORDS, (2, 9))
    plain, _ = ours.score_next(id_BN)
    padded_BN = torch.cat([torch.full((2, 3), 7), id_BN, torch.full((2, 2), 9)], dim=1)
    mask_BN = torch.tensor([False] * 3 + [True] * 9 + [False] * 2).expand(2, -1)

    found, _ = ours.score_next(padded_BN, mask_BN)

    torch.testing.assert_close(found[:, 3:12], plain, rtol=0, atol=1e-5)


def test_what_is_written_is_read_by_transformers(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = DecoderConfig(query_rank=24, experts=ExpertsConfig(num=4, num_chosen=2, num_groups=2), num_further=1)
    ours = config.build(signature()).eval()
    write_deepseek(ours, tmp_path)

    reference, report = DeepseekV3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)

    assert not report["missing_keys"]
    assert not report["mismatched_keys"]
    id_BN = torch.randint(WORDS, (2, 8))
    with torch.no_grad():
        expected = reference.eval()(id_BN).logits
    torch.testing.assert_close(ours.score_next(id_BN)[0], expected, rtol=0, atol=1e-5)


def test_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    ours = DecoderConfig(query_rank=24).build(signature())
    write_deepseek(ours, tmp_path)

    again = loaded(tmp_path)

    expected = ours.state_dict()
    assert expected.keys() == again.state_dict().keys()
    for name, weight in again.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)


def test_many_files_are_read_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dougong.model.deepseek.FILE_BYTES", 20_000)
    ours = DecoderConfig().build(signature()).eval()
    write_deepseek(ours, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3

    id_BN = torch.randint(WORDS, (2, 8))
    torch.testing.assert_close(loaded(tmp_path).score_next(id_BN)[0], ours.score_next(id_BN)[0], rtol=0, atol=0)
    DeepseekV3ForCausalLM.from_pretrained(tmp_path)


def test_another_architecture_and_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        read_deepseek(tmp_path)
    theirs(q_lora_rank=None).save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"deepseek_v3"', '"llama"'))
    with pytest.raises(ConfigError, match="model_type is 'llama', and deepseek_v3 is read here"):
        read_deepseek(tmp_path)
    (tmp_path / "config.json").write_text(text.replace('"q_lora_rank": null', '"q_lora_rank": 24'))
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.self_attn\.q_a_proj\.weight"):
        read_deepseek(tmp_path)


# Several modalities ------------------------------------------------------------------------------------------


def both() -> Signature:
    return signature(photo=ImageInput(height=16, width=16))


def batch(present: list[bool], *, garbage: float = 0.0, extra: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(len(present), 3, 16, 16, generator=generator)
    present_B = torch.tensor(present)
    pixels[~present_B] = garbage
    index_B = torch.arange(len(present))
    id_BN = torch.randint(4, WORDS, (len(present), 6), generator=generator)
    mask_BN = torch.ones_like(id_BN, dtype=torch.bool)
    mask_BN[0, 4:] = False
    id_BN, mask_BN = (torch.nn.functional.pad(each, (0, extra)) for each in (id_BN, mask_BN))
    every_B = torch.ones_like(present_B)
    return Batch(
        {
            "words": MediaBatch({"ids_UT": id_BN, "mask_UT": mask_BN}, index_B, every_B),
            "photo": MediaBatch({"pixels_UCHW": pixels}, index_B, present_B),
        },
        None,
    )


def loss_of(model: Decoder, given: Batch) -> Tensor:
    output = model(given)
    return output.loss_BN.masked_fill(~output.due_BN, 0.0).sum(dim=1)


@pytest.mark.parametrize("garbage", [7.0, float("inf"), float("nan")])
def test_an_absent_picture_leaves_no_trace(garbage: float) -> None:
    torch.manual_seed(0)
    model = DecoderConfig(num_further=1).build(both())
    found = []
    for value in (0.0, garbage):
        model.zero_grad()
        output = model(batch([True, False, True], garbage=value))
        loss = output.loss_BN.masked_fill(~output.due_BN, 0.0).sum()
        for loss_BN, due_BN in output.further:
            loss = loss + loss_BN.masked_fill(~due_BN, 0.0).sum()
        loss.backward()
        gradient = model.layers[0].attention.out.weight.grad
        assert gradient is not None
        found.append((loss.detach(), gradient.clone()))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_a_record_without_a_picture_is_written_as_by_a_batch_without_any() -> None:
    torch.manual_seed(0)
    model = DecoderConfig().build(both()).eval()
    alone = batch([False, False])
    nobody = alone._replace(
        media={**alone.media, "photo": alone.media["photo"]._replace(values={"pixels_UCHW": torch.zeros(0, 3, 16, 16)})}
    )

    torch.testing.assert_close(loss_of(model, alone), loss_of(model, nobody), rtol=0, atol=1e-5)


def test_padding_changes_no_loss_and_no_load() -> None:
    torch.manual_seed(0)
    model = DecoderConfig().build(both())
    routers = [module for module in model.modules() if isinstance(module, Router)]
    plain = loss_of(model, batch([True, True]))
    loads = [router.load_E.clone() for router in routers]
    model.after_step()

    padded = loss_of(model, batch([True, True], extra=3))

    torch.testing.assert_close(padded, plain, rtol=0, atol=2e-5)
    for router, load_E in zip(routers, loads, strict=True):
        # A padded token is routed somewhere, and is no load there.
        torch.testing.assert_close(router.load_E, load_E, rtol=0, atol=0)
        assert load_E.sum() > 0


def test_each_word_is_scored_before_it_is_seen() -> None:
    torch.manual_seed(0)
    model = DecoderConfig(num_further=2).build(both()).train()
    given = batch([True, True, True])
    changed_id = given.media["words"].values["ids_UT"].clone()
    changed_id[:, 4] = (changed_id[:, 4] + 1) % WORDS
    words = given.media["words"]._replace(values={**given.media["words"].values, "ids_UT": changed_id})
    changed = given._replace(media={**given.media, "words": words})

    before, after = model(given), model(changed)

    torch.testing.assert_close(after.score_BNV[:, :4], before.score_BNV[:, :4], rtol=0, atol=1e-5)
    assert not torch.allclose(after.score_BNV[:, 4], before.score_BNV[:, 4])
    # Word i of the k-th further prediction has seen word i + k, and is of word i + k + 1.
    for place, (first, second) in enumerate(zip(before.further, after.further, strict=True)):
        unseen = 4 - (place + 1) - 1
        torch.testing.assert_close(second[0][:, :unseen], first[0][:, :unseen], rtol=0, atol=1e-5)
        assert first[0].shape == (3, 6 - place - 2) == tuple(first[1].shape)


def test_the_loss_is_that_of_the_next_word() -> None:
    model = DecoderConfig().build(both())
    given = batch([True, True])
    output = model(given)
    id_BN = given.media["words"].values["ids_UT"]
    expected = -output.score_BNV.log_softmax(dim=-1)[1, 2, id_BN[1, 3]]
    torch.testing.assert_close(output.loss_BN[1, 2], expected)
    assert output.due_BN.tolist() == [[True, True, True, False, False], [True] * 5]


def test_writing_with_a_cache_is_reading_what_was_written() -> None:
    torch.manual_seed(0)
    model = DecoderConfig().build(both()).eval()
    given = batch([True, False, True])
    generator = torch.Generator()

    written_BN = model.write(given, most=5, end=2, sampling=GREEDY, generator=generator)

    # Each next word is the likeliest of the whole text read anew.
    id_BN, mask_BN = given.media["words"].values["ids_UT"], given.media["words"].values["mask_UT"]
    for record in range(3):
        begun = id_BN[record][mask_BN[record]]
        for place in range(written_BN.shape[1]):
            whole = torch.cat([begun, written_BN[record, :place]])[None]
            media = {
                "words": MediaBatch(
                    {"ids_UT": whole, "mask_UT": torch.ones_like(whole).bool()},
                    torch.zeros(1, dtype=torch.long),
                    torch.ones(1).bool(),
                ),
                "photo": given.media["photo"]._replace(
                    index_B=torch.tensor([record]), present_B=given.media["photo"].present_B[record : record + 1]
                ),
            }
            score_BNV = model(Batch(media, None)).score_BNV
            assert score_BNV[0, -1].argmax() == written_BN[record, place]
            if written_BN[record, place] == 2:
                break


def test_experts_are_balanced_by_their_loads_alone() -> None:
    torch.manual_seed(0)
    router = Router(width=8, num_experts=4, num_chosen=1, balance_speed=0.05)
    x_ND = torch.randn(256, 8) + 1.0
    router(x_ND)
    first = router.load_E.clone()
    for _ in range(60):
        router.balance()
        router(x_ND)
    assert router.load_E.std() < first.std() / 3
    assert not router.bias_E.requires_grad
    assert router.bias_E.abs().max() > 0

    router.eval()
    kept = router.load_E.clone()
    router(x_ND)
    torch.testing.assert_close(router.load_E, kept, rtol=0, atol=0)


def test_a_mixture_is_the_weighed_sum_of_what_its_experts_say() -> None:
    torch.manual_seed(0)
    layer = (
        DecoderConfig(num_dense=0, experts=ExpertsConfig(num=4, num_chosen=2, num_shared=1, scale=1.5))
        .build(signature())
        .layers[0]
        .feedforward
    )
    assert isinstance(layer, MixtureOfExperts)
    x_BTD = torch.randn(2, 3, 64)

    routed = layer.router(x_BTD.flatten(0, 1))
    for token, x_D in enumerate(x_BTD.flatten(0, 1)):
        expected = layer.shared(x_D)
        for expert, weight in zip(routed.expert_NA[token], routed.weight_NA[token], strict=True):
            gate, wide = layer.experts.widen_E2FD[expert]
            hidden = torch.nn.functional.silu(gate @ x_D) * (wide @ x_D)
            expected = expected + weight * (layer.experts.narrow_EDF[expert] @ hidden)
        torch.testing.assert_close(layer(x_BTD).flatten(0, 1)[token], expected, rtol=1e-4, atol=1e-5)
    assert routed.weight_NA.sum(dim=1).detach().allclose(torch.tensor(1.5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turned_width": 7}, "turned_width=7 is odd"),
        ({"experts": {"num": 6, "num_groups": 4}}, "num_groups=4 cannot share out num=6"),
        ({"experts": {"num": 4, "num_groups": 4}}, "leaves 1 expert to a group"),
        ({"experts": {"num": 4, "num_chosen": 5}}, "num_chosen=5 is more than the 4 experts"),
        ({"experts": {"num": 4, "num_groups": 2, "groups_chosen": 3}}, "groups_chosen=3 is more than"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**changes)


def test_what_is_written_must_be_one_text() -> None:
    with pytest.raises(ConfigError, match="the texts here are words, more"):
        DecoderConfig().build(signature(more=TextInput(vocabulary_size=9, max_tokens=4)))
    with pytest.raises(ConfigError, match="'photo' is no text: the texts here are words"):
        DecoderConfig(writes="photo").build(both())
