import math

import pytest
import torch

from dougong.core.errors import ConfigError
from dougong.core.signature import ImageInput, SignalInput, Signature, Target, TextInput
from dougong.model.bridge import BridgeConfig
from dougong.model.dual import Dual, DualConfig, MineBlock
from dougong.model.encoders.image import ImageEncoderConfig
from dougong.model.encoders.text import TextEncoderConfig
from dougong.model.encoders.vector import VectorEncoderConfig
from dougong.model.heads import COLDEST, LearntTemperature, MatchingHead, PlainHead
from dougong.nn.batch import Batch, MediaBatch

NOTHING = Target(name="", task="regression")
SIGNATURE = Signature(
    inputs={"picture": ImageInput(height=16, width=16), "words": TextInput(vocabulary_size=20, max_tokens=8)},
    target=NOTHING,
)


def dual(bridge: bool = False, **settings: object) -> Dual:
    torch.manual_seed(0)
    config = DualConfig(
        width=16,
        encoders={
            "picture": ImageEncoderConfig(width=16, num_layers=1, num_heads=2, patch_size=8),
            "words": TextEncoderConfig(width=16, num_layers=1, num_heads=2),
        },
        bridge=BridgeConfig(num_heads=2) if bridge else None,
        **settings,  # type: ignore[arg-type]
    )
    return config.build(SIGNATURE)


def batch(num_pictures: int = 5, num_texts: int = 4, num_records: int = 6, *, seed: int = 1) -> Batch:
    random = torch.Generator().manual_seed(seed)
    pixels = torch.randn(num_pictures, 3, 16, 16, generator=random)
    ids = torch.randint(0, 20, (num_texts, 6), generator=random)
    return Batch(
        {
            "picture": MediaBatch(
                {"pixels_UCHW": pixels},
                torch.arange(num_records) % max(1, num_pictures),
                torch.full((num_records,), num_pictures > 0),
            ),
            "words": MediaBatch(
                {"ids_UT": ids, "mask_UT": torch.ones_like(ids, dtype=torch.bool)},
                torch.arange(num_records) % max(1, num_texts),
                torch.full((num_records,), num_texts > 0),
            ),
        },
        None,
    )


def test_a_mediums_vector_depends_on_that_medium_alone() -> None:
    model = dual().eval()
    whole, few = batch(), batch()
    media = few.media["picture"]
    few.media["picture"] = media._replace(
        values={"pixels_UCHW": media.values["pixels_UCHW"][2:3]}, index_B=torch.zeros(6, dtype=torch.long)
    )
    few.media["words"] = batch(num_texts=0).media["words"]

    found, alone = model(whole).vectors, model(few).vectors

    assert set(alone) == {"picture"}
    torch.testing.assert_close(alone["picture"][0], found["picture"][2], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["words"].norm(dim=-1), torch.ones(4))


def test_in_training_each_record_has_two_wrong_pairs_that_are_no_partners() -> None:
    model = dual(bridge=True).train()
    given = batch()
    output = model(given)

    assert output.match_P is not None
    assert output.is_pair_P is not None
    assert output.known_P is not None
    assert output.match_P.shape == (18,)
    assert output.is_pair_P.tolist() == [True] * 6 + [False] * 12
    assert output.known_P.all()
    output.match_P.sum().backward()
    assert all(p.grad is not None for p in model.match.parameters())


def test_mined_pairs_are_wrong() -> None:
    model = dual(bridge=True).train()
    given = batch()
    state = model.embed(given)
    for block in model.blocks:
        state = block(state)
        if type(block).__name__ == "MineBlock":
            break
    left_P, right_P = state.medium["picture"], state.medium["words"]
    pairs = set(zip(given.media["picture"].index_B.tolist(), given.media["words"].index_B.tolist(), strict=True))
    found = list(zip(left_P.tolist(), right_P.tolist(), strict=True))

    assert set(found[:6]) == pairs
    assert pairs.isdisjoint(found[6:])


def test_when_judged_a_record_is_one_pair_and_nothing_is_mined() -> None:
    output = dual(bridge=True).eval()(batch())
    assert output.match_P is not None
    assert output.is_pair_P is not None
    assert output.match_P.shape == (6,)
    assert output.is_pair_P.all()


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_without_one_modality_has_no_pairs_and_still_vectors(training: bool) -> None:
    model = dual(bridge=True).train(training)
    output = model(batch(num_texts=0))
    assert output.match_P is None
    assert set(output.vectors) == {"picture"}


def test_a_batch_of_one_text_has_no_wrong_text_and_says_so() -> None:
    output = dual(bridge=True).train()(batch(num_texts=1))
    assert output.known_P is not None
    assert output.known_P.tolist() == [True] * 6 + [False] * 12


def test_it_is_rebuilt_from_its_own_config() -> None:
    model = dual(bridge=True, pairs=(("words", "picture"),))
    again = model.config.build(SIGNATURE)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again.eval()(batch()).match_P, model.eval()(batch()).match_P)
    assert sorted(model.parts()) == ["picture", "words"]


