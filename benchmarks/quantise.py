"""Bits chosen layer by layer, against the same bits for all and against other quantisers (claim 10).

Here        chosen plans beside uniform and random ones (budgets); ways to score layers (scores); predicted latencies
            (predicted); NNCF, ONNX Runtime and torchao on the same model (peers); ways to cut a model into graphs
            (forms).
Elsewhere   the engines (compress/engines/); the other quantisers (peers.py); the larger model (large.py); students and
            whole paths (compress.py); options and the written result (harness.py).
Promise     every figure is of a graph that really computes with these bits: nothing is simulated. Layers are scored on
            training records, figures are of test records. Times are interleaved, medians, in an order drawn anew.
            What was measured of these sources is kept, so that a run that was stopped goes on.

Models      easy-VQA (the teacher of students.py, of pictures and typed questions), and a sandwich with the shapes of
            BERT-small (4 layers of 512) and ViT-small (12 of 384, 224 pixels) with random weights, whose times alone
            are told.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from harness import Kept, run
from large import large_batch, large_sandwich
from paired import quartiles, ratio
from parts import once
from peers import ONE_CORE, peers_of
from students import EASY_VQA, teacher_of
from torch import Tensor, nn

from dougong.bundle import runtime
from dougong.bundle.exported import Engine, media_of
from dougong.bundle.model import Model
from dougong.compress.clock import interleaved
from dougong.compress.delivery import export_plan, graph_bytes, layer_times, uniform_plans
from dougong.compress.engines.eager import Eager
from dougong.compress.engines.openvino import to_graph
from dougong.compress.export import Source, export, open_engine
from dougong.compress.latency import LayerTimes
from dougong.compress.parts import Column, Part, Roof
from dougong.compress.plan import CHOICES, Choice, Plan
from dougong.compress.quantise import Budget, Calibrated, Costs, QuantiseConfig, bytes_of, calibrate, choose
from dougong.compress.sensitivity import Method, divergence
from dougong.core.figures import Figure
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.table import Table
from dougong.engine.batches import to_tensors
from dougong.nn.batch import Batch

CONFIG: Final = QuantiseConfig()
BUDGETS: Final = 5
RANDOM_PLANS: Final = 5
PREDICTED_PLANS: Final = 20
BASE: Final[Choice] = "w16a16"
TEST_RECORDS: Final = 2000
CALIBRATION_RECORDS: Final = 256


def measure(quick: bool, parts: Sequence[str]) -> Iterator[Figure]:
    torch.set_num_threads(1)
    kept = Kept("quantise")
    for part in parts:
        yield from PARTS[part](quick, kept)


class Task(NamedTuple):
    """A trained model with its records."""

    model: Model
    source: Source
    known: Calibrated
    calibration: list[Batch]
    test: list[Batch]
    one: Batch


def easy_vqa(quick: bool) -> Task:
    _, tables, model = teacher_of(EASY_VQA, 0, Kept("compress"), quick=quick)
    source = Source(model)
    calibration = batches(model, tables.train, 32, CALIBRATION_RECORDS)
    known = calibrate(model.network, source.cut.layers, calibration, "single_label", CONFIG)
    test = batches(model, tables.test, 64, 200 if quick else TEST_RECORDS)
    return Task(model, source, known, calibration, test, batches(model, tables.test, 1, 1)[0])


def batches(model: Model, table: Table, size: int, most: int) -> list[Batch]:
    loader = Loader(table, model.preparation, LoaderConfig(batch_size=size, workers=0))
    found: list[Batch] = []
    for arrays in loader.one_pass():
        if len(found) * size >= most:
            break
        found.append(to_tensors(arrays))
    return found


class Judged(NamedTuple):
    accuracy: float
    divergence: float
    num_bytes: int


class Judge:
    """Carries plans out, each once."""

    def __init__(self, task: Task, scratch: Path) -> None:
        self.task, self.scratch = task, scratch
        self._found: dict[tuple[tuple[str, Choice], ...], Judged] = {}
        with torch.inference_mode():
            self.exact = [task.model.network(batch).output_BC for batch in task.test]

    def folder(self, plan: Plan) -> Path:
        key = tuple(sorted(plan.layers.items()))
        folder = self.scratch / f"{abs(hash(key))}"
        if not folder.exists():
            export_plan(self.task.source, folder, plan, self.task.known, CONFIG)
        return folder

    def engine(self, plan: Plan) -> Engine:
        return open_engine(self.folder(plan), ONE_CORE)

    def __call__(self, plan: Plan) -> Judged:
        key = tuple(sorted(plan.layers.items()))
        if key not in self._found:
            engine = self.engine(plan)
            said = [engine.run(batch)["output_BC"] for batch in self.task.test]
            self._found[key] = Judged(*judged(self.exact, said, self.task.test), graph_bytes(self.folder(plan)))
        return self._found[key]


def judged(exact: Sequence[Tensor], said: Sequence[Tensor], test: Sequence[Batch]) -> tuple[float, float]:
    """Accuracy, and divergence from the unrounded answers."""
    right, apart, count = 0, 0.0, 0
    for exact_BC, said_BC, batch in zip(exact, said, test, strict=True):
        assert batch.target is not None
        right += int((said_BC.argmax(dim=1) == batch.target).sum())
        apart += float(divergence(exact_BC, said_BC, "single_label").sum())
        count += batch.num_records
    return right / count, apart / count


def budgets(quick: bool, kept: Kept) -> Iterator[Figure]:
    """Five sizes from uniform 4 bits to uniform 8, and five latencies, each beside uniform and random plans."""
    task = easy_vqa(quick)
    layers = task.source.cut.layers
    sizes = bytes_of(layers)
    uniform = uniform_plans(layers)
    how = "quick" if quick else "whole"
    with tempfile.TemporaryDirectory() as temporary:
        judge = Judge(task, Path(temporary))
        yield from once(kept, f"uniform, {how}", lambda: alike(judge, task, uniform))
        least, most = (total(sizes, uniform[choice]) for choice in ("w4a16", "w8a16"))
        for share in np.linspace(0, 1, 2 if quick else BUDGETS):
            budget = Budget(weight_bytes=least + (most - least) * float(share))
            make = functools.partial(beside, judge, task, sizes, None, 0.0, budget, uniform)
            yield from once(kept, f"size {share:.3f}, {how}", make)
        key = f"times of layers, {how}"
        values = kept.get(key)
        if values is None:
            values = layer_times(
                task.source, task.known, task.one, CONFIG, ONE_CORE, Path(temporary) / "times"
            )._asdict()
            kept.put(key, values)
        times = LayerTimes(**values)
        fastest = sum(min(of_layer.values()) for of_layer in times.seconds.values())
        slowest = sum(of_layer["w16a16"] for of_layer in times.seconds.values())
        for share in np.linspace(0.05, 1, 2 if quick else BUDGETS):
            budget = Budget(seconds=fastest + (slowest - fastest) * float(share))
            make = functools.partial(beside, judge, task, sizes, times.seconds, times.rest, budget, uniform)
            yield from once(kept, f"latency {share:.3f}, {how}", make)


def alike(judge: Judge, task: Task, uniform: Mapping[Choice, Plan]) -> Iterator[Figure]:
    """The same bits for every layer."""
    exact, _ = judged(judge.exact, judge.exact, task.test)
    yield Figure(name="accuracy, unrounded", value=exact, unit="")
    for choice in ("w8a8", "w8a16", "w4a16"):
        found = judge(uniform[choice])
        yield Figure(name=f"accuracy, uniform {choice}", value=found.accuracy, unit="", baseline=exact)
        yield Figure(name=f"divergence, uniform {choice}", value=found.divergence, unit="nats")


def beside(
    judge: Judge,
    task: Task,
    sizes: Costs,
    seconds: Costs | None,
    rest: float,
    budget: Budget,
    uniform: Mapping[Choice, Plan],
) -> Iterator[Figure]:
    """The chosen plan against uniform ones within the same budget, and against random ones that use it up alike."""
    costs = sizes if seconds is None else seconds
    room = budget.weight_bytes if seconds is None else budget.seconds
    assert room is not None
    name = f"size {room / 1e3:.0f} kB" if seconds is None else f"latency {(room + rest) * 1e3:.2f} ms"
    plan = choose(task.known.scores, sizes, seconds, budget)
    ours = judge(plan)
    fitting = [judge(each) for each in uniform.values() if total(costs, each) <= room * 1.0001]
    drawn = [judge(random_plan(costs, room, seed)) for seed in range(RANDOM_PLANS)]
    best = max((each.accuracy for each in fitting), default=None)
    yield Figure(name=f"{name}: accuracy", value=ours.accuracy, unit="", baseline=best)
    if best is not None:
        closest = min(each.divergence for each in fitting)
        yield Figure(name=f"{name}: accuracy over uniform", value=ours.accuracy - best, unit="", asked=">= 0")
        yield Figure(
            name=f"{name}: divergence of uniform over ours", value=closest / max(ours.divergence, 1e-12), unit="x"
        )
    accuracies = [each.accuracy for each in drawn]
    yield Figure(
        name=f"{name}: accuracy over random",
        value=ours.accuracy - float(np.mean(accuracies)),
        unit="",
        asked=">= 0",
        low=ours.accuracy - max(accuracies),
        high=ours.accuracy - min(accuracies),
        seeds=RANDOM_PLANS,
    )
    yield Figure(
        name=f"{name}: divergence of random over ours",
        value=float(np.median([each.divergence for each in drawn])) / max(ours.divergence, 1e-12),
        unit="x",
        asked=">= 1",
    )


def total(costs: Costs, plan: Plan) -> float:
    return sum(costs[name][choice] for name, choice in plan.layers.items())


def random_plan(costs: Costs, room: float, seed: int) -> Plan:
    """Choices drawn anew for layers in turn, kept where they bring the cost closer to the room and not above it."""
    random = np.random.default_rng(seed)
    chosen: dict[str, Choice] = {name: min(of_layer, key=lambda c: of_layer[c]) for name, of_layer in costs.items()}
    spent = sum(costs[name][choice] for name, choice in chosen.items())
    names = list(costs)
    for _ in range(40 * len(names)):
        name = names[int(random.integers(len(names)))]
        choices = list(costs[name])
        other = choices[int(random.integers(len(choices)))]
        after = spent + costs[name][other] - costs[name][chosen[name]]
        if spent < after <= room:
            chosen[name], spent = other, after
    return Plan(layers=chosen)


def scores(quick: bool, kept: Kept) -> Iterator[Figure]:
    """Each way to score layers: what comes of its plans at three sizes between uniform 4 and 8 bits."""
    methods: tuple[Method, ...] = ("fisher", "trace", "output")
    for method in methods:
        key = f"scores by {method}, {'quick' if quick else 'whole'}"
        yield from once(kept, key, functools.partial(scored, method, quick, kept))


def scored(method: Method, quick: bool, kept: Kept) -> Iterator[Figure]:
    task = easy_vqa(quick)
    layers = task.source.cut.layers
    sizes, uniform = bytes_of(layers), uniform_plans(layers)
    least, most = (total(sizes, uniform[choice]) for choice in ("w4a16", "w8a16"))
    known = calibrate(task.model.network, layers, task.calibration, "single_label", QuantiseConfig(method=method))
    with tempfile.TemporaryDirectory() as temporary:
        judge = Judge(task, Path(temporary))
        for share in (0.5,) if quick else (0.25, 0.5, 0.75):
            room = least + (most - least) * share
            found = judge(choose(known.scores, sizes, None, Budget(weight_bytes=room)))
            name = f"scored by {method}, size {room / 1e3:.0f} kB"
            yield Figure(name=f"{name}: accuracy", value=found.accuracy, unit="")
            yield Figure(name=f"{name}: divergence", value=found.divergence, unit="nats")


def predicted(quick: bool, kept: Kept) -> Iterator[Figure]:
    """Twenty plans drawn at random on the larger sandwich, at batch 1 and 16."""
    for size in (1,) if quick else (1, 16):
        key = f"predicted, batch {size}, {'quick' if quick else 'whole'}"
        yield from once(kept, key, functools.partial(predicted_at, size, quick))


def predicted_at(size: int, quick: bool) -> Iterator[Figure]:
    """As foretold; and without the machine's drift since layers were timed: a plan of that time is timed again, in
    turns with each of the others."""
    model = large_sandwich()
    source, timed = Source(model), large_batch(size)
    layers = source.cut.layers
    known = calibrate(model.network, layers, [large_batch(4)], "single_label", CONFIG)
    with tempfile.TemporaryDirectory() as temporary:
        times = layer_times(source, known, timed, CONFIG, ONE_CORE, Path(temporary))
        base = open_engine(Path(temporary) / BASE, ONE_CORE)
        base_then = times.total(uniform_plans(layers)[BASE])
        errors, without_drift = [], []
        for seed in range(4 if quick else PREDICTED_PLANS):
            random = np.random.default_rng(seed)
            share = random.dirichlet(np.ones(len(CHOICES)))
            plan = Plan(
                layers={
                    name: layer.choices[int(random.choice(len(layer.choices), p=_renewed(share, layer.choices)))]
                    for name, layer in layers.items()
                }
            )
            folder = export_plan(source, Path(temporary) / f"plan-{seed}", plan, known, CONFIG)
            engine = open_engine(folder, ONE_CORE)
            found = interleaved(
                {"plan": functools.partial(engine.run, timed), BASE: functools.partial(base.run, timed)}
            )
            errors.append(times.total(plan) / found["plan"].median - 1)
            drift = found[BASE].median / base_then
            without_drift.append(drift * times.total(plan) / found["plan"].median - 1)
    worst = max(errors, key=abs)
    yield Figure(
        name=f"batch {size}: largest error of the predicted latency",
        value=abs(worst),
        unit="",
        asked="<= 0.15",
        low=min(errors),
        high=max(errors),
        seeds=len(errors),
    )
    yield Figure(
        name=f"batch {size}: the same, the machine's drift meanwhile taken out",
        value=max(map(abs, without_drift)),
        unit="",
        low=min(without_drift),
        high=max(without_drift),
        seeds=len(without_drift),
    )


def _renewed(share: Any, choices: Sequence[Choice]) -> Any:
    kept = np.array([share[CHOICES.index(choice)] for choice in choices])
    return kept / kept.sum()


def peers(quick: bool, kept: Kept) -> Iterator[Figure]:
    """Every engine on both models: times at batch 1 and 16 over eager fp32, and what was lost of easy-VQA."""
    how = "quick" if quick else "whole"
    yield from once(kept, f"peers on easy-VQA, {how}", lambda: peers_on_easy_vqa(easy_vqa(quick), quick))
    yield from once(kept, f"peers on the larger one, {how}", lambda: peers_on_large(quick))


def peers_on_easy_vqa(task: Task, quick: bool) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as temporary:
        engines = everybody(task.source, task.known, task.calibration, Path(temporary))
        exact = [engines["eager fp32"].run(batch)["output_BC"] for batch in task.test]
        for name, engine in engines.items():
            accuracy, apart = judged(exact, [engine.run(batch)["output_BC"] for batch in task.test], task.test)
            yield Figure(name=f"easy-VQA, {name}: accuracy", value=accuracy, unit="")
            yield Figure(name=f"easy-VQA, {name}: divergence", value=apart, unit="nats")
        yield from speeds("easy-VQA", engines, {1: task.one, 16: first(task.test[0], 16)}, quick)


def peers_on_large(quick: bool) -> Iterator[Figure]:
    large = Source(large_sandwich())
    with tempfile.TemporaryDirectory() as temporary:
        calibration = [large_batch(4), large_batch(5)]
        known = calibrate(large.model.network, large.cut.layers, calibration, "single_label", CONFIG)
        engines = everybody(large, known, calibration, Path(temporary))
        yield from speeds("BERT-small and ViT-small", engines, {1: large_batch(1), 16: large_batch(16)}, quick)


def first(batch: Batch, count: int) -> Batch:
    media = {
        name: one._replace(index_B=one.index_B[:count], present_B=one.present_B[:count])
        for name, one in batch.media.items()
    }
    return Batch(media, None)


def speeds(name: str, engines: Mapping[str, Engine], timed: Mapping[int, Batch], quick: bool) -> Iterator[Figure]:
    for size, batch in timed.items():
        runs: dict[str, Callable[[], object]] = {
            key: functools.partial(engine.run, batch) for key, engine in engines.items()
        }
        found = interleaved(runs, turns=7 if quick else 31)
        base = found["eager fp32"]
        for key, timing in found.items():
            yield quartiles(f"{name}, batch {size}, {key}", timing.seconds, base.median * 1000)
            yield ratio(f"{name}, batch {size}: eager fp32 over {key}", base.seconds, timing.seconds, None)


def everybody(source: Source, known: Calibrated, calibration: Sequence[Batch], scratch: Path) -> dict[str, Engine]:
    """Eager, the engines unrounded, ours at uniform choices, and the three peers at what they do by themselves."""
    engines: dict[str, Engine] = {"eager fp32": Eager(source.model.network)}
    for to in ("openvino", "onnx", "torch"):
        engines[f"{to} fp32"] = open_engine(export(source, scratch / to, to), ONE_CORE)
    for choice, plan in uniform_plans(source.cut.layers).items():
        folder = export_plan(source, scratch / choice, plan, known, CONFIG)
        engines[f"ours {choice}"] = open_engine(folder, ONE_CORE)
    return engines | peers_of(source, calibration, scratch)


class Whole(nn.Module):
    """A model in one graph, for one pattern of presence: the encoders of what is there, and the roof."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.columns = nn.ModuleList([p.module for p in source.cut.parts.values() if isinstance(p.module, Column)])
        self.roof = next(part.module for part in source.cut.parts.values() if isinstance(part.module, Roof))
        self.spec = source.cut.spec

    def forward(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        made = dict(given)
        for place, (column, part) in enumerate(zip(self.columns, self.spec["encoders"], strict=True)):
            found = column({name: given[f"{name}_{place}"] for name in part["inputs"]})
            made |= {f"{name}_{place}": value for name, value in found.items()}
        answer: dict[str, Tensor] = self.roof({name: made[name] for name in self.spec["roof"]["inputs"]})
        return answer


def forms(quick: bool, kept: Kept) -> Iterator[Figure]:
    """One graph for each encoder and one for the roof, against one graph for all; and skipping against zeros."""

    task = easy_vqa(True)
    for name, source, timed in (
        ("easy-VQA", task.source, {1: task.one, 16: first(task.test[0], 16)}),
        ("BERT-small and ViT-small", Source(large_sandwich()), {1: large_batch(1), 16: large_batch(16)}),
    ):
        spec = source.cut.spec
        example: dict[str, Tensor] = {}
        dynamic: dict[str, dict[int, str]] = {}
        for place, encoder in enumerate(spec["encoders"]):
            part = source.cut.parts[encoder["graph"]]
            example |= {f"{key}_{place}": value for key, value in part.example.items()}
            dynamic |= {
                f"{key}_{place}": {axis: f"{each}_{place}" for axis, each in axes.items()}
                for key, axes in part.dynamic.items()
            }
        roof = source.cut.parts["roof"]
        for key, value in roof.example.items():
            if key.startswith(("index_B", "present_B")):
                example[key], dynamic[key] = value, roof.dynamic[key]
        whole = Part(Whole(source), example, dynamic, roof.outputs)
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": 1}
        compiled = runtime.openvino_core().compile_model(to_graph(whole), "CPU", settings)
        request = compiled.create_infer_request()
        with tempfile.TemporaryDirectory() as temporary:
            engine = open_engine(export(source, Path(temporary) / "parts", "openvino"), ONE_CORE)
            for size, batch in timed.items():
                media, _ = media_of(batch)
                absent = without(batch, spec["encoders"][0]["name"])
                runs: dict[str, Callable[[], object]] = {
                    "parts": functools.partial(engine.run, batch),
                    "one graph": functools.partial(_in_one, request, spec, media),
                    "parts, one absent": functools.partial(engine.run, absent),
                }
                found = interleaved(runs, turns=7 if quick else 31)
                for key in ("one graph", "parts, one absent"):
                    yield ratio(
                        f"{name}, batch {size}: {key} over parts", found[key].seconds, found["parts"].seconds, None
                    )


def _in_one(request: Any, spec: Mapping[str, Any], media: runtime.Media) -> Any:
    return request.infer(flat(spec, media))


def flat(spec: Mapping[str, Any], media: runtime.Media) -> runtime.Arrays:
    given: runtime.Arrays = {}
    for place, part in enumerate(spec["encoders"]):
        values, given[f"index_B_{place}"], given[f"present_B_{place}"] = media[part["name"]]
        if not len(next(iter(values.values()))):  # what is absent is fed zeros here, and encoded for nothing
            values = {
                name: np.zeros((1, *(max(1, side) for side in value.shape[1:])), value.dtype)
                for name, value in values.items()
            }
        given |= {f"{name}_{place}": value for name, value in runtime.filled_up(part, values).items()}
    return given


def without(batch: Batch, name: str) -> Batch:
    one = batch.media[name]
    nothing = one._replace(
        values={key: value[:0] for key, value in one.values.items()},
        index_B=torch.zeros_like(one.index_B),
        present_B=torch.zeros_like(one.present_B),
    )
    return Batch({**batch.media, name: nothing}, None)


PARTS: Final[dict[str, Callable[[bool, Kept], Iterator[Figure]]]] = {
    "budgets": budgets,
    "scores": scores,
    "predicted": predicted,
    "peers": peers,
    "forms": forms,
}


if __name__ == "__main__":
    about = "Bits chosen layer by layer, against the same for all and against other quantisers."
    run("quantise", about, measure, parts=tuple(PARTS))
