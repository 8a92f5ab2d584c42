"""Pictures of words over HTTP, by a writer made small that has hardly learnt."""

import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from serving import serving

from dougong.bundle.generator import load_generator
from dougong.core.config import override, parse
from dougong.data.sources.captions import prepare_captions
from dougong.recipes.generate import run_generation
from dougong.recipes.generation import GenerateRecipe, pretrain_joint
from dougong.serve.backend import load_backend
from dougong.serve.models import Wanted
from dougong.serve.workers import ThreadWorkers

pytestmark = pytest.mark.slow

SMALL = [
    "train.steps=2",
    "train.evaluate_every=2",
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


def test_the_server_draws_what_the_bundle_draws(tmp_path: Path) -> None:
    captions = prepare_captions(tmp_path / "few", limit_images=40, captions_train=1)
    values = pretrain_joint().model_dump(mode="json")
    values["data"] |= {"source": None, "train": f"{captions}/train.parquet", "test": f"{captions}/test.parquet"}
    values["data"]["allow_leak"] = True
    run_generation(parse(GenerateRecipe, override(values, SMALL), where="test"), tmp_path / "run", quiet=True)
    bundle = tmp_path / "run" / "bundle"
    (wanted,) = load_generator(bundle).draw(["a red circle"], seed=3)

    settings: dict[str, Any] = {"batching": {"slo_seconds": 5.0, "timeout_seconds": 60.0}}
    workers = lambda each: ThreadWorkers(lambda: load_backend(each.folder, {}))  # noqa: E731
    with serving([Wanted("pictures", "1", bundle)], workers=workers, **settings) as server:
        status, picture, headers = server.ask("POST", "/v1/draw", {"text": "a red circle", "seed": 3})
        assert (status, headers["content-type"]) == (200, "image/png")
        assert Image.open(io.BytesIO(picture)).convert("RGB").tobytes() == wanted.convert("RGB").tobytes()
        for mistake, reason in (
            ({"text": ""}, "is empty"),
            ({"text": "a", "seed": "x"}, "is no whole number"),
            ({"text": "a", "heat": 1}, "'heat' is no option"),
        ):
            status, refused, _ = server.ask("POST", "/v1/draw", mistake)
            assert (status, reason in refused["error"]) == (422, True), refused
