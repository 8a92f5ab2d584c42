"""What a record lacks is made from what it has: what is asked, what stands in, and what the truth is."""

from __future__ import annotations

import pytest
import torch

from dougong.core.errors import ConfigError
from dougong.core.signature import SignalInput, Signature, Target
from dougong.model.completion import CompletionConfig, parts
from dougong.model.sandwich import Sandwich, SandwichConfig
from dougong.nn.batch import Batch, MediaBatch

NAMES = ("left", "middle", "right")
SIGNATURE = Signature(
    inputs={name: SignalInput(num_channels=1, max_samples=12) for name in NAMES},
    target=Target(name="answer", task="single_label", labels=("a", "b")),
)


def build(num_tokens: int = 2) -> Sandwich:
    torch.manual_seed(0)
    encoders = {name: {"kind": "signal", "width": 8, "num_heads": 2, "window": 4} for name in NAMES}
    settings = {"width": 8, "bridge": {"num_heads": 2}, "encoders": encoders}
    completion = {"num_tokens": num_tokens, "num_heads": 2}
    return SandwichConfig.model_validate(settings | {"completion": completion}).build(SIGNATURE)


def batch(lacks: dict[str, list[int]], *, beside: bool = False, noise: float = 0.0, spoil: str = "") -> Batch:
    """Four records; `lacks` says which of them lack a modality, whose media are there all the same with `beside`."""
    media = {}
    for place, name in enumerate(NAMES):
        samples_UCT = torch.randn(4, 1, 12, generator=torch.Generator().manual_seed(place))
        present_B = torch.tensor([record not in lacks.get(name, []) for record in range(4)])
        if name == spoil:
            samples_UCT[~present_B] += noise
        values = {"samples_UCT": samples_UCT, "mask_UT": torch.ones(4, 12, dtype=torch.bool)}
        there_B = torch.ones(4, dtype=torch.bool) if beside else present_B
        media[name] = MediaBatch(values, torch.arange(4).masked_fill(~there_B, 0), present_B, there_B)
    return Batch(media, None)


def test_what_was_completed_is_said_counts_in_the_gate_and_is_nothing_else() -> None:
    out = build().eval()(batch({"right": [0, 2], "middle": [2], "left": [3]}))

    assert out.completed_BM.tolist() == [
        [False, False, True],
        [False, False, False],
        [False, True, True],
        [True, False, False],
    ]
    assert (out.weight_BM > 0).all()
    assert out.completed["right"][1].abs().sum() == 0
    assert out.completed["right"][2].abs().sum() > 0
    assert out.completed["right"].shape == (4, 2, 8)
    assert out.truth == {}  # nobody asks for it in use


def test_a_record_that_lacks_nothing_has_the_answer_of_a_model_without_completion() -> None:
    model = build().eval()
    plain = SandwichConfig.model_validate(model.config.model_dump() | {"completion": None}).build(SIGNATURE).eval()
    # Without the two blocks, those that follow have other numbers.
    for ours, theirs in zip(
        [m for m in model.blocks if type(m).__name__ not in ("CompletionBlock", "TruthBlock")],
        plain.blocks,
        strict=True,
    ):
        theirs.load_state_dict(ours.state_dict())
    for part in ("embedders", "norms", "pools", "gate", "decision"):
        getattr(plain, part).load_state_dict(getattr(model, part).state_dict())
    given = batch({"right": [0]})

    found, wanted = model(given), plain(given)

    torch.testing.assert_close(found.output_BC[1:], wanted.output_BC[1:], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found.output_BC[0], wanted.output_BC[0], atol=1e-4)


def test_it_is_made_of_what_the_record_itself_has_and_of_nothing_completed() -> None:
    model = build().eval()
    of_two = model(batch({"right": [0]})).completed["right"][0]
    # Record 0 now lacks the left one too, which is completed as well: the right one must ask the middle one alone.
    left_lacking = model(batch({"right": [0], "left": [0]})).completed["right"][0]
    with torch.no_grad():
        block = next(b for b in model.blocks if type(b).__name__ == "CompletionBlock")
        block.completions["left"].question_KD.add_(1.0)
    left_changed = model(batch({"right": [0], "left": [0]})).completed["right"][0]

    assert not torch.allclose(of_two, left_lacking, atol=1e-4)
    assert torch.equal(left_lacking, left_changed)
    assert torch.equal(of_two, model(batch({"right": [0], "middle": [1, 2]})).completed["right"][0])


