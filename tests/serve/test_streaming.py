"""Words while they are written, by a decoder made small that has hardly learnt."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from serving import serving

from dougong.bundle.describer import Describer, load_describer
from dougong.core.config import override, parse
from dougong.core.errors import ConfigError, DataError
from dougong.data.sources.captions import prepare_captions
from dougong.model.sampling import SamplingConfig
from dougong.recipes.decode import run_decode
from dougong.recipes.decoding import DecodeRecipe, caption_decoder
from dougong.serve.backend import WritingBackend
from dougong.serve.models import Wanted
from dougong.serve.streaming import words_as_written
from dougong.serve.workers import ThreadWorkers

pytestmark = pytest.mark.slow

SMALL = [
    "train.steps=8",
    "train.evaluate_every=8",
    "data.loader.batch_size=16",
    "data.loader.workers=0",
    "data.preparation.image_size=16",
    "model.width=16",
    "model.num_layers=2",
    "model.latent_rank=8",
    "model.hidden=32",
    "model.experts.hidden=8",
    "model.encoders.image.width=8",
    "model.encoders.image.num_heads=2",
    "model.encoders.image.pool=1",
]


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_captions(tmp_path_factory.mktemp("captions") / "few", limit_images=20, captions_train=1)


@pytest.fixture(scope="module")
def run(captions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = caption_decoder().model_dump(mode="json")
    values["data"] |= {"source": None, "train": f"{captions}/train.parquet", "test": f"{captions}/test.parquet"}
    values["data"]["allow_leak"] = True
    folder = tmp_path_factory.mktemp("runs") / "captions"
    run_decode(parse(DecodeRecipe, override(values, SMALL), where="test"), folder, quiet=True)
    return folder


@pytest.fixture(scope="module")
def content(captions: Path) -> bytes:
    cell = pq.read_table(captions / "test.parquet").to_pylist()[0]["image"]
    found: bytes = cell["bytes"] if cell.get("bytes") is not None else (captions / cell["path"]).read_bytes()
    return found


@pytest.fixture(scope="module")
def model(run: Path) -> Describer:
    return load_describer(run)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0, "seed": 3}])
def test_pieces_put_together_are_the_caption(model: Describer, content: bytes, options: dict[str, Any]) -> None:
    sampling = SamplingConfig(temperature=options["temperature"])

    pieces = list(words_as_written(model, content, options))

    assert len(pieces) > 1
    assert "".join(pieces) == model.caption([content], sampling=sampling, seed=options.get("seed", 0))[0]


def test_who_stops_reading_stops_the_writing(model: Describer, content: bytes) -> None:
    pieces = words_as_written(model, content, {"temperature": 1.0})
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]  # it is a generator

    assert not model.network.words._forward_hooks
    assert list(words_as_written(model, content, {"temperature": 0}))


def test_what_cannot_be_written_about_is_refused(model: Describer, content: bytes) -> None:
    with pytest.raises(DataError, match="is not a picture"):
        list(words_as_written(model, b"none", {}))
    with pytest.raises(ConfigError, match="no setting 'heat'"):
        list(words_as_written(model, content, {"heat": 1}))
    with pytest.raises(ConfigError, match="is no whole number"):
        list(words_as_written(model, content, {"seed": "x"}))


def test_words_come_as_events_over_http(run: Path, content: bytes) -> None:
    settings: dict[str, Any] = {"batching": {"slo_seconds": 5.0, "timeout_seconds": 10.0}}
    workers = lambda wanted: ThreadWorkers(lambda: WritingBackend(wanted.folder))  # noqa: E731
    with serving([Wanted("captions", "1", run / "bundle")], workers=workers, **settings) as server:
        body = (
            b'--edge\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
            + content
            + b"\r\n--edge--\r\n"
        )
        kind = {"content-type": "multipart/form-data; boundary=edge"}
        status, whole, _ = server.ask("POST", "/v1/predict", body, kind)
        assert status == 200, whole
        stream = {**kind, "accept": "text/event-stream"}
        status, events, headers = server.ask("POST", "/v1/predict?temperature=0", body, stream)
        assert (status, headers["content-type"]) == (200, "text/event-stream")
        *pieces, done = events.decode().strip().split("\n\n")
        assert done == "event: done\ndata: {}"
        said = "".join(json.loads(piece.removeprefix("data: "))["text"] for piece in pieces)
        assert said == whole["answer"]
        status, refused, _ = server.ask("POST", "/v1/predict", body.replace(content, b"none"), stream)
        assert (status, "not a picture" in refused["error"]) == (422, True)
        assert server.ask("POST", "/v1/predict?temperature=hot", body, stream)[0] == 400
