"""A whole small run of the large decoder: that it learns, resumes and writes, on one process and on many layouts."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tokenizers import Tokenizer

import dougong
from dougong.bundle.describer import Describer, load_describer, load_writing
from dougong.bundle.generator import load_generator
from dougong.cli.main import main
from dougong.core.config import from_yaml, override, parse, to_yaml
from dougong.core.errors import BundleError, ConfigError
from dougong.core.events import read_events
from dougong.data.batch import BatchArrays
from dougong.data.position import Position
from dougong.data.sources.captions import prepare_captions
from dougong.data.table import open_table
from dougong.engine.batches import to_tensors
from dougong.engine.parallel.ranks import ALONE, Ranks
from dougong.engine.weights import put_weights
from dougong.model.deepseek import read_deepseek
from dougong.model.sampling import SamplingConfig
from dougong.nn.batch import MediaBatch
from dougong.recipes.decode import run_decode
from dougong.recipes.decoding import DecodeRecipe, caption_decoder
from dougong.recipes.known import read_any_recipe, read_laid_out
from dougong.recipes.settle import SETTINGS, lay_out, settle_recipe
from dougong.recipes.training import begin_run, training_loader
from dougong.watch.word_by_word import _arrays

SMALL = [
    "train.steps=60",
    "train.optimizer.learning_rate=0.01",
    "train.evaluate_every=30",
    "train.checkpoint_every=20",
    "train.keep=5",
    "data.loader.batch_size=16",
    "data.loader.workers=0",
    "data.preparation.image_size=16",
    # Each rank's pictures are changed at random by themselves.
    "data.preparation.image_augment={}",
    "model.width=16",
    "model.num_layers=3",
    # Of two stages, the first has no experts.
    "model.num_dense=2",
    "model.num_further=1",
    "model.latent_rank=8",
    "model.hidden=32",
    "model.experts.hidden=8",
    "model.encoders.image.width=8",
    "model.encoders.image.num_heads=2",
    "model.encoders.image.pool=1",
]
FEW = ["train.steps=4", "train.evaluate_every=2", "train.checkpoint_every=2"]


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tables with so few pictures that a run takes a second."""
    return prepare_captions(tmp_path_factory.mktemp("captions") / "few", limit_images=60, captions_train=1)


def small(captions: Path, *settings: str) -> DecodeRecipe:
    """caption-decoder, made small, on those tables."""
    values = caption_decoder().model_dump(mode="json")
    values["data"] |= {"source": None, "train": f"{captions}/train.parquet", "test": f"{captions}/test.parquet"}
    values["data"]["allow_leak"] = True  # the collection numbers its pictures anew in each part
    return parse(DecodeRecipe, override(values, [*SMALL, *settings]), where="test")


