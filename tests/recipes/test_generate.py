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
from dougong.bundle.generator import batch_of_cells, load_generator
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
from dougong.nn.batch import MediaBatch
from dougong.nn.block_stack import BlockStack
from dougong.recipes.generate import judge_writer, run_generation
from dougong.recipes.generation import GenerateRecipe, pretrain_joint
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
    assert set(evaluation["directions"]["caption"]["metrics"]) == {"loss", "bits", "token_accuracy", "names"}
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
    recipe = small(captions, f"tokenizer.take={run}", "model.directions=[draw]", "model.align=false")

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
    chance_NV = output.written["caption"].score_RNV[0].softmax(dim=1)
    for place, word in enumerate(record["words"]):
        assert sum(word["share"].values()) == pytest.approx(1.0, abs=1e-4)
        assert len(word["maps"]["image"]) == 16  # the mark before them stands for no place
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
    values = small(captions).model_dump(mode="json")
    values["data"] |= {name: str(tmp_path / f"{name}.parquet") for name in ("train", "test")}
    values["data"] |= {"target": None, "columns": {"image_id": "ignore"}}

    result = run_generation(parse(GenerateRecipe, values, where="test"), tmp_path / "run", quiet=True)

    assert set(result.evaluations["caption"].metrics) == {"loss", "bits", "token_accuracy"}
    assert (tmp_path / "run" / "bundle").is_dir()


def test_numbers_named_as_the_target_are_no_names_and_end_no_run(captions: Path, tmp_path: Path) -> None:
    for part in ("train", "test"):
        table = pq.read_table(captions / f"{part}.parquet").drop_columns(["named", "colour", "shape"])
        score = pa.array([None if place % 5 == 0 else place / 7 for place in range(table.num_rows)])
        pq.write_table(table.append_column("score", score), tmp_path / f"{part}.parquet")
    values = small(captions).model_dump(mode="json")
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