def test_records_with_nothing_are_given_nothing_and_gradients_stay_finite() -> None:
    model = build()

    out = model(batch({name: [1, 3] for name in NAMES} | {"left": [0, 1, 3]}))
    (out.output_BC.square().sum() + out.completed["left"].square().sum()).backward()

    assert out.completed_BM.tolist() == [[True, False, False], [False] * 3, [False] * 3, [False] * 3]
    assert torch.equal(out.fused_BD[1], torch.zeros(8))
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    completion = next(b for b in model.blocks if type(b).__name__ == "CompletionBlock").completions["left"]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in completion.parameters())


@pytest.mark.parametrize("noise", [3.0, float("nan")])
def test_what_was_withheld_reaches_the_truth_and_never_the_answer(noise: float) -> None:
    model = build().train()
    clean = model(batch({"right": [0, 2]}, beside=True))
    spoiled = model(batch({"right": [0, 2]}, beside=True, noise=noise, spoil="right"))

    torch.testing.assert_close(spoiled.output_BC, clean.output_BC, rtol=0, atol=0)
    torch.testing.assert_close(spoiled.completed["right"], clean.completed["right"], rtol=0, atol=0)
    assert not torch.equal(spoiled.truth["right"][0], clean.truth["right"][0])
    assert torch.equal(spoiled.truth["right"][1], clean.truth["right"][1])
    assert not clean.truth["right"].requires_grad


def test_the_mark_is_all_that_tells_what_stands_in_from_what_was_made() -> None:
    model = build().eval()
    block = next(b for b in model.blocks if type(b).__name__ == "CompletionBlock")
    with torch.no_grad():
        block.completions["right"].mark_D.fill_(5.0)
    state = model.embed(batch({"right": [0, 1, 2, 3]}))
    for one in model.blocks:
        state = one(state)
        if one is block:
            torch.testing.assert_close(state.tokens["right"], state.completed["right"] + 5.0)
            assert state.masks["right"].all()


@pytest.mark.parametrize(("num_tokens", "longest"), [(2, 3), (5, 5)])
def test_few_or_many_tokens_stand_in_beside_those_of_other_records(num_tokens: int, longest: int) -> None:
    model = build(num_tokens).eval()
    state = model.embed(batch({"right": [0]}))
    for one in model.blocks:
        state = one(state)

    assert state.masks["right"].sum(dim=1).tolist() == [num_tokens, 3, 3, 3]
    assert state.tokens["right"].shape == (4, longest, 8)


def test_parts_are_means_of_a_medium_s_tokens_in_a_row() -> None:
    x_UTD = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0])[None, :, None].repeat(4, 1, 2)
    mask_UT = torch.arange(5) < torch.tensor([5, 4, 1, 0])[:, None]
    x_UTD[~mask_UT] = float("nan")

    found = parts(x_UTD, mask_UT, 2)[..., 0]

    # Of five, the middle one stands in both halves; of one, it is both.
    assert found.tolist() == [[3.0, 7.0], [2.0, 6.0], [1.0, 1.0], [0.0, 0.0]]
    assert parts(x_UTD, mask_UT, 1)[..., 0].tolist() == [[5.0], [4.0], [1.0], [0.0]]


def test_settings_that_cannot_take_effect_are_refused() -> None:
    with pytest.raises(ValueError, match="completion cannot take effect with fusion=late"):
        SandwichConfig(fusion="late", completion=CompletionConfig())
    with pytest.raises(
        ValueError, match=r"completion.num_heads=3 cannot share out width=64: .* Use completion.num_heads in \[1, 2"
    ):
        SandwichConfig(completion=CompletionConfig(num_heads=3))
    alone = SIGNATURE.model_copy(update={"inputs": {"left": SIGNATURE.inputs["left"]}})
    with pytest.raises(ConfigError, match="model.completion has nothing to complete 'left' from"):
        SandwichConfig(completion=CompletionConfig()).build(alone)
