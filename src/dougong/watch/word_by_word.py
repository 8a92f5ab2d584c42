"""How a text came about that a model wrote, word by word, as one page.

Here        `look_at_texts`: what it wrote about some records, and where each word came from, as plain values;
            `write_texts`, the page of them.
Elsewhere   the maps of one word (watch/writing.py); models that decide (watch/inside.py); how the page looks
            (watch/word_by_word.html).
Promise     the words are those that the model writes on its own, at its bundle's settings; the page refers to nothing
            outside itself and runs no script; what comes from data is shown as text, never read as markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import torch

from dougong.bundle.describer import Describer
from dougong.bundle.generator import Generator
from dougong.core.files import write_atomic
from dougong.data.batch import BatchArrays
from dougong.data.modality.text import TextModality
from dougong.data.table import Table
from dougong.engine.batches import to_tensors
from dougong.model.decoder import Decoder
from dougong.model.encoders.image import ImageTail
from dougong.model.reading import ReadBlock
from dougong.model.sandwich import FinishBlock
from dougong.model.writer import Writer
from dougong.nn.batch import Batch, MediaBatch
from dougong.watch.cards import heat, relative, shaded_tokens, strip
from dougong.watch.media import arrays_of, check_rows, show_medium
from dougong.watch.pages import page_template
from dougong.watch.writing import COMPLETED, Written, look_at_word

MOST_WORDS: Final = 32
"""Tokens of a text that are looked into, from its beginning."""


Wording = Describer | Generator
"""A model that writes words about what it reads."""


def look_at_texts(model: Wording, table: Table, rows: Sequence[int]) -> dict[str, Any]:
    """Write about some records of a table, and say where each word came from.

    Raises:
        ConfigError: no such record, or too many.
        DataError: a record cannot be read.
    """
    check_rows(rows, table)
    columns = [column for column in model.preparation.columns if column in table.schema.names]
    cells = table.records(list(rows), columns)
    writes, reads = _sides(model)
    return {
        "model": model.manifest.name,
        "table": table.path.name,
        "writes": writes,
        "reads": reads,
        "completed": COMPLETED if isinstance(model, Generator) and model.network.config.completion else None,
        "records": [_look(model, row, record, table.folder) for row, record in zip(rows, cells, strict=True)],
    }


def write_texts(path: Path, told: Mapping[str, Any]) -> Path:
    """Write the page of what `look_at_texts` told."""
    page = page_template("word_by_word.html").render(told=told, records=[_drawn(each) for each in told["records"]])
    write_atomic(path, page.encode("utf-8", "replace"))
    return path


def _look(model: Wording, row: int, record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    arrays = _arrays(model, row, record, folder)
    batch = to_tensors(arrays, next(model.network.parameters()).device)
    ids_N = model.write_ids(batch)[0]
    ended = (ids_N == model.end).nonzero()
    num_words = int(ended[0, 0]) - 1 if len(ended) else len(ids_N) - 1
    shown = min(num_words, MOST_WORDS)
    writes, reads = _sides(model)
    text = cast(TextModality, model.preparation.modalities[writes])
    return {
        "row": row,
        "text": model.text(ids_N[1 : num_words + 1]),
        "num_words": num_words,
        "target": None if record.get(text.config.column) is None else str(record[text.config.column]),
        "inputs": [_input(model, name, arrays, record) for name in reads],
        "words": [] if not shown else _words(model, batch, ids_N[: shown + 1]),
    }


def _arrays(model: Wording, row: int, record: Mapping[str, Any], folder: Path) -> BatchArrays:
    cells = {column: record.get(column) for column in model.preparation.columns}
    return arrays_of(model.preparation, row, cells, folder)


def _input(model: Wording, name: str, arrays: BatchArrays, record: Mapping[str, Any]) -> dict[str, Any]:
    modality, media = model.preparation.modalities[name], arrays.media[name]
    told: dict[str, Any] = {"name": name, "kind": modality.signature().kind, "absent": not media.present_B.any()}
    if told["absent"]:
        return told
    grid = _grids(model.network).get(name)
    return {**told, **show_medium(modality, media, record), "grid": None if grid is None else list(grid)}


def _sides(model: Wording) -> tuple[str, list[str]]:
    """What it writes, and what it reads."""
    if isinstance(model, Generator):
        return model.network.words, [model.network.picture]
    return model.network.writes, list(model.network.names)


def _grids(network: Decoder | Writer) -> dict[str, tuple[int, int]]:
    """Rows and columns of each picture's tokens, as the words see them."""
    read = [block.block for block in network.blocks if isinstance(block, ReadBlock)]
    tails = {block.name: block.finisher for block in read if isinstance(block, FinishBlock)}
    return {name: tail.grid for name, tail in tails.items() if isinstance(tail, ImageTail)}


