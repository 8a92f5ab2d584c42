from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from dougong.core.errors import ConfigError, DataError
from dougong.core.signature import Target
from dougong.data.columns import ColumnRole
from dougong.data.preparation import PreparationConfig, fit_preparation
from dougong.data.table import table_of_rows
from dougong.engine.contribution import (
    ABSENT,
    ModalityShapley,
    Probe,
    Removals,
    additive_projection,
    modality_shapley,
    perceptual_scores,
    recombine,
    removals,
    shapley_values,
    token_shares,
)
from dougong.nn.batch import Batch, MediaBatch
from dougong.nn.block_stack import BlockStack

Sets = npt.NDArray[np.bool_]
TWO = {"": 0.0, "a": 1.0, "b": 2.0, "ab": 4.0}
THREE = {"": 0.1, "a": 0.5, "b": 0.3, "c": 0.1, "ab": 0.7, "ac": 0.6, "bc": 0.3, "abc": 0.9}


def game(table: dict[str, float], asked: list[str] | None = None) -> Callable[[Sets], npt.NDArray[np.float64]]:
    def score(sets_KP: Sets) -> npt.NDArray[np.float64]:
        names = ["".join(name for name, there in zip("abc", row, strict=False) if there) for row in sets_KP]
        if asked is not None:
            asked.extend(names)
        return np.array([table[name] for name in names])

    return score


# Shapley values ------------------------------------------------------------------------------------------------------


def test_two_players_share_as_worked_out_by_hand() -> None:
    # a adds 1 when it comes first and 4 - 2 when it comes last; b adds 2 and 4 - 1.
    assert shapley_values(game(TWO), 2).tolist() == [1.5, 2.5]


def test_three_players_share_as_worked_out_by_hand() -> None:
    # a: first .4 (weight 1/3), after b .4 and after c .5 (1/6 each), last .6 (1/3); and so on.
    np.testing.assert_allclose(shapley_values(game(THREE), 3), [29 / 60, 14 / 60, 5 / 60], atol=1e-12)


def test_one_order_and_its_reverse_are_all_orders_of_two() -> None:
    assert shapley_values(game(TWO), 2, num_permutations=1).tolist() == [1.5, 2.5]


@pytest.mark.parametrize("seed", [0, 1])
def test_drawn_orders_add_up_exactly_and_come_near(seed: int) -> None:
    few = shapley_values(game(THREE), 3, num_permutations=1, seed=seed)
    many = shapley_values(game(THREE), 3, num_permutations=2000, seed=seed)

    assert few.sum() == pytest.approx(0.8, abs=1e-12)
    np.testing.assert_allclose(many, [29 / 60, 14 / 60, 5 / 60], atol=0.01)


@pytest.mark.parametrize("num_permutations", [None, 50])
def test_no_set_is_asked_for_twice(num_permutations: int | None) -> None:
    asked: list[str] = []
    shapley_values(game(THREE, asked), 3, num_permutations=num_permutations)
    assert sorted(asked) == sorted(THREE)


def test_the_same_seed_draws_the_same_orders() -> None:
    def score(sets_KP: Sets) -> npt.NDArray[np.float64]:
        return np.sin((sets_KP * np.arange(1, 21)).sum(axis=1))

    first, again, other = (shapley_values(score, 20, num_permutations=3, seed=seed) for seed in (4, 4, 5))
    assert first.tolist() == again.tolist() != other.tolist()


def test_too_many_players_for_all_sets_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"13 players have 2\^13 sets, too many to ask for. Give num_permutations."):
        shapley_values(game(TWO), 13)
    with pytest.raises(ConfigError, match="num_permutations 0 must be at least 1"):
        shapley_values(game(TWO), 2, num_permutations=0)


def test_shares_count_harm_as_nothing() -> None:
    def found(**value: float) -> dict[str, float]:
        return ModalityShapley(value, 1.0, 0.0, {}).share

    assert found(a=0.6, b=0.2, c=-0.1) == pytest.approx({"a": 0.75, "b": 0.25, "c": 0.0})
    assert found(a=0.0, b=-0.5) == {"a": 0.5, "b": 0.5}


# Models with a known answer ------------------------------------------------------------------------------------------


def function(parts: list[Tensor], mix: Callable[..., Tensor]) -> Callable[[npt.NDArray[np.int64]], Tensor]:
    """A model that mixes one vector of each modality; an absent one's is 0."""

    def answer(source_RM: npt.NDArray[np.int64]) -> Tensor:
        source = torch.from_numpy(source_RM)
        taken = [part[source[:, m].clamp(min=0)] * (source[:, m] != ABSENT)[:, None] for m, part in enumerate(parts)]
        return mix(*taken)

    return answer


