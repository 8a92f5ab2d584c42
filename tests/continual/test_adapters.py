from pathlib import Path

import pytest
import torch
from torch import nn

import dougong
from dougong.continual.adapters import LowRank, TaskParts, layers_of, rank_within
from dougong.continual.elastic import Elastic, elastic
from dougong.continual.prompt import PromptNetwork, words_vector
from dougong.core.errors import ConfigError
from dougong.data.collate import Collator, Request
from dougong.engine.batches import to_tensors
from dougong.model.sandwich import Sandwich
from dougong.nn.batch import Batch


def batch_of(model: dougong.Model, rows: list[dict[str, object]]) -> Batch:
    import numpy as np

    cells = {column: [row.get(column) for row in rows] for column in model.preparation.columns}
    collator = Collator(model.preparation, Path("."), seed=0)
    return to_tensors(collator(Request(np.arange(len(rows)), cells, (0, 0))))


@pytest.fixture
def model(base: Path) -> dougong.Model:
    return dougong.load(base)


@pytest.fixture
def batch(model: dougong.Model, records) -> Batch:  # type: ignore[no-untyped-def]
    return batch_of(model, records(12, seed=3, missing=0.3))


def parts_of(
    base: Sandwich, *, rank: int = 2, filled: float = 0.0, seed: int = 0, outputs: int = 4, prompts: int = 2
) -> TaskParts:
    torch.manual_seed(seed)
    prompt = PromptNetwork(width=base.width, num_prompts=prompts, hidden=4, description="which one?")
    made = TaskParts(
        layers_of(base, base.names),
        rank=rank,
        hidden=base.decision.out.in_features,
        num_outputs=outputs,
        prompt=prompt,
        extras={},
    )
    if filled:
        for parameter in made.parameters():
            nn.init.normal_(parameter, std=filled)
    return made


def test_a_task_begins_with_what_the_base_says(model: dougong.Model, batch: Batch) -> None:
    base = model.network
    with torch.no_grad():
        before = base(batch)
        with elastic(base, {"a": parts_of(base)}, active="a") as whole:
            said = whole(batch)
            assert torch.equal(base(batch).output_BC, before.output_BC)
        assert torch.equal(said.base.fused_BD, before.fused_BD)  # no prompt without a carrier
        assert said.output_BC.shape == (12, 4)
        assert torch.equal(base(batch).output_BC, before.output_BC)


def test_nothing_is_left_on_the_base(model: dougong.Model) -> None:
    base = model.network
    names = list(base.state_dict())
    with elastic(base, {"a": parts_of(base, filled=0.5)}):
        assert list(base.state_dict()) == names
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_records_of_many_tasks_answer_as_by_themselves(model: dougong.Model, records) -> None:  # type: ignore[no-untyped-def]
    base = model.network
    parts = {
        "a": parts_of(base, rank=1, filled=0.3, seed=1, outputs=3),
        "b": parts_of(base, rank=3, filled=0.3, seed=2, outputs=5),
        "c": parts_of(base, rank=2, filled=0.3, seed=3, outputs=2, prompts=5),
    }
    rows = records(48, seed=3, missing=0.3)
    batch = batch_of(model, rows)
    keys = [None, "a", "b", "c"] * 12
    carriers = {"a": "remark", "b": "photo", "c": "remark"}
    with torch.no_grad(), elastic(base, parts, carriers=carriers) as whole:
        together = whole.answer(batch, keys).output_BC
        for key in (None, "a", "b", "c"):
            own = [row for row, each in enumerate(keys) if each == key]
            said = whole.answer(batch, [key] * 48).output_BC
            by_themselves = whole.answer(batch_of(model, [rows[row] for row in own]), [key] * 12).output_BC
            for alone in (said[own], by_themselves):
                apart = (together[own, : alone.shape[1]] - alone).abs().max()
                assert apart <= 1e-6 * alone.abs().max()
            assert (together[own, said.shape[1] :] == torch.finfo(torch.float32).min).all()
        assert torch.equal(whole.answer(batch, [None] * 48).output_BC, base(batch).output_BC)


