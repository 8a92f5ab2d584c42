"""Why two media of a small model are alike."""

from typing import Any

import pytest
import torch
from photo_and_words import ENCODERS, SIGNATURE, records
from torch import Tensor

from dougong.core.errors import ConfigError
from dougong.model.dual import Dual, DualConfig
from dougong.nn.batch import Batch
from dougong.watch.attention import METHODS, catching, unshared
from dougong.watch.pairs import follow_pair, look_at_pair


def network(**more: Any) -> Dual:
    torch.manual_seed(0)
    config = DualConfig(
        width=16,
        encoders=ENCODERS,
        **more,
    )
    return config.build(SIGNATURE).eval()


KINDS: list[dict[str, Any]] = [{}, {"head": "plain"}, {"bridge": {"kind": "cross", "num_heads": 2}}]


@pytest.mark.parametrize("given", KINDS, ids=str)
def test_the_likeness_is_the_models_own_and_each_sides_map_adds_up(given: dict[str, Any]) -> None:
    model, batch = network(**given), records()

    found = look_at_pair(model, batch, "photo", "words")

    with torch.no_grad():
        vectors = model(batch).vectors
    own = (vectors["photo"][batch.media["photo"].index_B] * vectors["words"][batch.media["words"].index_B]).sum(dim=1)
    torch.testing.assert_close(found.alike_B[:2], own[:2], rtol=1e-4, atol=1e-5)
    assert found.alike_B[2:].tolist() == [0.0, 0.0]  # one of the two lacks
    for method in METHODS:
        maps: dict[str, Tensor] = getattr(found, method)
        assert {name: tuple(each.shape) for name, each in maps.items()} == {"photo": (4, 16), "words": (4, 9)}
        for name, each in maps.items():
            assert bool((each >= 0).all())
            torch.testing.assert_close(each.sum(dim=1), torch.tensor([1.0, 1.0, 0.0, 0.0]), rtol=0, atol=1e-4)
            assert float(each.masked_fill(found.masks[name], 0.0).abs().max()) == 0.0
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_relevance_is_what_was_weighed_of_what_makes_them_alike() -> None:
    model, batch = network(), unshared(records())
    found = look_at_pair(model, batch, "photo", "words")

    with catching(model) as caught:
        vectors = model(batch).vectors
    alike = (vectors["photo"][0] * vectors["words"][0]).sum()
    weights = caught.weights()
    positive = [
        (weight * gradient)[0].clamp(min=0).detach()
        for weight, gradient in zip(weights, torch.autograd.grad(alike, weights), strict=True)
    ]
    photo, words = (each.mean(dim=0) for each in positive[:2])
    encoders = [torch.eye(len(each)) + each / each.sum(dim=1, keepdim=True) for each in (photo, words)]
    patches = encoders[0][1:].view(2, 2, 2, 2, 17).mean(dim=(1, 3)).flatten(0, 1)
    want = {"photo": (positive[2] @ patches)[1:], "words": positive[3] @ encoders[1]}

    for name, each in want.items():
        torch.testing.assert_close(found.relevance[name][0], each / each.sum(), rtol=1e-4, atol=1e-6)


def test_a_map_that_is_right_takes_the_likeness_away_before_chance() -> None:
    """Of words the third alone counts."""
    model, batch = network(), unshared(records())
    real = model.forward

    def only_third(given: Batch) -> Any:
        output = real(given)
        there_U = given.media["words"].values["mask_UT"][:, 2]
        one_UD = torch.zeros_like(output.vectors["words"])
        one_UD[:, 0] = there_U.float()
        photo_UD = torch.zeros_like(output.vectors["photo"])
        photo_UD[:, 0] = 1.0
        return output._replace(vectors={"photo": photo_UD, "words": one_UD})

    found = look_at_pair(model, batch, "photo", "words")
    third = torch.zeros_like(found.relevance["words"])
    third[:, 2] = 1.0
    right = found._replace(relevance={"photo": torch.zeros_like(found.relevance["photo"]), "words": third})
    model.forward = only_third  # type: ignore[method-assign]

    followed = follow_pair(model, batch, right)

    assert followed.deletion.sure_K[0] == 0.5  # of two in four records
    assert followed.deletion.sure_K[1] == 0.0
    assert followed.deletion_gain > 0.5


def test_what_is_no_pair_is_said_in_one_line() -> None:
    model, batch = network(), records()
    with pytest.raises(ConfigError, match="'photo' and 'sound' are no pair of this model. Use two of photo, words"):
        look_at_pair(model, batch, "photo", "sound")
    words = batch.media["words"]
    none = words._replace(
        values={name: each[:0] for name, each in words.values.items()},
        index_B=torch.zeros_like(words.index_B),
        present_B=torch.zeros_like(words.present_B),
    )
    with pytest.raises(ConfigError, match="no record has words, and a pair needs both"):
        look_at_pair(model, Batch({**batch.media, "words": none}, None), "photo", "words")