def test_vectors_of_a_frozen_model_are_read() -> None:
    signature = Signature(
        inputs={
            "picture": SignalInput(num_channels=1, max_samples=12),
            "words": SignalInput(num_channels=1, max_samples=5),
        },
        target=NOTHING,
    )
    encoders = {name: VectorEncoderConfig() for name in signature.inputs}
    model = DualConfig(width=8, encoders=encoders, head="plain").build(signature).eval()
    short = torch.randn(3, 1, 10)
    index = torch.arange(3)
    there = torch.ones(3, dtype=torch.bool)

    def vectors(picture: torch.Tensor) -> torch.Tensor:
        media = {
            "picture": MediaBatch({"samples_UCT": picture}, index, there),
            "words": MediaBatch({"samples_UCT": torch.zeros(3, 1, 5)}, index, there),
        }
        found: torch.Tensor = model(Batch(media, None)).vectors["picture"]
        return found

    filled = torch.cat([short, torch.zeros(3, 1, 2)], dim=2)
    torch.testing.assert_close(vectors(short), vectors(filled))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"pairs": (("picture", "sound"),)},
            "model.pairs names 'sound', which is no modality here. Use two of",
        ),
        ({"encoders": {"sound": TextEncoderConfig()}}, "model.encoders names 'sound'"),
        (
            {"encoders": {"words": VectorEncoderConfig()}},
            "model.encoders.words is for vector, and the column holds",
        ),
    ],
)
def test_what_cannot_be_built_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DualConfig(width=16, **settings).build(SIGNATURE)  # type: ignore[arg-type]


def test_one_modality_is_no_pair() -> None:
    one = Signature(inputs={"words": SIGNATURE.inputs["words"]}, target=NOTHING)
    with pytest.raises(ConfigError, match="there is 1 modality, and a pair needs two"):
        DualConfig(width=16).build(one)
    with pytest.raises(ValueError, match="one modality twice"):
        DualConfig(pairs=(("a", "a"),))


# Heads -----------------------------------------------------------------------------------------------------------


def test_the_temperature_starts_where_it_is_told_and_stays_within_its_limits() -> None:
    head = LearntTemperature(0.07)
    assert head().item() == pytest.approx(0.07)
    with torch.no_grad():
        head.log.fill_(-9.0)
    assert head().item() == pytest.approx(COLDEST)


@pytest.mark.parametrize(("sign", "moves"), [(1.0, False), (-1.0, True)])
def test_beyond_a_limit_only_the_way_back_is_open(sign: float, moves: bool) -> None:
    head = LearntTemperature(0.07)
    with torch.no_grad():
        head.log.fill_(math.log(COLDEST) - 0.1)
    (sign * head()).backward()  # a descent on +temperature would make it colder still
    assert head.log.grad is not None
    assert bool(head.log.grad != 0) is moves


def test_matching_scores_each_pair_by_itself() -> None:
    torch.manual_seed(0)
    head = MatchingHead(8)
    vector_PMD = torch.randn(5, 2, 8)
    torch.testing.assert_close(head(vector_PMD)[2:3], head(vector_PMD[2:3]))


def test_a_plain_head_is_the_mean_of_the_tokens_that_are_there() -> None:
    x_UTD = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [float("nan"), 7.0]]])
    found = PlainHead()(x_UTD, torch.tensor([[True, True, False]]))
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8]]))


def test_records_of_one_key_are_never_mined_as_wrong_pairs() -> None:
    model = dual(bridge=True).train()
    # Two kinds of records: of one kind, every wrong partner is spared; the others are all that is left.
    both = batch(6, 6, 6)._replace(target=torch.tensor([0, 0, 0, 1, 1, 1]))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    mine = next(block for block in model.blocks if isinstance(block, MineBlock))
    mine.register_forward_hook(lambda _, __, state: seen.append((state.medium["picture"], state.medium["words"])))
    for _ in range(10):
        model(both)
    for pictures, words in seen:
        wrong = slice(6, None)
        assert ((pictures[wrong] < 3) != (words[wrong] < 3)).all()

    # Of the second kind pictures alone: with nobody's words beside them, they are of their kind all the same.
    lone_B = torch.tensor([False] * 4 + [True] * 2)
    lacking = both._replace(
        media={**both.media, "words": both.media["words"]._replace(present_B=~lone_B)},
        target=torch.tensor([0, 0, 1, 1, 0, 0]),
    )
    seen.clear()
    for _ in range(10):
        model(lacking)
    for pictures, _ in seen:
        wrong_pictures = pictures[12:][:2]  # of records 0 and 1: never 4 or 5, which are of their kind
        assert not set(wrong_pictures.tolist()) & {0, 1, 4, 5}

    alone = both._replace(target=torch.zeros(6, dtype=torch.int64))
    known_P = model(alone).known_P
    assert known_P is not None
    assert not known_P[6:].any()