def accuracy(target_B: Tensor) -> Callable[[Tensor], float]:
    return lambda output_BC: (output_BC.argmax(dim=1) == target_B[: len(output_BC)]).double().mean().item()


def test_a_modality_that_is_ignored_has_exactly_nothing() -> None:
    random = torch.Generator().manual_seed(0)
    parts = [torch.randn(60, 3, generator=random) for _ in range(3)]
    answer = function(parts, lambda a, b, c: torch.sin(3 * a) + a * c)
    score = accuracy((parts[0] + 0.3 * parts[2]).argmax(dim=1))

    shapley = modality_shapley(answer, score, ["a", "b", "c"], 60)
    permuted = perceptual_scores(answer, score, ["a", "b", "c"], np.ones((60, 3), np.bool_), commonest=0.5)

    assert shapley.value["b"] == 0.0
    assert permuted["b"] == (0.0, 0.0, 0.0)
    assert shapley.value["a"] > 0.05
    assert permuted["a"].drop > 0.05
    assert sum(shapley.value.values()) == pytest.approx(shapley.with_all - shapley.with_none, abs=1e-12)
    assert shapley.with_none == score(torch.zeros(60, 3))
    assert set(shapley.sets) == {(), ("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")}


def test_what_is_lost_without_each_is_a_part_of_what_was_learnt() -> None:
    parts = [torch.eye(3)[torch.arange(60) % 3], torch.randn(60, 3, generator=torch.Generator().manual_seed(0))]
    answer = function(parts, lambda a, b: 3 * a + 0.1 * b * a)

    found = removals(answer, accuracy(torch.arange(60) % 3), ["a", "b"], 60)

    assert found == (1.0, pytest.approx(1 / 3), {"a": pytest.approx(1 / 3), "b": 1.0})
    assert found.reliance == pytest.approx({"a": 1.0, "b": 0.0})
    assert Removals(0.9, 0.1, {"a": 0.5, "b": 0.95, "c": 0.0}).reliance == pytest.approx({"a": 0.5, "b": 0, "c": 1})
    assert Removals(0.2, 0.3, {"a": 0.1}).reliance == {"a": 0.0}


def test_a_perceptual_score_is_normalised_by_the_model_and_by_the_task() -> None:
    own = np.arange(40)

    def answer(source_RM: npt.NDArray[np.int64]) -> Tensor:
        return torch.tensor([[0.8 if (source_RM[:, 0] == own).all() else 0.5]])

    found = perceptual_scores(
        answer, lambda output_BC: float(output_BC[0, 0].double()), ["a"], np.ones((40, 1), np.bool_), commonest=0.4
    )

    assert found["a"] == pytest.approx((0.3, 0.3 / 0.8, 0.3 / 0.6), abs=1e-6)
    unknown = perceptual_scores(answer, lambda output_BC: -1.0, ["a"], np.ones((40, 1), np.bool_))
    assert unknown["a"] == (0.0, None, None)


def test_a_modality_is_permuted_among_those_that_have_it() -> None:
    present_BM = np.random.default_rng(0).random((30, 2)) < 0.6
    asked: list[npt.NDArray[np.int64]] = []

    def answer(source_RM: npt.NDArray[np.int64]) -> Tensor:
        asked.append(source_RM)
        return torch.zeros(len(source_RM), 1)

    perceptual_scores(answer, lambda output_BC: 1.0, ["a", "b"], present_BM, num_permutations=2)

    assert len(asked) == 5
    for source_BM in asked:
        assert ((source_BM != ABSENT) == present_BM).all()
        for m in range(2):
            having = np.flatnonzero(present_BM[:, m])
            assert sorted(source_BM[having, m]) == having.tolist()
    own = np.where(present_BM, np.arange(30)[:, None], ABSENT)
    assert [(source_BM[:, 0] != own[:, 0]).any() for source_BM in asked] == [False, True, True, False, False]
    assert [(source_BM[:, 1] != own[:, 1]).any() for source_BM in asked] == [False, False, False, True, True]


