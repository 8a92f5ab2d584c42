import itertools
from typing import Any

import pytest
import torch

from dougong.compress.clock import interleaved
from dougong.compress.latency import LayerTimes, fit_layer_times
from dougong.compress.parts import cut
from dougong.compress.plan import CHOICES, Plan, read_choice
from dougong.compress.quantise import Budget, QuantiseConfig, bytes_of, calibrate, choose, round_layers, shown_of
from dougong.compress.recover import RecoverConfig, recover
from dougong.compress.sensitivity import DRAWS, _drawn, by_output, by_trace, candidate, divergence, simulated
from dougong.core.errors import ConfigError
from dougong.core.signature import ImageInput, Signature, Target, TextInput
from dougong.model.sandwich import Sandwich, SandwichConfig
from dougong.nn.batch import Batch, MediaBatch, only_media

SIGNATURE = Signature(
    inputs={"words": TextInput(vocabulary_size=100, max_tokens=8), "photo": ImageInput(height=16, width=16)},
    target=Target(name="answer", task="single_label", labels=("a", "b", "c")),
)


@pytest.fixture(scope="module")
def network() -> Sandwich:
    torch.manual_seed(0)
    return SandwichConfig(width=32).build(SIGNATURE).eval()


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    random = torch.Generator().manual_seed(1)
    made = []
    for _ in range(3):
        every_B, all_B = torch.arange(16), torch.ones(16).bool()
        ids_UT = torch.randint(0, 100, (16, 6), generator=random)
        words = MediaBatch({"ids_UT": ids_UT, "mask_UT": torch.ones_like(ids_UT).bool()}, every_B, all_B)
        photo = MediaBatch({"pixels_UCHW": torch.randn(16, 3, 16, 16, generator=random)}, every_B, all_B)
        made.append(Batch({"words": words, "photo": photo}, None))
    return made


@pytest.fixture(scope="module")
def calibrated(network: Sandwich, batches: list[Batch]) -> Any:
    layers = cut(network, SIGNATURE).layers
    return layers, calibrate(network, layers, batches[:2], "single_label", QuantiseConfig())


def test_one_pass_scores_layers_as_trying_each_does(network: Sandwich, batches: list[Batch], calibrated: Any) -> None:
    layers, known = calibrated
    few = {name: layers[name] for name in list(layers)[::4]}
    rounded = {name: round_layers(layers, Plan(layers={name: "w4a16"})).weights[name] for name in few}
    tried = by_output(
        network,
        {name: {"w4a16": candidate("w4a16", rounded[name], None)} for name in few},
        batches[:2],
        "single_label",
    )

    for name in few:
        assert known.scores[name]["w4a16"] == pytest.approx(tried[name]["w4a16"], rel=1.0, abs=1e-6)


def test_layers_that_no_record_reaches_have_what_needs_no_record(network: Sandwich, batches: list[Batch]) -> None:
    gone = [
        Batch({**batch.media, "photo": only_media(photo._replace(present_B=torch.zeros(16).bool()))}, None)
        for batch in batches
        for photo in [batch.media["photo"]]
    ]
    layers = cut(network, SIGNATURE).layers

    known = calibrate(network, layers, gone, "single_label", QuantiseConfig())

    reached = shown_of(layers, known.seen)
    blind = {name for name, layer in reached.items() if not layer.shown}
    assert any("photo" in name or name.startswith("blocks.1") for name in blind)
    assert all(set(known.scores[name]) == {"w16a16", "w8a16"} for name in blind)
    alike = {name: layer.choices for name, layer in reached.items()}
    for choice in ("w8a8", "w4a16"):
        plan = Plan.uniform(choice, alike)
        assert {plan.layers[name] for name in blind} == {"w8a16"}
        round_layers(reached, plan, known.seen)
        recover(network, plan, known.seen, gone[:1], "single_label", RecoverConfig(steps=1))
    costs = bytes_of(reached)
    least = sum(min(each.values()) for each in costs.values())
    tight = choose(known.scores, costs, None, Budget(weight_bytes=1.02 * least))
    assert {tight.layers[name] for name in blind} <= {"w8a16"}
    with pytest.raises(ConfigError, match="no record has shown"):
        round_layers(reached, Plan(layers={min(blind): "w8a8"}), known.seen)


def alone(batch: Batch, row: int) -> Batch:
    """One record of a batch in which each has media of its own."""
    media = {}
    for name, one in batch.media.items():
        values = {key: value[row : row + 1] for key, value in one.values.items()}
        media[name] = MediaBatch(values, torch.zeros(1, dtype=torch.int64), torch.ones(1).bool())
    return Batch(media, None)