def _words(model: Wording, batch: Batch, ids_N: torch.Tensor) -> list[dict[str, Any]]:
    """Of each token after the first. All are asked for at once: a record for each, of one text that grows."""
    count, (writes, _) = len(ids_N) - 1, _sides(model)
    nothing_B, there_B = torch.zeros_like(ids_N[:-1]), torch.ones_like(ids_N[:-1], dtype=torch.bool)
    media = {
        name: one._replace(index_B=one.index_B.expand(count), present_B=one.present_B.expand(count), there_B=None)
        for name, one in batch.media.items()
    }
    # A decoder is asked what follows each token; a writer's batch has the tokens that follow, too.
    known_N = ids_N if isinstance(model, Generator) else ids_N[:-1]
    begun = {"ids_UT": known_N[None], "mask_UT": torch.ones_like(known_N, dtype=torch.bool)[None]}
    media[writes] = MediaBatch(begun, nothing_B, there_B)
    found = look_at_word(model.network, Batch(media, None), torch.arange(count, device=ids_N.device), ids_N[1:])
    tokens = _tokens(model, ids_N)
    return [
        {
            "token": tokens[place + 1],
            "share": {name: float(found.of(name)[place].sum()) for name in found.spans},
            "chance": _chance(found, place),
            "maps": {name: _rounded(found.of(name)[place]) for name in found.spans if name not in (writes, COMPLETED)},
            "before": {"tokens": tokens[: place + 1], "weights": _rounded(found.of(writes)[place, : place + 1])},
        }
        for place in range(count)
    ]


def _tokens(model: Wording, ids_N: torch.Tensor) -> list[str]:
    text = cast(TextModality, model.preparation.modalities[_sides(model)[0]])
    return [text.tokenizer.id_to_token(number) or "" for number in ids_N.tolist()]


def _chance(found: Written, place: int) -> float:
    """Of the word, as the model itself saw it."""
    score_V = found.score_BNV[place, place].float()
    return float(score_V.softmax(dim=0)[found.word_B[place]])


def _rounded(x_T: torch.Tensor) -> list[float]:
    return [round(float(x), 6) for x in x_T]


# The page ------------------------------------------------------------------------------------------------------------


def _drawn(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as the template wants it: maps over each input of the whole text, and of each word."""
    inputs = []
    for given in record["inputs"]:
        maps = [word["maps"][given["name"]] for word in record["words"] if given["name"] in word["maps"]]
        whole = [sum(column) / len(maps) for column in zip(*maps, strict=True)] if maps else []
        inputs.append({**given, **_over(given, whole)})
    words = [
        {
            **word,
            "inputs": [
                {**given, **_over(given, word["maps"].get(given["name"], []))}
                for given in record["inputs"]
                if not given["absent"]
            ],
            "shaded": shaded_tokens(
                word["before"]["tokens"], relative(word["before"]["weights"]) or [0.0] * (place + 1)
            ),
        }
        for place, word in enumerate(record["words"])
    ]
    return {**record, "inputs": inputs, "words": words}


def _over(given: Mapping[str, Any], weights: Sequence[float]) -> dict[str, Any]:
    """Squares where the input is a picture of as many tokens, or a strip."""
    shades, grid = relative(weights), given.get("grid")
    squares = None
    if grid and len(shades) in (grid[0] * grid[1], grid[0] * grid[1] + 1):
        squares = heat(grid, relative(weights[len(weights) - grid[0] * grid[1] :]))  # no class token
    return {"heat": squares, "strip": strip(shades)}