@pytest.mark.parametrize(
    ("num_modalities", "num_records", "usable"), [(2, 30, 30), (3, 30, 29), (4, 29, 29), (4, 36, 35)]
)
def test_an_additive_model_is_its_own_projection(num_modalities: int, num_records: int, usable: int) -> None:
    random = torch.Generator().manual_seed(1)
    parts = [torch.randn(num_records, 5, generator=random) for _ in range(num_modalities)]
    answer = function(parts, lambda *taken: torch.stack([torch.tanh(x) * (m + 1) for m, x in enumerate(taken)]).sum(0))

    found = additive_projection(answer, num_records, num_modalities)

    assert len(found.output_BC) == usable
    torch.testing.assert_close(found.output_BC, found.original_BC, atol=1e-6, rtol=0)
    own = np.arange(usable)[:, None].repeat(num_modalities, axis=1)
    torch.testing.assert_close(found.original_BC, answer(own).double(), atol=1e-6, rtol=0)


def test_the_projection_of_xor_is_a_guess() -> None:
    bits = torch.arange(60) % 4
    a, b = (bits // 2)[:, None].double(), (bits % 2)[:, None].double()
    answer = function([2 * a - 1, 2 * b - 1], lambda x, y: torch.cat([x * y, -x * y], dim=1))
    score = accuracy((a != b)[:, 0].long())

    found = additive_projection(answer, 60, 2)

    assert score(found.original_BC) == 1.0
    assert score(found.output_BC) == 0.5


def test_two_modalities_are_projected_by_the_papers_formula() -> None:
    random = torch.Generator().manual_seed(2)
    parts = [torch.randn(7, 2, generator=random, dtype=torch.float64) for _ in range(2)]
    answer = function(parts, lambda a, b: torch.sin(2 * a * b) + a)

    found = additive_projection(answer, 7, 2)

    all_IJC = torch.stack([answer(np.stack([np.full(7, i), np.arange(7)], axis=1)) for i in range(7)])
    means_BC = all_IJC.mean(dim=1) + all_IJC.mean(dim=0) - all_IJC.mean(dim=(0, 1))
    torch.testing.assert_close(found.output_BC, means_BC)
    assert not torch.allclose(found.output_BC, found.original_BC, atol=0.1)


def test_what_cannot_be_projected_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs two modalities"):
        additive_projection(lambda source_RM: torch.zeros(len(source_RM), 1), 30, 1)
    with pytest.raises(ConfigError, match="1 records are too few to recombine"):
        additive_projection(lambda source_RM: torch.zeros(len(source_RM), 1), 1, 2)


@pytest.mark.parametrize("num_tokens", [3, 30])
def test_tokens_of_a_linear_answer_share_by_their_weights(num_tokens: int) -> None:
    weight_T = np.linspace(-1.0, 2.0, num_tokens)
    owner_T = ["text" if t % 3 == 0 else "image" for t in range(num_tokens)]

    found = token_shares(lambda sets_KT: sets_KT @ weight_T + 5.0, owner_T, ["text", "image", "sound"])

    text = np.abs(weight_T[::3]).sum() / np.abs(weight_T).sum()
    assert found == pytest.approx({"text": text, "image": 1 - text, "sound": 0.0})


def test_tokens_that_move_nothing_have_no_share() -> None:
    found = token_shares(lambda sets_KT: np.full(len(sets_KT), 3.0), ["a", "b"], ["a", "b"])
    assert found == {"a": 0.0, "b": 0.0}


# Any model as a function ---------------------------------------------------------------------------------------------


class Output(NamedTuple):
    output_BC: Tensor


class TwoInputs(BlockStack[Tensor, Output]):
    """x of 4 media that records share, y of one each; dropout would show training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Dropout(0.5)])
        self.factor = nn.Parameter(torch.ones(()))
        self.media_met: list[int] = []

    def embed(self, batch: Batch) -> Tensor:
        total = torch.zeros(batch.num_records, 3)
        for media in batch.media.values():
            value_UC = media.values["v"]
            self.media_met.append(len(value_UC))
            if len(value_UC):
                total = total + value_UC[media.index_B] * media.present_B[:, None] * self.factor
        return total

    def head(self, state: Tensor) -> Output:
        return Output(state)


def shared_batch() -> Batch:
    random = torch.Generator().manual_seed(3)
    x = MediaBatch(
        {"v": torch.randn(4, 3, generator=random)},
        torch.arange(12) % 4,
        torch.arange(12) != 5,
        quality_UQ=torch.tensor([[0.2], [0.4], [0.6], [0.8]]),
    )
    y = MediaBatch({"v": torch.randn(12, 3, generator=random)}, torch.arange(12), torch.ones(12, dtype=torch.bool))
    return Batch({"x": x, "y": y}, torch.arange(12) % 3)


TARGET = Target(name="kind", task="single_label", labels=("a", "b", "c"))


def test_recombined_records_hold_what_was_asked_for() -> None:
    batch = shared_batch()
    source_RM = np.array([[0, 3], [5, 3], [ABSENT, 1], [9, ABSENT]])

    got = recombine(batch, source_RM)

    assert got.media["x"].present_B.tolist() == [True, False, False, True]
    assert got.media["y"].present_B.tolist() == [True, True, True, False]
    x, y = (media.values["v"][media.index_B] for media in got.media.values())
    torch.testing.assert_close(x[[0, 3]], batch.media["x"].values["v"][[0, 1]])
    torch.testing.assert_close(y[:3], batch.media["y"].values["v"][[3, 3, 1]])
    assert [len(media.values["v"]) for media in got.media.values()] == [2, 2]
    assert got.media["x"].quality_UQ is not None
    assert got.media["x"].quality_UQ[got.media["x"].index_B[[0, 3]], 0].tolist() == pytest.approx([0.2, 0.4])


def test_a_probe_asks_the_model_as_it_is_in_use_and_leaves_it_as_it_was() -> None:
    model = TwoInputs().train()
    probe = Probe(model, shared_batch(), TARGET)

    found = probe.shapley()

    assert model.training
    assert model.blocks[0].training
    assert found.value == probe.shapley().value
    assert sum(found.value.values()) == pytest.approx(found.with_all - found.with_none)
    batch = shared_batch()
    x, y = (m.values["v"][m.index_B] * m.present_B[:, None] for m in batch.media.values())
    assert found.sets["x",] == pytest.approx((x.argmax(dim=1) == batch.target).double().mean().item())
    assert found.with_all == pytest.approx(((x + y).argmax(dim=1) == batch.target).double().mean().item())
    assert 0 in model.media_met  # what nobody has is not encoded
    assert probe.commonest() == pytest.approx(1 / 3)


def test_of_a_figure_of_which_less_is_better_the_negative_is_shared() -> None:
    target = Target(name="weight", task="regression", mean=2.0, scale=3.0)
    batch = shared_batch()._replace(target=torch.zeros(12))
    probe = Probe(TwoInputs(), batch, target)

    assert probe.score(torch.full((12, 1), 0.5)) == pytest.approx(-1.5)
    assert probe.commonest() is None


def test_many_modalities_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    media = {f"m{place}": shared_batch().media["y"] for place in range(7)}
    probe = Probe(TwoInputs(), Batch(media, torch.arange(12) % 3), TARGET)

    found = probe.shapley(seed=1)

    assert len(found.sets) < 2**7
    assert sum(found.value.values()) == pytest.approx(found.with_all - found.with_none)


def test_records_without_a_target_are_refused() -> None:
    with pytest.raises(DataError, match="records whose target is known"):
        Probe(TwoInputs(), shared_batch()._replace(target=None), TARGET)


def test_figures_that_are_not_defined_are_refused() -> None:
    target = Target(name="kinds", task="multi_label", labels=("a", "b", "c"))
    probe: Any = Probe(TwoInputs(), shared_batch()._replace(target=torch.zeros(12, 3)), target)
    with pytest.raises(DataError, match="do not define mean_average_precision"):
        probe.score(torch.zeros(12, 3))


def test_more_tokens_than_can_be_gone_through_exactly_are_sampled() -> None:
    shares = token_shares(
        lambda kept_KT: kept_KT.sum(axis=1).astype(float), ["a"] * 9 + ["b"] * 4, ["a", "b"], num_permutations=400
    )
    assert shares == pytest.approx({"a": 9 / 13, "b": 4 / 13})


def test_the_first_records_of_a_probe_are_of_all_kinds_however_the_table_is_sorted(tmp_path: Path) -> None:
    labels = [label for label in "abc" for _ in range(40)]
    table = table_of_rows(pa.table({"x": [[float(n), 0.0] for n in range(120)], "kind": labels}), tmp_path)
    roles = {"x": ColumnRole("signal", "")}
    preparation = fit_preparation(table, roles, TARGET, PreparationConfig())
    probe = Probe.on(TwoInputs(), table, preparation, most=90, seed=1)  # type: ignore[arg-type]

    assert probe.batch.target is not None
    assert set(probe.batch.target[:20].tolist()) == {0, 1, 2}
    value_B = probe.batch.media["x"].values["samples_UCT"][probe.batch.media["x"].index_B][:, 0, 0]
    order = value_B.argsort()
    assert probe.batch.target[order].tolist() == sorted(probe.batch.target.tolist())  # each with its own label