@pytest.fixture(scope="module")
def run(captions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "captions"
    run_decode(small(captions), folder, quiet=True)
    return folder


def losses(folder: Path) -> list[float]:
    return [event["loss"] for event in read_events(folder / "events.jsonl") if event["kind"] == "StepDone"]


def test_it_learns_more_than_how_often_each_word_comes(captions: Path, run: Path) -> None:
    tokenizer = load_describer(run).preparation.modalities["caption"].tokenizer  # type: ignore[attr-defined]
    texts = {part: open_table(captions / f"{part}.parquet").column("caption").to_pylist() for part in ("train", "test")}
    words = {part: [word for text in found for word in tokenizer.encode(text).ids[1:]] for part, found in texts.items()}
    counts = Counter(words["train"])
    unigram = -sum(math.log((counts[word] or 1) / len(words["train"])) for word in words["test"]) / len(words["test"])

    figures = json.loads((run / "evaluation.json").read_text())["directions"]["all"]

    assert figures["num_records"] == len(texts["test"]) > 30
    assert figures["metrics"]["loss"] < 0.8 * unigram
    assert figures["metrics"]["bits"] == pytest.approx(figures["metrics"]["loss"] / math.log(2))
    page = (run / "report.html").read_text()
    samples = json.loads((run / "gallery" / "samples.json").read_text())
    assert page.count("data:image/png") == len(samples) > 10
    assert all(sample["caption"] in page and sample["written"] in page for sample in samples)


def test_a_resumed_run_has_the_losses_it_would_have_had(captions: Path, run: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    for name in ("step-00000040", "step-00000060"):  # as if it had been killed soon after step 20
        shutil.rmtree(cut / "checkpoints" / name)
    shutil.rmtree(cut / "bundle")

    run_decode(small(captions), cut, resume=True, quiet=True)

    assert losses(cut) == losses(run)
    assert (
        json.loads((cut / "evaluation.json").read_text())["directions"]
        == (json.loads((run / "evaluation.json").read_text())["directions"])
    )


def test_what_is_saved_and_loaded_writes_the_same(captions: Path, run: Path, tmp_path: Path) -> None:
    first = load_describer(run)
    second = load_describer(load_describer(run / "bundle").save(tmp_path / "copy"))
    pictures = [cell["bytes"] for cell in open_table(captions / "test.parquet").column("image").to_pylist()[:3]]
    freely = SamplingConfig(temperature=2.0)

    likeliest = [each.caption(pictures) for each in (first, second)]
    free = [each.caption(pictures, sampling=freely, seed=3) for each in (first, second)]

    assert likeliest[0] == likeliest[1]
    assert free[0] == free[1] != likeliest[0]
    assert first.caption(pictures, sampling=freely, seed=4) != free[0]
    assert all(" " in text for text in likeliest[0])


def run_few(captions: Path, folder: Path, plan: dict[str, Any], resume: bool = False) -> dict[str, Any]:
    ranks = Ranks(dist.group.WORLD) if dist.is_initialized() else ALONE
    recipe = small(captions, *FEW, f"plan={json.dumps(plan)}", "train.accumulation=2")
    figures: dict[str, Any] = run_decode(recipe, folder, quiet=True, ranks=ranks, resume=resume).as_json()["figures"]
    return figures


@pytest.mark.slow
def test_every_layout_has_the_losses_and_figures_of_one_process(captions: Path, tmp_path: Path) -> None:
    want = run_few(captions, tmp_path / "one", {})
    layouts: list[dict[str, Any]] = [
        {"tensor": 2, "context": 2},
        {"pipeline": 2, "expert": 2},
        {"shard": 2, "expert": 4},
    ]
    for place, plan in enumerate(layouts):
        folder = tmp_path / str(place)
        found = run_ranks(run_few, captions, folder, plan, world=4, limit_seconds=120)
        assert losses(folder) == pytest.approx(losses(tmp_path / "one"), rel=1e-4), plan
        for figures in found:
            assert figures["all"] == pytest.approx(want["all"], rel=1e-4), plan
        assert load_describer(folder).manifest.files.keys() == load_describer(tmp_path / "one").manifest.files.keys()

    shutil.rmtree(tmp_path / "0" / "checkpoints" / "step-00000004")
    run_few(captions, tmp_path / "0", {}, resume=True)
    assert losses(tmp_path / "0") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_layout_that_is_left_open_is_chosen(captions: Path, tmp_path: Path) -> None:
    recipe = small(captions, "plan=null")
    chosen = lay_out(recipe, tmp_path / "run", 4).plan

    settled = settle_recipe(recipe, tmp_path / "run", resume=False, world=4)

    assert settled.plan == chosen is not None
    kept = from_yaml((tmp_path / "run" / SETTINGS).read_text(), where="test")
    assert parse(DecodeRecipe, kept, where="test").plan == chosen


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("plan.expert=3", "expert=3 cannot share out 4 experts: every rank needs as many. Use expert in [1, 2, 4]"),
        ("plan.tensor=3", "num_attention_heads=2: every rank needs an equal part. Use tensor in [1, 2]"),
        ("data.modalities=[image]", "model.writes is not given and there is not just one: the texts here are none"),
        ("model.writes=image", "model.writes 'image' is no text: the texts here are caption. Name one of them"),
    ],
)
def test_what_cannot_be_is_refused_before_any_rank_is_connected(
    setting: str,
    message: str,
    captions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def connect(*given: Any, **named: Any) -> None:
        raise AssertionError("a process group was started")

    monkeypatch.setattr(dist, "init_process_group", connect)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "3"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    file = tmp_path / "small.yaml"
    file.write_text(to_yaml(small(captions)))

    assert main(["train", str(file), "--set", setting, "--out", str(tmp_path / "run")]) == 2

    told = capsys.readouterr().err
    assert message in told
    assert len(told.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_table_of_pictures_and_texts_alone_is_enough(captions: Path, tmp_path: Path) -> None:
    for part in ("train", "test"):
        table = pq.read_table(captions / f"{part}.parquet").select(["image", "caption"])
        pq.write_table(table.rename_columns(["image", "answer"]), tmp_path / f"{part}.parquet")
    settings = ["data.target=null", "data.columns={}", "data.unit=null", "data.allow_leak=false"]
    recipe = small(tmp_path, *FEW, *settings)

    result = run_decode(recipe, tmp_path / "run", quiet=True)

    assert result.describer.network.writes == "answer"
    assert result.evaluations["all"].num_records == result.tables.test.num_rows > 30
    assert not result.evaluations["all"].bad


def test_one_of_words_alone_is_exported_for_others(captions: Path, run: Path, tmp_path: Path) -> None:
    recipe = small(captions, *FEW, "data.modalities=[caption]", "model.encoders={}")
    describer = run_decode(recipe, tmp_path / "run", quiet=True).describer

    config, num_words, weights = read_deepseek(describer.export(tmp_path / "theirs"))

    network = describer.network
    assert num_words == network.words.num_embeddings
    again = config.build(describer.preparation.signature())
    put_weights(again, weights, where="test")
    ids_BN = torch.tensor([[2, 5, 7, 9]])
    assert torch.equal(again.eval().score_next(ids_BN)[0], network.score_next(ids_BN)[0])
    assert Tokenizer.from_file(str(tmp_path / "theirs" / "tokenizer.json")).get_vocab_size() == num_words
    with pytest.raises(ConfigError, match="the decoder reads image, for which this format has no names"):
        load_describer(run).export(tmp_path / "none")


def test_commands_judge_it_and_write(captions: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = str(run / "gallery" / "0-true.png")
    figures = json.loads((run / "evaluation.json").read_text())["directions"]["all"]["metrics"]

    assert main(["generate", str(run), "--image", picture, "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out)["caption"], str)
    assert main(["evaluate", str(run), "--missing", "image", "--json"]) == 0
    judged = json.loads(capsys.readouterr().out)
    assert judged["all"]["metrics"] == pytest.approx(figures, abs=1e-5)
    assert judged["without image"]["metrics"]["loss"] > figures["loss"]
    assert main(["evaluate", str(run / "bundle"), "--data", str(captions / "train.parquet"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["all"]["num_records"] > 30
    assert main(["check", str(run / SETTINGS), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tables"]["test"]["bad"] == 0
    assert main(["plan", str(run / SETTINGS), "--devices", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layouts"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "{run}", "--text", "a red circle"], "writes words and draws nothing"),
        (["generate", "{run}", "--image", "x.png", "--guidance", "2"], "has no --guidance"),
        (["generate", "{run}", "--image", "nowhere.png"], "nowhere.png cannot be read"),
        (["evaluate", "{run}", "--missing", "caption"], "'caption' is no modality of this model. Use some of image"),
        (["evaluate", "{run}", "--contribution"], "holds a decoder, not a model that decides"),
        (["predict", "{run}", "x.parquet", "y.csv"], "holds a decoder, not a model that decides"),
        (["train", "caption-decoder", "--set", "sampling.guidance=2"], "sampling.guidance=2.0 draws away"),
        (["train", "caption-decoder", "--set", "train.sampling={}"], "train.sampling follows what a decision loses"),
        (["plan", "vqa-generate"], "learns to generate, in one process only"),
    ],
)
def test_mistakes_get_one_line(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([each.replace("{run}", str(run)) for each in arguments]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.strip().splitlines()) == 1


def test_it_is_told_apart_from_other_kinds(run: Path, tmp_path: Path) -> None:
    assert load_writing(run).manifest.name == load_writing(run / "bundle").manifest.name == "caption-decoder"
    with pytest.raises(BundleError, match="holds a decoder, not a model that decides"):
        dougong.load(run / "bundle")
    with pytest.raises(BundleError, match="not one that writes"):
        load_generator(run)
    path = tmp_path / "mine.yaml"
    path.write_text(to_yaml(caption_decoder()))
    assert read_any_recipe(str(path)) == caption_decoder() == read_laid_out("caption-decoder")
    with pytest.raises(ConfigError, match="is of kind 'paint'. Use align, generate, decode, or leave it out"):
        read_any_recipe("caption-decoder", ["kind=paint"])


def chances(model: Describer, captions: Path, record: dict[str, Any]) -> list[float]:
    """Of the words that were written, as one forward of the whole text has them."""
    table = open_table(captions / "test.parquet")
    (cells,) = table.records([record["row"]], ["image", "caption"])
    batch = to_tensors(_arrays(model, record["row"], cells, table.folder))
    ids_BN = model.write_ids(batch)[:, : len(record["words"]) + 1]
    own = MediaBatch(
        {"ids_UT": ids_BN, "mask_UT": torch.ones_like(ids_BN, dtype=torch.bool)},
        torch.zeros(1).long(),
        torch.ones(1).bool(),
    )
    with torch.no_grad():
        score_NV = model.network(batch._replace(media={**batch.media, "caption": own})).score_BNV[0]
    return [float(score_V.softmax(0)[word]) for score_V, word in zip(score_NV, ids_BN[0, 1:], strict=False)]


def test_a_page_tells_where_each_written_word_came_from(
    captions: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "words.html"

    assert main(["watch", str(run), "--record", "2", "--record", "0", "--out", str(page), "--json"]) == 0

    told = json.loads(capsys.readouterr().out)
    model = load_describer(run)
    written = page.read_text(encoding="utf-8")
    assert [record["row"] for record in told["records"]] == [2, 0]
    for record in told["records"]:
        picture = open_table(captions / "test.parquet").records([record["row"]], ["image"])[0]["image"]["bytes"]
        assert record["text"] == model.caption([picture])[0]
        assert record["text"] in written
        assert len(record["words"]) == min(32, record["num_words"]) > 0
        for place, word in enumerate(record["words"]):
            assert sum(word["share"].values()) == pytest.approx(1.0, abs=1e-4)
            assert len(word["before"]["tokens"]) == place + 1
        assert [word["chance"] for word in record["words"]] == pytest.approx(chances(model, captions, record), rel=1e-3)
        # The first word has only what begins every text before it, so it came from the picture as well.
        assert record["words"][0]["share"]["image"] > 0.01
    assert "<script" not in written
    assert written.count('class="heat"') >= sum(len(record["words"]) for record in told["records"])


def test_who_looks_into_a_record_that_is_not_there_is_told_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", str(run), "--record", "99999", "--out", str(tmp_path / "x.html")]) == 2

    assert "--record 99999 is not in" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()


def test_the_text_that_is_to_be_written_is_neither_withheld_nor_spoilt(captions: Path, tmp_path: Path) -> None:
    plain, _, preparation, *_ = begin_run(small(captions), tmp_path / "plain", resume=False, quiet=True)
    settings = ["data.withhold=0.5", "data.corrupt={chance: 1.0, spare_one: false}"]
    spoilt, tables, *_ = begin_run(small(captions, *settings), tmp_path / "spoilt", resume=False, quiet=True)
    views = small(captions, "data.views=[{keep: [image]}]")

    def batch_of(recipe: DecodeRecipe) -> BatchArrays:
        _, found = next(iter(training_loader(recipe, tables, preparation).batches(Position())))
        return found

    whole, less, viewed = batch_of(plain), batch_of(spoilt), batch_of(views)
    words = [each.media["caption"] for each in (whole, less, viewed)]
    assert all(each.present_B.all() for each in words)
    np.testing.assert_array_equal(words[0].values["ids_UT"], words[1].values["ids_UT"])
    assert words[1].level_U is None or not words[1].level_U.any()
    seen = less.media["image"]
    assert 0 < seen.present_B.sum() < len(seen.present_B)
    assert seen.level_U is not None
    assert seen.level_U.all()