def test_prompts_of_many_tasks_stand_in_the_same_places(model: dougong.Model, batch: Batch) -> None:
    base = model.network
    parts = {f"t{number}": parts_of(base, seed=number, prompts=1 + number % 2) for number in range(6)}
    with torch.no_grad(), elastic(base, parts, carriers=dict.fromkeys(parts, "remark")) as whole:
        asked: list[int] = []
        base.blocks[-1].register_forward_pre_hook(lambda _, given: asked.append(given[0].tokens["remark"].shape[1]))
        whole.answer(batch, ["t1"] * 12)
        whole.answer(batch, [*parts] * 2)
    assert asked[0] == asked[1]  # no token more for five tasks more


def test_what_is_learnt_between_two_answers_is_in_the_second(model: dougong.Model, batch: Batch) -> None:
    base = model.network
    parts = parts_of(base, filled=0.3)
    with torch.no_grad(), elastic(base, {"a": parts}, active="a") as whole:
        before = whole(batch).base.fused_BD
        for parameter in parts.parameters():
            parameter.mul_(2.0)
        assert not torch.allclose(whole(batch).base.fused_BD, before)


def test_only_the_task_has_gradients(model: dougong.Model, batch: Batch) -> None:
    base = model.network
    parts = parts_of(base, filled=0.1)
    with elastic(base, {"a": parts}, active="a", carriers={"a": "table"}) as whole:
        whole.train()
        whole(batch).output_BC.square().sum().backward()
        assert not base.training
    assert all(p.grad is None for p in base.parameters())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in parts.parameters())
    assert all(float(p.grad.abs().sum()) > 0 for p in parts.out.parameters())
    assert parts.prompt is not None
    assert float(parts.prompt.say.weight.grad.abs().sum()) > 0


def test_a_change_is_peft_s(model: dougong.Model) -> None:
    lora = pytest.importorskip("peft")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 5))
    x_BI = torch.randn(3, 6)
    change = LowRank(6, 5, 2)
    nn.init.normal_(change.up_OR)
    expected = plain(x_BI) + x_BI @ change.down_RI.t() @ change.up_OR.t()

    wrapped = lora.get_peft_model(plain, lora.LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
    layer = wrapped.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(change.down_RI)
        layer.lora_B["default"].weight.copy_(change.up_OR)

    torch.testing.assert_close(wrapped(x_BI), expected)


def test_the_rank_follows_from_the_budget(model: dougong.Model) -> None:
    layers = layers_of(model.network, ("photo",))
    per_rank = sum(each.linear.in_features + each.linear.out_features for each in layers.values())
    assert rank_within(layers, numbers=3 * per_rank + 99, besides=99) == 3
    assert rank_within(layers, numbers=3 * per_rank + 98, besides=99) == 2
    with pytest.raises(ConfigError, match="budget allows a task 10 numbers"):
        rank_within(layers, numbers=10, besides=0)
    assert len(layers) < len(layers_of(model.network, model.network.names))


def test_a_description_is_a_vector_on_any_machine() -> None:
    one, other = words_vector("which digit is it?"), words_vector("which digit was it?")
    assert float(one @ one) == pytest.approx(1.0)
    assert float(one @ other) > 0.5 > float(one @ words_vector("how sad is this voice"))
    assert float(words_vector("").sum()) == 0.0


def test_two_threads_do_not_meet(model: dougong.Model, batch: Batch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    base = model.network
    whole = Elastic(base, {"a": parts_of(base, filled=0.3)}, carriers={"a": "photo"}).eval()
    try:
        with torch.no_grad():
            expected = whole.answer(batch, ["a"] * 12).output_BC
            plain = base(batch).output_BC

        def ask(number: int) -> bool:
            with torch.no_grad():
                if number % 2:
                    return torch.equal(whole.answer(batch, ["a"] * 12).output_BC, expected)
                return torch.equal(base(batch).output_BC, plain)

        with ThreadPoolExecutor(2) as pool:
            assert all(pool.map(ask, range(12)))
    finally:
        whole.detach()