def test_the_trace_is_that_of_single_records_gradients(
    network: Sandwich, batches: list[Batch], calibrated: Any
) -> None:
    layers, _ = calibrated
    names = [next(n for n in layers if ("w8a8" in layers[n].choices) == linear) for linear in (True, False)]
    rounded = {n: candidate("w8a16", round_layers(layers, Plan(layers={n: "w8a16"})).weights[n], None) for n in names}
    single = [alone(batches[0], row) for row in range(3)]

    found = by_trace(network, {n: {"w8a16": rounded[n]} for n in names}, single, "single_label", 0)

    random = torch.Generator().manual_seed(0)
    weights = [network.get_submodule(name).weight for name in names]
    norms = [0.0, 0.0]
    for batch in single:
        for _ in range(DRAWS):
            output_BC = network(batch).output_BC
            gradients = torch.autograd.grad(output_BC, weights, _drawn(output_BC.detach(), "single_label", random))
            norms = [norm + float(gradient.square().sum()) for norm, gradient in zip(norms, gradients, strict=True)]
    for name, weight, norm in zip(names, weights, norms, strict=True):
        moved = float((rounded[name].weight - weight.detach()).square().sum())
        want = norm / (len(single) * DRAWS) / weight.numel() * moved / 2
        assert found[name]["w8a16"] == pytest.approx(want, rel=1e-4)


def test_fewer_bits_are_never_scored_better_as_a_whole(calibrated: Any) -> None:
    _, known = calibrated
    sums = {choice: sum(of.get(choice, 0.0) for of in known.scores.values()) for choice in CHOICES}

    assert sums["w16a16"] == 0.0
    assert 0 < sums["w8a16"] < sums["w8a8"]
    assert sums["w8a16"] < 0.1 * sums["w4a16"]


def test_scores_change_nothing_of_the_model(network: Sandwich, batches: list[Batch], calibrated: Any) -> None:
    layers, _ = calibrated
    before = network(batches[2]).output_BC.detach()

    calibrate(network, layers, batches[:1], "single_label", QuantiseConfig(method="output"))

    assert torch.equal(network(batches[2]).output_BC.detach(), before)
    assert not any(module._forward_hooks for module in network.modules())


def test_the_plan_is_the_best_of_all_within_the_budget() -> None:
    scores: Any = {
        "one": {"w16a16": 0.0, "w8a16": 0.3, "w4a16": 2.0},
        "two": {"w16a16": 0.0, "w8a16": 0.5, "w4a16": 0.6},
        "three": {"w16a16": 0.0, "w8a16": 0.1, "w4a16": 5.0},
    }
    sizes: Any = {name: {"w16a16": 16.0, "w8a16": 8.0, "w4a16": 4.0} for name in scores}
    times: Any = {name: {"w16a16": 3.0, "w8a16": 1.0, "w4a16": 2.0} for name in scores}

    for most_bytes, most_seconds in itertools.product((12.0, 20.0, 29.0, 48.0), (3.0, 5.0, 9.0)):
        every = [dict(zip(scores, found, strict=True)) for found in itertools.product(*scores.values())]
        fitting = [
            plan
            for plan in every
            if sum(sizes[n][c] for n, c in plan.items()) <= most_bytes
            and sum(times[n][c] for n, c in plan.items()) <= most_seconds
        ]
        budget = Budget(most_bytes, most_seconds)
        if not fitting:
            with pytest.raises(ConfigError, match="no choice of bits meets this budget"):
                choose(scores, sizes, times, budget)
            continue
        found = choose(scores, sizes, times, budget).layers
        assert found in fitting
        assert sum(scores[n][c] for n, c in found.items()) == pytest.approx(
            min(sum(scores[n][c] for n, c in plan.items()) for plan in fitting)
        )


def test_what_binds_is_told() -> None:
    scores: Any = {"one": {"w16a16": 0.0, "w4a16": 1.0}}
    sizes: Any = {"one": {"w16a16": 4096.0, "w4a16": 1024.0}}
    times: Any = {"one": {"w16a16": 0.002, "w4a16": 0.001}}

    with pytest.raises(ConfigError, match=r"the size binds: .*fewest bits take 1 KiB"):
        choose(scores, sizes, times, Budget(weight_bytes=100.0))
    with pytest.raises(ConfigError, match=r"the latency binds: .*take 1 ms"):
        choose(scores, sizes, times, Budget(seconds=0.0005))


