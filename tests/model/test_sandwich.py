"""The whole model: absent modalities, shared media, and the ways in which its parts are put together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dougong.core.errors import ConfigError
from dougong.core.signature import (
    AudioInput,
    ImageInput,
    SignalInput,
    Signature,
    TableInput,
    Target,
    TextInput,
    VolumeInput,
)
from dougong.model.evidence import conflict
from dougong.model.sandwich import Sandwich, SandwichConfig
from dougong.nn.batch import Batch, MediaBatch

SIGNATURE = Signature(
    inputs={
        "text": TextInput(vocabulary_size=20, max_tokens=6),
        "image": ImageInput(height=16, width=16),
        "sound": AudioInput(sample_rate=8000, max_samples=4000),
        "facts": TableInput(num_numbers=2, category_sizes=(3,)),
        "pulse": SignalInput(num_channels=2, max_samples=20),
    },
    target=Target(name="answer", task="single_label", labels=("a", "b", "c")),
)
FUSIONS: list[dict[str, Any]] = [
    {},
    {"bridge": {"kind": "merged", "num_heads": 2}},
    {"completion": {"num_tokens": 2}},
    {"bridge": {"kind": "bottleneck", "num_heads": 2, "num_blocks": 2}},
    {"fusion": "late"},
    {"own_heads": "taught"},
    {"completion": {"num_tokens": 2}, "decide": "mean"},
    {"fusion": "late", "own_heads": "watching"},
    {"decide": "evidence"},
    {"decide": "gated"},
    {"decide": "weighed"},
    {"fusion": "late", "decide": "evidence", "evidence_rule": "average"},
    {"fusion": "late", "decide": "confidence"},
    {"fusion": "late", "decide": "mean"},
]


def build(settings: dict[str, Any], signature: Signature = SIGNATURE, seed: int = 0) -> Sandwich:
    torch.manual_seed(seed)
    return SandwichConfig.model_validate({"width": 16} | settings).build(signature)


def media(num_media: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    length_U = torch.arange(num_media) % 5 + 2
    return {
        "text": {
            "ids_UT": torch.randint(1, 20, (num_media, 6), generator=generator),
            "mask_UT": torch.arange(6) < length_U[:, None],
        },
        "image": {"pixels_UCHW": torch.randn(num_media, 3, 16, 16, generator=generator)},
        "sound": {
            "samples_UT": torch.randn(num_media, 4000, generator=generator),
            "mask_UT": torch.ones(num_media, 4000, dtype=torch.bool),
        },
        "facts": {
            "numbers_UN": torch.randn(num_media, 2, generator=generator),
            "known_UN": torch.ones(num_media, 2, dtype=torch.bool),
            "categories_UK": torch.randint(0, 3, (num_media, 1), generator=generator),
        },
        "pulse": {
            "samples_UCT": torch.randn(num_media, 2, 20, generator=generator),
            "mask_UT": torch.arange(20) < 4 * length_U[:, None],
        },
    }


def batch(present: dict[str, list[bool]], *, num_media: int = 3) -> Batch:
    """Three records, each with its own media, of which `present` takes some away."""
    parts = {}
    for name, values in media(num_media).items():
        present_B = torch.tensor(present.get(name, [True] * 3))
        parts[name] = MediaBatch(values, torch.arange(3).masked_fill(~present_B, 0), present_B)
    return Batch(parts, None)


def without(whole: Batch, name: str) -> Batch:
    """As the loader writes a modality that no record has: not even one medium."""
    values = {key: value[:0] for key, value in whole.media[name].values.items()}
    nothing = MediaBatch(values, torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.bool))
    return whole._replace(media=whole.media | {name: nothing})


def finite_gradients(model: Sandwich) -> bool:
    return all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("settings", FUSIONS)
@pytest.mark.parametrize("name", list(SIGNATURE.inputs))
def test_what_a_record_lacks_changes_nothing_of_its_answer(settings: dict[str, Any], name: str) -> None:
    model = build(settings).eval()
    whole = batch({name: [True, False, True]})
    other = {key: value.roll(1, dims=0) for key, value in whole.media[name].values.items()}
    changed = whole._replace(media=whole.media | {name: whole.media[name]._replace(values=other)})

    before, after = model(whole).output_BC, model(changed).output_BC

    torch.testing.assert_close(after[1], before[1], rtol=0, atol=1e-6)
    assert not torch.allclose(after[0], before[0], atol=1e-4)


@pytest.mark.parametrize("settings", FUSIONS)
@pytest.mark.parametrize("name", list(SIGNATURE.inputs))
def test_a_modality_that_the_whole_batch_lacks_is_as_if_each_record_lacked_it(
    settings: dict[str, Any], name: str
) -> None:
    model = build(settings).eval()
    each = batch({name: [False] * 3})

    out = model(without(each, name))

    torch.testing.assert_close(out.output_BC, model(each).output_BC, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", FUSIONS)
def test_a_record_with_nothing_has_an_answer_and_finite_gradients(settings: dict[str, Any]) -> None:
    model = build(settings)

    out = model(batch({name: [True, False, True] for name in SIGNATURE.inputs}))
    out.output_BC.square().sum().backward()

    assert out.output_BC.isfinite().all()
    assert torch.equal(out.fused_BD[1], torch.zeros_like(out.fused_BD[1]))
    assert finite_gradients(model)


@pytest.mark.parametrize("settings", FUSIONS)
def test_a_batch_with_nothing_at_all_has_an_answer(settings: dict[str, Any]) -> None:
    model = build(settings)
    nothing = batch({})
    for name in SIGNATURE.inputs:
        nothing = without(nothing, name)

    model(nothing).output_BC.sum().backward()

    assert finite_gradients(model)


@pytest.mark.parametrize("settings", FUSIONS)
def test_shared_media_give_the_answers_and_gradients_of_unshared_ones(settings: dict[str, Any]) -> None:
    index_B = torch.tensor([0, 1, 0, 1, 1])
    every_B = torch.ones(5, dtype=torch.bool)
    values = media(2)
    shared = Batch({name: MediaBatch(values[name], index_B, every_B) for name in values}, None)
    apart = {name: {key: value[index_B] for key, value in values[name].items()} for name in values}
    unshared = Batch({name: MediaBatch(apart[name], torch.arange(5), every_B) for name in apart}, None)
    answers, gradients = [], []

    for one in (shared, unshared):
        model = build(settings)
        out = model(one).output_BC
        out.square().sum().backward()
        answers.append(out)
        gradients.append([p.grad for p in model.parameters()])

    torch.testing.assert_close(answers[0], answers[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("settings", FUSIONS)
def test_the_model_is_its_parts_in_a_row(settings: dict[str, Any]) -> None:
    model, whole = build(settings).eval(), batch({"image": [True, False, True]})

    state = model.embed(whole)
    for block in model.blocks:
        state = block(state)

    assert torch.equal(model.head(state).output_BC, model(whole).output_BC)


@pytest.mark.parametrize("settings", FUSIONS)
def test_every_weight_learns_from_a_whole_batch(settings: dict[str, Any]) -> None:
    model = build(settings)

    output = model(batch({}))
    own = output.output_BC.sum() * 0 if output.own_BMC is None else output.own_BMC.square().sum()
    (output.output_BC.square().sum() + own).backward()

    # Where nothing is missing, there is nothing to complete.
    idle = [name for name, p in model.named_parameters() if p.grad is None and "completions" not in name]
    assert idle == []
    assert finite_gradients(model)


@pytest.mark.parametrize("settings", FUSIONS)
def test_one_seed_makes_one_model(settings: dict[str, Any]) -> None:
    whole = batch({})
    assert torch.equal(build(settings)(whole).output_BC, build(settings)(whole).output_BC)
    assert not torch.equal(build(settings)(whole).output_BC, build(settings, seed=1)(whole).output_BC)


@pytest.mark.parametrize("name", list(SIGNATURE.inputs))
def test_one_modality_alone_is_a_model_too(name: str) -> None:
    alone = SIGNATURE.model_copy(update={"inputs": {name: SIGNATURE.inputs[name]}})

    assert build({}, alone)(batch({})).output_BC.shape == (3, 3)


@pytest.mark.parametrize("settings", FUSIONS[:2])
def test_an_explanation_is_of_the_same_answer_and_says_where_each_token_looked(settings: dict[str, Any]) -> None:
    model, whole = build(settings).eval(), batch({"image": [True, False, True]})

    explained = model.explain(whole)

    torch.testing.assert_close(explained.output.output_BC, model(whole).output_BC, rtol=1e-5, atol=1e-5)
    looked = explained.looked[0]["text"]
    torch.testing.assert_close(looked.weight_BHTS.sum(dim=-1)[0], torch.ones_like(looked.weight_BHTS[0, ..., 0]))
    start = 0
    for name, count in looked.keys:
        if name == "image":
            seen_B = looked.weight_BHTS[..., start : start + count].sum(dim=(1, 2, 3))
            assert (seen_B > 0).tolist() == [True, False, True]
        start += count
    rows, columns = explained.grids["image"]
    assert explained.pooled["image"].shape == (3, rows * columns)


def test_settings_of_a_model_build_it_again() -> None:
    model = build({"encoders": {"image": {"kind": "image", "width": 8, "num_heads": 2, "patch_size": 4}}}).eval()

    again = SandwichConfig.model_validate_json(model.config.model_dump_json()).build(SIGNATURE).eval()
    again.load_state_dict(model.state_dict())

    assert torch.equal(again(batch({})).output_BC, model(batch({})).output_BC)


def test_an_encoder_for_a_modality_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"'video', which is no modality here\. Use some of text, image, sound, facts, pulse"
    ):
        build({"encoders": {"video": {"kind": "image"}}})


def test_a_kind_without_an_encoder_is_refused() -> None:
    volume = SIGNATURE.model_copy(update={"inputs": {"scan": VolumeInput(depth=4, height=4, width=4)}})
    with pytest.raises(ConfigError, match=r"'scan' is a volume, which has no encoder yet\. Leave it out"):
        build({}, volume)


@pytest.mark.parametrize("fusion", ["bridge", "late"])
def test_aligned_modalities_give_vectors_that_see_nothing_of_each_other(fusion: str) -> None:
    model = build({"align": ["text", "sound"], "fusion": fusion}).train()
    whole = model(batch({}))
    other = batch({})
    noise = torch.randn_like(other.media["sound"].values["samples_UT"])
    other.media["sound"].values["samples_UT"].copy_(noise)

    heard = model(other)

    torch.testing.assert_close(heard.aligned["text"], whole.aligned["text"], rtol=0, atol=0)
    assert not torch.allclose(heard.aligned["sound"], whole.aligned["sound"])
    torch.testing.assert_close(whole.aligned["sound"].norm(dim=-1), torch.ones(3))


def test_only_training_is_asked_for_aligned_vectors() -> None:
    model = build({"align": ["text", "sound"]})
    assert set(model.train()(batch({})).aligned) == {"text", "sound"}
    assert set(model(batch({"sound": [False] * 3})).aligned) == {"text", "sound"}
    assert model.eval()(batch({})).aligned == {}


def test_a_pair_to_align_is_two_modalities_that_are_there() -> None:
    with pytest.raises(ValueError, match="must name two modalities, or none"):
        SandwichConfig(align=("text",))
    with pytest.raises(ConfigError, match="model.align names 'smell', which is no modality here. Use some of text"):
        build({"align": ["text", "smell"]})


def test_heads_that_cannot_share_out_the_width_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"bridge.num_heads=3 cannot share out width=16: .* Use bridge.num_heads in \[1, 2, 4"
    ):
        build({"bridge": {"num_heads": 3}})


def test_one_modality_alone_has_nobody_to_ask_and_no_weights_for_it() -> None:
    alone = Signature(inputs={"text": SIGNATURE.inputs["text"]}, target=SIGNATURE.target)
    model = build({}, alone)
    text = batch({}).media["text"]

    model(Batch({"text": text}, None)).output_BC.sum().backward()

    idle = [name for name, p in model.named_parameters() if p.grad is None]
    assert idle == []


@pytest.mark.parametrize(
    ("size", "patch"), [((64, 64), 8), ((50, 50), 10), ((48, 36), 6), ((20, 24), 4), ((53, 53), 53)]
)
def test_an_image_of_any_size_gets_patches_that_share_it_out(size: tuple[int, int], patch: int) -> None:
    signature = Signature(inputs={"image": ImageInput(height=size[0], width=size[1])}, target=SIGNATURE.target)
    model = build({}, signature)
    pixels = {"pixels_UCHW": torch.randn(2, 3, *size)}

    output = model(Batch({"image": MediaBatch(pixels, torch.arange(2), torch.ones(2, dtype=torch.bool))}, None))

    assert output.output_BC.shape == (2, 3)
    assert model.grids["image"] == (size[0] // patch, size[1] // patch)


@pytest.mark.parametrize("fusion", ["bridge", "late"])
def test_what_is_encoded_for_the_loss_alone_leaves_no_trace_in_the_answer(fusion: str) -> None:
    model = build({"align": ["text", "sound"], "fusion": fusion}).train()
    hidden = batch({"sound": [False] * 3})
    sound = hidden.media["sound"]
    beside = hidden.media | {"sound": sound._replace(index_B=torch.arange(3), there_B=torch.ones(3, dtype=torch.bool))}
    without = hidden.media | {"sound": MediaBatch({k: v[:0] for k, v in sound.values.items()}, *sound[1:])}

    found, plain = model(Batch(beside, None)), model(Batch(without, None))

    torch.testing.assert_close(found.output_BC, plain.output_BC)
    assert set(found.aligned) == {"text", "sound"}
    assert set(plain.aligned) == {"text"}


def test_every_encoder_is_a_part_by_its_modality() -> None:
    parts = build({}).parts()
    assert set(parts) == set(SIGNATURE.inputs)
    assert len({id(p) for part in parts.values() for p in part}) == sum(map(len, parts.values()))


def test_watching_heads_teach_no_encoder() -> None:
    model = build({"fusion": "late", "own_heads": "watching"})
    output = model(batch({}))
    assert output.own_BMC is not None
    output.own_BMC.square().sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert reached
    assert all(".decision." in name or ".pool." in name or ".norm." in name for name in reached)


def test_evidence_of_a_record_that_lacks_all_is_vacuous_and_of_one_voter_its_own() -> None:
    model = build({"fusion": "late", "decide": "evidence"}).eval()
    lacking = {name: [True, False, name == "text"] for name in SIGNATURE.inputs}
    output = model(batch(lacking))
    assert output.opinion is not None
    assert output.conflict_B is not None
    assert output.conflict_B[1] == output.conflict_B[2] == 0.0 < output.conflict_B[0]
    assert output.opinion.vacuity_B[0] < output.opinion.vacuity_B[2] < 0.95 < output.opinion.vacuity_B[1]


def test_a_decision_that_weighs_classes_needs_classes() -> None:
    number = SIGNATURE.model_copy(update={"target": Target(name="price", task="regression")})
    with pytest.raises(ConfigError, match="decide=evidence weighs classes, and the target is regression. Use mean"):
        build({"decide": "evidence"}, number)
    assert build({"decide": "mean"}, number)(batch({})).output_BC.shape == (3, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decide": "mean", "own_heads": "taught"}, "own_heads=taught cannot take effect beside decide=mean"),
        ({"evidence_rule": "average"}, "decide=fused makes none. Use decide: evidence"),
        ({"gate_quality": True, "fusion": "late"}, "fusion=late has none. Use fusion: bridge"),
        ({"decide": "gated", "fusion": "late"}, "counts votes by the gate, and fusion=late has none. Use decide: mean"),
    ],
)
def test_settings_that_cannot_take_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SandwichConfig.model_validate(settings)


def test_a_gate_that_reads_quality_needs_some() -> None:
    with pytest.raises(ConfigError, match="no input measures its quality"):
        build({"gate_quality": True})
    measured = SIGNATURE.model_copy(
        update={"inputs": {n: i.model_copy(update={"quality": ("sharp", "loud")}) for n, i in SIGNATURE.inputs.items()}}
    )
    model = build({"gate_quality": True}, measured)
    for scorer in model.gate.quality:
        torch.nn.init.normal_(scorer.narrow.weight)
    whole = batch({})
    plain = model(whole).weight_BM
    worse = whole.media["image"]._replace(quality_UQ=torch.tensor([[0.0, 9.0]] * 3))
    told = model(whole._replace(media=whole.media | {"image": worse})).weight_BM
    assert plain is not None
    assert told is not None
    assert not torch.allclose(plain, told)


def test_witnesses_who_know_nothing_are_in_no_conflict() -> None:
    model = build({"fusion": "late", "decide": "evidence"}).eval()
    own_BMC = torch.tensor([[[-4.0, -12.0, -12.0], [-12.0, -4.0, -12.0]]])
    assert float(conflict(model._own_probabilities(own_BMC), torch.tensor([[True, True]]))) < 0.01
    sure_BMC = torch.tensor([[[40.0, -12.0, -12.0], [-12.0, 40.0, -12.0]]])
    assert float(conflict(model._own_probabilities(sure_BMC), torch.tensor([[True, True]]))) > 0.9


def test_the_bridge_has_a_voice_only_where_it_has_two_to_bridge() -> None:
    model = build({"decide": "mean"}).eval()
    whole = batch({})
    first = next(iter(whole.media))
    bare = {name: one._replace(present_B=torch.zeros_like(one.present_B)) for name, one in whole.media.items()}
    with torch.inference_mode():
        together = model(whole)
        alone = model(whole._replace(media=bare | {first: whole.media[first]}))
        nothing = model(whole._replace(media=bare))
    assert together.ballot is not None
    assert alone.ballot is not None
    assert alone.own_BMC is not None
    assert nothing.ballot is not None
    has_two_B = torch.stack([one.present_B for one in whole.media.values()]).sum(dim=0) > 1
    has_B = whole.media[first].present_B
    assert has_two_B.any()
    assert has_B.any()
    assert together.ballot.present_BV[has_two_B, -1].all()
    assert not alone.ballot.present_BV[has_B, -1].any()
    torch.testing.assert_close(alone.output_BC[has_B], alone.own_BMC[has_B, 0])
    assert nothing.ballot.present_BV[:, -1].all()  # somebody must answer
