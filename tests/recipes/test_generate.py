"""A whole small run of writing: what it leaves, that it resumes, and that its bundle and commands write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import dougong
from dougong.bundle.generator import Generator, batch_of_cells, load_generator
from dougong.cli.main import main
from dougong.core.config import from_yaml, override, parse, to_yaml
from dougong.core.errors import BundleError, ConfigError, DataError, RunError
from dougong.core.events import read_events
from dougong.data.sources.captions import prepare_captions
from dougong.data.table import open_table
from dougong.engine import prepare
from dougong.engine.checkpoint import best_weights, load_weights
from dougong.engine.memory.recompute import Keep, apply_recompute
from dougong.model.sampling import SamplingConfig
from dougong.model.writer import Completed, WriterOutput, Written
from dougong.nn.batch import Batch, MediaBatch
from dougong.nn.block_stack import BlockStack
from dougong.objectives.contrastive import contrastive_loss
from dougong.objectives.missing import completion_loss
from dougong.recipes.generate import found_of_other, judge_writer, run_generation, writing_losses
from dougong.recipes.generation import GenerateRecipe, GenerationObjective, pretrain_joint
from dougong.recipes.known import read_any_recipe, read_recipe
from dougong.watch.word_by_word import look_at_texts

SMALL = [
    "train.steps=4",
    "train.evaluate_every=2",
    "train.checkpoint_every=2",
    "train.keep=5",
    "tokenizer.train.steps=2",
    "data.loader.batch_size=16",
    "data.preparation.image_size=16",
    "model.width=16",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.image_encoder.width=8",
    "model.image_encoder.num_heads=2",
    "model.image_encoder.pool=1",
    "model.text_encoder.width=8",
    "model.text_encoder.num_heads=2",
    "model.tokenizer.width=8",
    "model.tokenizer.num_codes=12",
]

FIGURES = {"loss", "bits", "token_accuracy", "left", "recall_at_10", "chance_at_10"}
PLAIN = ["model.align=false", "model.completion=null", "objective.spare=null"]


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tables with so few pictures that a run takes a second."""
    return prepare_captions(tmp_path_factory.mktemp("captions") / "few", limit_images=60, captions_train=1)


def small(captions: Path, *settings: str) -> GenerateRecipe:
    """pretrain-joint, made small, on those tables."""
    values = pretrain_joint().model_dump(mode="json")
    values["data"] |= {"source": None, "train": f"{captions}/train.parquet", "test": f"{captions}/test.parquet"}
    values["data"]["allow_leak"] = True  # the collection numbers its pictures anew in each part
    return parse(GenerateRecipe, override(values, [*SMALL, *settings]), where="test")


@pytest.fixture(scope="module")
def run(captions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "joint"
    run_generation(small(captions), folder, quiet=True)
    return folder


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(e["step"], e["loss"]) for e in read_events(folder / "events.jsonl") if e["kind"] == "StepDone"]


def test_a_run_leaves_figures_pictures_a_bundle_and_a_page(run: Path) -> None:
    evaluation = json.loads((run / "evaluation.json").read_text())

    assert set(evaluation["directions"]) == {"caption", "draw"}
    assert set(evaluation["directions"]["caption"]["metrics"]) == FIGURES | {"names"}
    assert set(evaluation["directions"]["draw"]["metrics"]) == FIGURES
    page = (run / "report.html").read_text()
    samples = json.loads((run / "gallery" / "samples.json").read_text())
    assert page.count("data:image/png") == 3 * len(samples) > 40
    assert all(sample["caption"] in page and sample["written"] in page for sample in samples)
    assert (run / "bundle" / "bundle.json").exists()