def test_a_chosen_plan_is_closer_than_a_uniform_one_of_its_size(
    network: Sandwich, batches: list[Batch], calibrated: Any
) -> None:
    layers, known = calibrated
    sizes = bytes_of(layers)
    half = 0.5 * sum(sizes[n]["w4a16"] for n in layers) + 0.5 * sum(sizes[n]["w8a16"] for n in layers)

    def wrong(plan: Plan) -> float:
        rounded = round_layers(layers, plan, known.seen)
        chosen = {
            name: candidate(choice, rounded.weights.get(name), known.seen.get(name))
            for name, choice in plan.layers.items()
        }
        with torch.no_grad():
            exact = network(batches[2]).output_BC
            with simulated(network, chosen):
                return float(divergence(exact, network(batches[2]).output_BC, "single_label").mean())

    plan = choose(known.scores, sizes, None, Budget(weight_bytes=half))

    assert sum(sizes[name][choice] for name, choice in plan.layers.items()) <= half
    assert wrong(plan) < 0.7 * wrong(Plan.uniform("w4a16", {name: layer.choices for name, layer in layers.items()}))


def test_a_plan_that_does_not_fit_is_refused(calibrated: Any) -> None:
    layers, known = calibrated
    embedding = next(name for name, layer in layers.items() if "w8a8" not in layer.choices)

    with pytest.raises(ConfigError, match="names 'nowhere', which is no layer"):
        round_layers(layers, Plan(layers={"nowhere": "w8a16"}))
    with pytest.raises(ConfigError, match="a look-up has w16a16, w8a16, w4a16"):
        round_layers(layers, Plan(layers={embedding: "w8a8"}), known.seen)
    with pytest.raises(ConfigError, match="no record has shown"):
        round_layers(layers, Plan(layers={next(n for n in layers if n != embedding): "w8a8"}))
    with pytest.raises(ConfigError, match="--bits '3' is no choice"):
        read_choice("3")


def test_uniform_gives_a_look_up_what_it_can_have(calibrated: Any) -> None:
    layers, _ = calibrated
    plan = Plan.uniform("w8a8", {name: layer.choices for name, layer in layers.items()})

    assert set(plan.layers.values()) == {"w8a8", "w8a16"}
    assert sum(plan.counts().values()) == len(layers)


def test_runs_are_timed_in_turn() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in ("a", "b", "c")}

    found = interleaved(runs, warm=2, turns=5)  # type: ignore[arg-type]

    turns = [order[6 + 3 * turn : 9 + 3 * turn] for turn in range(5)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1
    for timed in found.values():
        low, high = timed.quartiles
        assert low <= timed.median <= high
        assert len(timed.seconds) == 5


def test_uniform_plans_are_predicted_as_they_were_measured() -> None:
    plans: Any = {choice: Plan(layers={"one": choice, "two": choice}) for choice in CHOICES}
    profiles: Any = {
        "w16a16": {"one": 4.0, "two": 2.0},
        "w8a16": {"one": 3.0, "two": 1.0},
        "w8a8": {"one": 1.0, "two": 1.0},
        "w4a16": {"one": 2.0, "two": 2.0},
    }
    measured: Any = {"w16a16": 8.0, "w8a16": 6.0, "w8a8": 4.5, "w4a16": 6.0}

    times = fit_layer_times(profiles, measured, plans)

    assert isinstance(times, LayerTimes)
    for choice in CHOICES:
        assert times.total(plans[choice]) == pytest.approx(measured[choice])
    assert times.total(Plan(layers={"one": "w8a8", "two": "w16a16"})) == pytest.approx(8.0 - 4.0 + 1.25)


def test_recovery_brings_a_model_closer_at_its_bits(network: Sandwich, batches: list[Batch], calibrated: Any) -> None:
    layers, known = calibrated
    plan = Plan.uniform("w4a16", {name: layer.choices for name, layer in layers.items()})
    before = {name: weight.clone() for name, weight in network.state_dict().items()}

    taught = recover(network, plan, known.seen, batches[:2], "single_label", RecoverConfig(steps=60))

    with torch.no_grad():
        exact = network(batches[2]).output_BC

    def wrong(student: Sandwich) -> float:
        of_student = cut(student, SIGNATURE).layers
        rounded = round_layers(of_student, plan)
        chosen = {name: candidate("w4a16", weights, None) for name, weights in rounded.weights.items()}
        with torch.no_grad(), simulated(student, chosen):
            return float(divergence(exact, student(batches[2]).output_BC, "single_label").mean())

    # On records that it was not taught by: at twenty times the rate, two batches are learnt by heart and it is worse.
    assert wrong(taught) < 0.8 * wrong(network)
    assert all(torch.equal(network.state_dict()[name], before[name]) for name in before)
    assert not any(module._forward_hooks for module in taught.modules())