def test_a_resumed_run_has_the_losses_it_would_have_had(captions: Path, run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    run_generation(small(captions), folder, quiet=True)
    for path in sorted((folder / "checkpoints").iterdir())[1:]:  # as if it had been killed after step 2
        for file in path.iterdir():
            file.unlink()
        path.rmdir()

    run_generation(small(captions), folder, resume=True, quiet=True)

    assert losses(folder) == losses(run)
    assert losses(folder / "tokenizer") == losses(run / "tokenizer")
    told = [json.loads((each / "evaluation.json").read_text())["directions"] for each in (folder, run)]
    assert told[0] == told[1]


@pytest.mark.parametrize(
    "setting", [pytest.param("memory.recompute=cheap", marks=pytest.mark.slow), "memory.activations=0.9"]
)
def test_a_run_in_less_memory_is_the_same_run(
    captions: Path, run: Path, tmp_path: Path, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Sequence[Keep]] = []

    def noted(model: BlockStack[Any, Any], keep: Sequence[Keep]) -> None:
        kept.append(keep)
        apply_recompute(model, keep)

    monkeypatch.setattr(prepare, "apply_recompute", noted)
    run_generation(small(captions, setting), tmp_path / "less", quiet=True)

    assert losses(tmp_path / "less") == losses(run)
    assert losses(tmp_path / "less" / "tokenizer") == losses(run / "tokenizer")
    told = from_yaml((tmp_path / "less" / "run.yaml").read_text(), where="run.yaml")["memory"]
    assert set(kept[-1]) - {"all"}  # the run's own: what rehearsed it came before
    assert told["keep"] in (None, list(kept[-1]))


def test_what_is_saved_and_loaded_writes_the_same(captions: Path, run: Path, tmp_path: Path) -> None:
    first = load_generator(run)
    second = load_generator(load_generator(run / "bundle").save(tmp_path / "copy"))
    freely = SamplingConfig(temperature=0.9, top_p=0.9, guidance=2.0)

    drawn = [each.draw(["a red circle", "a blue circle"], sampling=freely, seed=3) for each in (first, second)]
    written = [each.caption([drawn[0][0], drawn[0][1]], sampling=freely, seed=3) for each in (first, second)]

    assert [p.tobytes() for p in drawn[0]] == [p.tobytes() for p in drawn[1]]
    assert written[0] == written[1]
    assert drawn[0][0].size == (16, 16)
    assert first.draw(["a red circle"], seed=4)[0].tobytes() != first.draw(["a red circle"], seed=5)[0].tobytes()


def test_the_figures_are_means_over_tokens_whatever_the_batch(captions: Path, run: Path) -> None:
    from dougong.data.table import open_table

    generator, table = load_generator(run), open_table(captions / "test.parquet")

    at_once = judge_writer(generator.network, table, generator.preparation, batch_size=500)
    by_seven = judge_writer(generator.network, table, generator.preparation, batch_size=7)

    for direction in ("caption", "draw"):
        assert at_once[direction].num_records == by_seven[direction].num_records > 30
        assert at_once[direction].metrics == pytest.approx(by_seven[direction].metrics, abs=1e-5)
        told = json.loads((run / "evaluation.json").read_text())["directions"][direction]["metrics"]
        assert at_once[direction].metrics["bits"] == pytest.approx(told["bits"], abs=1e-5)


def test_one_direction_takes_the_tokenizer_of_another_run(captions: Path, run: Path, tmp_path: Path) -> None:
    recipe = small(captions, f"tokenizer.take={run}", "model.directions=[draw]", *PLAIN)

    result = run_generation(recipe, tmp_path / "draw", quiet=True)

    assert set(result.evaluations) == {"draw"}
    assert not (tmp_path / "draw" / "tokenizer").exists()
    theirs = load_generator(run).network.tokenizer.state_dict()
    ours = result.generator.network.tokenizer.state_dict()
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    other = small(captions, f"tokenizer.take={run}", "model.tokenizer.num_codes=13")
    with pytest.raises(ConfigError, match="is not as model.tokenizer says"):
        run_generation(other, tmp_path / "other", quiet=True)


def test_commands_draw_and_say(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.png"

    assert main(["generate", str(run), "--text", "a red circle", "--out", str(out), "--guidance", "1.5"]) == 0
    with Image.open(out) as drawn:
        assert drawn.size == (16, 16)
    capsys.readouterr()
    assert main(["generate", str(run), "--image", str(out), "--temperature", "0", "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out)["caption"], str)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs one of --text and --image"),
        (["--text", " "], "input 0 is empty"),
        (["--image", "nowhere.png"], "nowhere.png cannot be read"),
        (["--text", "a red circle", "--top-p", "3"], "top_p"),
        (["--text", "a red circle", "--out", "no/such/folder/x.png"], "cannot be written"),
    ],
)
def test_mistakes_get_one_line(
    run: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(run), *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1


def test_files_that_are_no_pictures_and_bundles_that_do_not_write_are_refused(
    run: Path, colour_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "x.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match="input 0 is not a picture"):
        load_generator(run).caption([tmp_path / "x.png"])
    with pytest.raises(BundleError, match="holds a model that decides, not one that writes"):
        load_generator(colour_run)
    with pytest.raises(BundleError, match="holds a writer, not a model that decides"):
        dougong.load(run / "bundle")
    with pytest.raises(RunError, match="holds a run already"):
        run_generation(pretrain_joint(), run, quiet=True)


def test_recipes_of_both_kinds_are_read_by_name_and_from_yaml(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(to_yaml(pretrain_joint()))

    assert read_any_recipe(str(path)) == pretrain_joint() == read_any_recipe("pretrain-joint")
    alone: Any = read_any_recipe("vqa-generate", ["model.directions=[caption]"])
    assert alone.model.directions == ("caption",)
    assert from_yaml(to_yaml(alone), where="x")["kind"] == "generate"
    with pytest.raises(ConfigError, match="learns to generate, not to decide"):
        read_recipe("vqa-generate")
    with pytest.raises(ConfigError, match="guidance=1.5 needs model.condition_dropped above 0"):
        read_any_recipe("vqa-generate", ["model.condition_dropped=0"])
    with pytest.raises(ConfigError, match="is of kind 'paint'. Use align, generate, decode, or leave it out"):
        read_any_recipe("vqa-generate", ["kind=paint"])


def test_a_page_tells_where_each_word_of_a_caption_came_from(
    captions: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "words.html"

    assert main(["watch", str(run), "--record", "2", "--out", str(page), "--json"]) == 0

    (record,) = json.loads(capsys.readouterr().out)["records"]
    table, model = open_table(captions / "test.parquet"), load_generator(run)
    picture = table.records([2], ["image"])[0]["image"]["bytes"]
    assert record["text"] == model.caption([picture])[0]
    assert "<script" not in page.read_text(encoding="utf-8")
    assert "from what was completed" in page.read_text(encoding="utf-8")
    with torch.no_grad():  # it has hardly learnt, and would end at once
        model.network.out.bias[model.end] = -100.0

    (record,) = look_at_texts(model, table, [2])["records"]

    assert record["text"] == model.caption([picture])[0]
    assert len(record["words"]) == min(32, record["num_words"]) > 3
    batch = batch_of_cells(model.preparation, "image", [picture], 0, torch.device("cpu"))
    ids_BN = model.write_ids(batch)
    nothing_B, there_B = torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.bool)
    own = MediaBatch({"ids_UT": ids_BN, "mask_UT": torch.ones_like(ids_BN, dtype=torch.bool)}, nothing_B, there_B)
    with torch.no_grad():
        output = model.network(batch._replace(media={**batch.media, model.network.words: own}))
    assert record["words"][0]["share"]["image"] > 0.01
    assert any(word["share"]["(completed)"] > 0.01 for word in record["words"])
    chance_NV = output.written["caption"].score_RNV[0].softmax(dim=1)
    for place, word in enumerate(record["words"]):
        assert sum(word["share"].values()) == pytest.approx(1.0, abs=1e-4)
        assert len(word["maps"]["image"]) == 16  # the mark before them stands for no place
        assert set(word["maps"]) == {"image"}
        assert set(word["share"]) == {"image", "(completed)", "caption"}
        assert word["chance"] == pytest.approx(float(chance_NV[place, ids_BN[0, place + 1]]), rel=1e-3)
        assert len(word["before"]["tokens"]) == len(word["before"]["weights"]) == place + 1


def test_a_model_that_only_draws_has_no_words_to_look_into(
    captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_generation(small(captions, "model.directions=[draw]"), tmp_path / "drawing", quiet=True)
    command = ["watch", str(tmp_path / "drawing"), "--record", "0", "--out", str(tmp_path / "x.html")]

    assert main(command) == 2

    assert "has learnt to draw, not to caption" in capsys.readouterr().err


def test_a_table_without_labels_is_learnt_from_and_says_nothing_of_names(captions: Path, tmp_path: Path) -> None:
    for part in ("train", "test"):
        table = pq.read_table(captions / f"{part}.parquet").drop_columns(["named", "colour", "shape"])
        pq.write_table(table, tmp_path / f"{part}.parquet")
    values = small(captions, "objective.spare=null").model_dump(mode="json")
    values["data"] |= {name: str(tmp_path / f"{name}.parquet") for name in ("train", "test")}
    values["data"] |= {"target": None, "columns": {"image_id": "ignore"}}

    result = run_generation(parse(GenerateRecipe, values, where="test"), tmp_path / "run", quiet=True)

    assert set(result.evaluations["caption"].metrics) == FIGURES
    assert (tmp_path / "run" / "bundle").is_dir()


def test_numbers_named_as_the_target_are_no_names_and_end_no_run(captions: Path, tmp_path: Path) -> None:
    for part in ("train", "test"):
        table = pq.read_table(captions / f"{part}.parquet").drop_columns(["named", "colour", "shape"])
        score = pa.array([None if place % 5 == 0 else place / 7 for place in range(table.num_rows)])
        pq.write_table(table.append_column("score", score), tmp_path / f"{part}.parquet")
    values = small(captions, "objective.spare=null").model_dump(mode="json")
    values["data"] |= {name: str(tmp_path / f"{name}.parquet") for name in ("train", "test")}
    values["data"] |= {"target": "score", "columns": {"image_id": "ignore"}}

    result = run_generation(parse(GenerateRecipe, values, where="test"), tmp_path / "run", quiet=True)

    assert "names" not in result.evaluations["caption"].metrics
    assert result.evaluations["caption"].num_records == pq.read_table(tmp_path / "test.parquet").num_rows


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.withhold=0.3", "data.withhold=0.3 has no effect"),
        ("data.corrupt={}", "has no effect"),
        ("data.conditions={a: [image]}", "has no effect"),
        ("train.sampling={}", "none is made"),
        ("tokenizer.train.sampling={}", "none is made"),
        ("data.loader.batch_size=1", "leaves some of 2 directions without a record"),
        ("model.align=false", "objective.spare=named cannot take effect. Set model.align: true, or leave spare out"),
        ("objective.completion_weight=-1", "-1.0 must not be below 0"),
    ],
)
def test_what_a_writer_does_not_do_is_refused(captions: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(captions, setting)


def test_an_average_of_the_tokenizers_weights_is_what_is_kept(captions: Path, tmp_path: Path) -> None:
    recipe = small(captions, "tokenizer.train.ema=0.5", "tokenizer.train.steps=4", "train.steps=2")
    result = run_generation(recipe, tmp_path / "run", quiet=True)
    kept = best_weights(tmp_path / "run" / "tokenizer")
    found = {name: value.clone() for name, value in result.generator.network.tokenizer.state_dict().items()}
    load_weights(result.generator.network.tokenizer, kept)  # of an average, where there is one
    for name, value in result.generator.network.tokenizer.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    last = load_file(kept / "model.safetensors")
    assert any(not torch.equal(found[name], value) for name, value in last.items())


# Completing and aligning ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("objective.align_weight=2", "objective.align_weight=2.0 cannot take effect. Set model.align: true"),
        ("objective.spare=named", "objective.spare=named cannot take effect. Set model.align: true"),
        ("objective.completion_weight=2", "objective.completion_weight=2.0 cannot take effect. Set model.completion"),
        ("model.completion.num_heads=3", "completion.num_heads=3 cannot share out width=64"),
    ],
)
def test_a_part_that_is_not_there_is_not_weighed(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_any_recipe("vqa-generate", [setting])


def test_a_column_to_spare_by_that_a_table_lacks_is_told_before_anything_is_trained(
    captions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = small(captions, "objective.spare=shade")
    with pytest.raises(ConfigError, match=r"objective.spare names 'shade', which train.parquet lacks\. Use one of"):
        run_generation(recipe, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "tokenizer").exists()

    (tmp_path / "mine.yaml").write_text(to_yaml(recipe))
    assert main(["check", str(tmp_path / "mine.yaml")]) == 2
    assert "objective.spare names 'shade'" in capsys.readouterr().err


def records(present: list[bool], target: torch.Tensor | None = None) -> Batch:
    """Records that each have a picture and a caption of their own; of the pictures, some lack one."""
    there_B, index_B = torch.tensor(present), torch.arange(len(present))
    own = {name: MediaBatch({"v": index_B}, index_B, torch.ones_like(there_B)) for name in ("image", "caption")}
    return Batch({**own, "image": own["image"]._replace(present_B=there_B)}, target)


def test_what_was_completed_is_held_against_the_truth_of_records_that_were_told_and_have_it() -> None:
    torch.manual_seed(0)
    made_RKD, truth_UKD = torch.randn(3, 2, 4), torch.randn(4, 2, 4)
    completed = Completed(made_RKD, torch.tensor([True, False, True]), truth_UKD)
    nothing_R1 = torch.zeros(3, 1, dtype=torch.int64)
    # Of records 0, 1 and 3: 1 was not told what it is about, 3 has no picture.
    written = Written(torch.zeros(3, 1, 5), nothing_R1, nothing_R1.bool(), torch.tensor([0, 1, 3]), completed)
    batch = records([True, True, True, False])
    content: Any = {"draw": "image"}

    def losses(**settings: Any) -> dict[str, torch.Tensor]:
        return writing_losses(
            WriterOutput({"draw": written}, {}, 0.07), batch, GenerationObjective(**settings), content
        )

    wanted = completion_loss(made_RKD[:1], truth_UKD, torch.tensor([0]))
    torch.testing.assert_close(losses(completion_weight=0.5)["draw completed"], 0.5 * wanted)
    assert set(losses(completion_weight=0.0)) == {"draw"}


def test_records_of_one_key_are_not_held_against_each_other_and_the_temperature_is_the_models() -> None:
    torch.manual_seed(0)
    vectors = {name: torch.nn.functional.normalize(torch.randn(4, 8), dim=1) for name in ("image", "caption")}
    there_B = torch.tensor([True, True, True, False])

    def alignment(keys: list[int] | None, temperature: float) -> torch.Tensor:
        batch = records(there_B.tolist(), None if keys is None else torch.tensor(keys))
        output = WriterOutput({}, vectors, torch.tensor(temperature))
        return writing_losses(output, batch, GenerationObjective(align_weight=2.0), {})["alignment"]

    def wanted(negative_UV: torch.Tensor | None, temperature: float) -> torch.Tensor:
        index = torch.arange(3)
        own = (vectors["image"], vectors["caption"], index, index)
        return 2.0 * contrastive_loss(*own, temperature=temperature, negative_UV=negative_UV)

    alike_UV = torch.ones(4, 4)
    alike_UV[0, 2] = alike_UV[2, 0] = 0.0
    alike_UV[0, 3] = alike_UV[2, 3] = 0.0  # of the last record, which has no picture
    torch.testing.assert_close(alignment([5, 6, 5, 5], 0.2), wanted(alike_UV, 0.2))
    torch.testing.assert_close(alignment(None, 0.07), wanted(None, 0.07))
    assert not torch.isclose(alignment(None, 0.07), alignment(None, 0.2))


def test_training_spares_records_of_one_name(captions: Path, tmp_path: Path) -> None:
    spared = run_generation(small(captions, "train.steps=1"), tmp_path / "spared", quiet=True)
    run_generation(small(captions, "train.steps=1", "objective.spare=null"), tmp_path / "held", quiet=True)

    assert losses(tmp_path / "spared") < losses(tmp_path / "held")  # the same weights and batch, fewer to tell from
    assert any("with the same named are left out" in note for note in spared.notes)


def one_by_one(model: Generator, name: str, cells: list[Any]) -> torch.Tensor:
    """Vectors of records, each in a batch of its own."""
    device = torch.device("cpu")
    batches = [batch_of_cells(model.preparation, name, [cell], 0, device) for cell in cells]
    with torch.no_grad():
        return torch.cat([model.network.vectors(batch.media[name], name) for batch in batches])


@pytest.mark.parametrize("without", [(), (1, 2)])
def test_a_records_own_is_looked_for_among_distinct_media_of_other_names(
    captions: Path, run: Path, tmp_path: Path, without: tuple[int, ...]
) -> None:
    """`without`: of three records in turn, which have no picture; their captions are among what is looked through."""
    model, table = load_generator(run), pq.read_table(captions / "test.parquet")
    rows = table.to_pylist()
    images = one_by_one(model, "image", [row["image"]["bytes"] for row in rows])
    captions_ND = one_by_one(model, "caption", [row["caption"] for row in rows])
    named, texts = [row["named"] for row in rows], [row["caption"] for row in rows]
    pictures = [row["image"]["bytes"] for row in rows]
    seen = [place for place in range(len(rows)) if place % 3 not in without]
    kept = [row["image"] if place in seen else None for place, row in enumerate(rows)]
    place = table.schema.get_field_index("image")
    pq.write_table(
        table.set_column(place, "image", pa.array(kept, table.schema.field(place).type)), tmp_path / "t.parquet"
    )

    found = found_of_other(model.network, open_table(tmp_path / "t.parquet"), model.preparation, spare="named")

    for direction, query_ND, other_ND, what, there in (
        ("caption", images, captions_ND, texts, range(len(rows))),
        ("draw", captions_ND, images, pictures, seen),
    ):
        score_NN = query_ND @ other_ND.T
        right, chance = [], []
        for row in seen:
            others = {what[other]: other for other in there if named[other] != named[row]}
            before = sum(bool(score_NN[row, other] >= score_NN[row, row]) for other in others.values())
            right.append(before < 10)
            chance.append(min(1.0, 10 / (1 + len(others))))
        figures = found[direction]  # type: ignore[index]
        assert figures["recall_at_10"] == pytest.approx(sum(right) / len(right))
        assert figures["chance_at_10"] == pytest.approx(sum(chance) / len(chance))
    assert 0 < found["caption"]["chance_at_10"] < 1


@pytest.mark.slow
def test_what_is_left_falls_as_completing_is_learnt(captions: Path, tmp_path: Path) -> None:
    """Little is learnt in so few steps: the mean of the truths, from what a random start makes."""
    figures = {}
    for weight in (0.0, 3.0):
        settings = [f"objective.completion_weight={weight}", "train.steps=40", "train.evaluate_every=40"]
        recipe = small(captions, *settings, "train.optimizer.warmup_ratio=0.0")
        result = run_generation(recipe, tmp_path / f"weighs-{weight}", quiet=True)
        figures[weight] = {name: found.metrics["left"] for name, found in result.evaluations.items()}

    assert all(figures[3.0][name] < 0.7 * figures[0.0][name] for name in ("caption", "draw"))


def test_a_bundle_from_before_temperatures_were_learnt_still_writes(captions: Path, tmp_path: Path) -> None:
    settings = ["model.learn_temperature=false", "model.completion=null", "objective.spare=null", "train.steps=1"]
    written = run_generation(small(captions, *settings), tmp_path / "run", quiet=True).generator
    manifest = tmp_path / "run" / "bundle" / "bundle.json"
    told = json.loads(manifest.read_text())
    for name in ("temperature", "learn_temperature", "completion"):
        del told["model"][name]
    manifest.write_text(json.dumps(told))

    read = load_generator(tmp_path / "run")

    assert read.network.config == written.network.config
    assert read.draw(["a red circle"], seed=1)[0].tobytes() == written.draw(["a red circle"], seed=1)[0].tobytes()
