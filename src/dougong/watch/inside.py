"""What a model looked at in some records, as one page.

Here        `look_at_records`: the answers, maps, contributions and their faithfulness as plain values; `write_inside`,
            the page of them; `input_told`, `drawn_input`, `curves_as_json`, which other pages of maps show too.
Elsewhere   the maps (watch/attention.py); whether they are true (watch/faithful.py); contributions
            (watch/contribution.py); how the page looks (watch/inside.html).
Promise     the page refers to nothing outside itself and runs no script; what comes from data is shown as text, never
            read as markup. Beside every map stands what following it does to the answer, and what chance does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from dougong.bundle.aligner import Aligner
from dougong.bundle.model import Model, Prediction
from dougong.core.errors import ConfigError, DataError
from dougong.core.files import write_atomic
from dougong.data.batch import BatchArrays
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.split import sample_table
from dougong.data.table import Table
from dougong.engine.batches import to_tensors
from dougong.engine.contribution import Probe
from dougong.watch import charts
from dougong.watch.attention import METHODS, Map, Survey, look_inside, survey
from dougong.watch.cards import heat, relative, shaded_tokens, strip
from dougong.watch.contribution import MOST_MODALITIES, ask_all, of_records
from dougong.watch.faithful import Curve, Faithful, captum_relevance, curves, picture_tails, sanity
from dougong.watch.media import check_rows, show_medium, text_of
from dougong.watch.pages import page_template

SURVEYED: Final = 256
"""Records over which the attention is surveyed."""

MOST_HEADS: Final = 48
"""Maps of single heads that are shown of a record."""

SAYS: Final = {
    "relevance": "gradient-weighted relevance",
    "rollout": "attention rollout",
    "captum": "integrated gradients (captum)",
}


def look_at_records(
    model: Model, table: Table, rows: Sequence[int], *, with_captum: bool | None = None, seed: int = 0
) -> dict[str, Any]:
    """Look inside the answers to some records of a table, and survey the attention over many.

    `with_captum`: None takes captum where it is installed.

    Raises:
        ConfigError: no such record, or too many.
        DataError: a record cannot be read.
    """
    check_rows(rows, table)
    columns = [column for column in model.preparation.columns if column in table.schema.names]
    target = model.preparation.target.name
    known = target in table.schema.names
    cells = table.records(list(rows), [*columns, *([target] if known else [])])
    records = [
        _look(model, row, record, table.folder, str(record[target]) if known else None, with_captum, seed)
        for row, record in zip(rows, cells, strict=True)
    ]
    return {
        "model": model.manifest.name,
        "table": table.path.name,
        "modalities": list(model.preparation.modalities),
        "records": records,
        "survey": [one._asdict() for one in survey_table(model, table, seed=seed)],
    }


def survey_table(model: Model, table: Table, *, num_records: int = SURVEYED, seed: int = 0) -> list[Survey]:
    """How the model's attentions behave over records drawn from a table."""
    chosen = sample_table(table, num_records, seed=seed)
    loader = Loader(chosen, model.preparation, LoaderConfig(batch_size=64, workers=0))
    return survey(model.network, (to_tensors(arrays) for arrays in loader.one_pass()))


def write_inside(path: Path, told: Mapping[str, Any]) -> Path:
    """Write the page of what `look_at_records` told."""
    page = page_template("inside.html").render(
        told=told,
        says=SAYS,
        records=[_drawn(record, place) for place, record in enumerate(told["records"])],
    )
    write_atomic(path, page.encode("utf-8", "replace"))
    return path


# One record --------------------------------------------------------------------------------------------------------


def _look(
    model: Model,
    row: int,
    record: Mapping[str, Any],
    folder: Path,
    target: str | None,
    with_captum: bool | None,
    seed: int,
) -> dict[str, Any]:
    visible = {column: value for column, value in record.items() if column in model.preparation.columns}
    (prediction,) = model.predict([visible], folder=folder)
    if prediction.error is not None:
        raise DataError(f"record {row} cannot be looked into: {prediction.error}. Choose another one.")
    arrays, _ = model.explain([visible], folder=folder)
    batch = to_tensors(arrays)
    found = look_inside(model.network, batch)
    maps: dict[str, dict[str, Tensor]] = {method: getattr(found, method) for method in METHODS}
    if with_captum is not False:
        try:
            maps["captum"] = captum_relevance(model.network, batch, found.target_B)
        except ConfigError:
            if with_captum:
                raise
    faithful = {
        method: curves_as_json(curves(model.network, batch, each, found.masks, found.target_B, seed=seed))
        for method, each in maps.items()
    }
    return {
        "row": row,
        "answer": text_of(prediction.answer),
        "target": target,
        "probabilities": _most_likely(prediction),
        "gate": prediction.gate,
        "inputs": [input_told(model, name, arrays, record, maps, found.masks) for name in model.preparation.modalities],
        "share": {
            method: {name: float(each.sum()) for name, each in found_by.items()} for method, found_by in maps.items()
        },
        "flow": found.flow_BMM[0].tolist(),
        "shapley": _shapley(model, batch),
        "faithful": faithful,
        "sanity": sanity(model.network, batch, seed=seed),
        "heads": [_head_map(one) for one in found.maps],
    }


def _shapley(model: Model, batch: Any) -> dict[str, Any] | None:
    """What each modality adds to how sure the answer is; None where there are too many sets, or one modality."""
    names = list(model.preparation.modalities)
    if not 2 <= len(names) <= MOST_MODALITIES:
        return None
    target = model.preparation.target
    nothing = torch.zeros(1, dtype=torch.int64)  # the probe scores; here only its answers are wanted
    records = of_records(ask_all(Probe(model.network, batch._replace(target=nothing), target)), target.task)
    return {
        "value": dict(zip(names, records.value_BM[0].tolist(), strict=True)),
        "all": float(records.all_B[0]),
        "none": float(records.none_B[0]),
    }


def curves_as_json(found: Faithful) -> dict[str, Any]:
    """What following a map does, as plain values."""

    def one(curve: Curve) -> dict[str, Any]:
        return {"share": curve.share_K, "sure": curve.sure_K, "area": curve.area}

    return {
        "deletion": one(found.deletion),
        "insertion": one(found.insertion),
        "random_deletion": one(found.random_deletion),
        "random_insertion": one(found.random_insertion),
        "deletion_gain": found.deletion_gain,
    }


def _head_map(one: Map) -> dict[str, Any]:
    """What each head of an attention looked at, the real tokens that asked averaged."""
    real_T = one.mask_BT[0]
    row_HS = one.weight_BHTS[0][:, real_T].mean(dim=1) if bool(real_T.any()) else one.weight_BHTS[0].mean(dim=1) * 0
    return {
        "block": one.block,
        "asking": one.asking,
        "keys": [list(each) for each in one.keys],
        "heads": [[round(float(weight), 5) for weight in row_S] for row_S in row_HS],
    }


def input_told(
    model: Model | Aligner,
    name: str,
    arrays: BatchArrays,
    record: Mapping[str, Any],
    maps: Mapping[str, Mapping[str, Tensor]],
    masks: Mapping[str, Tensor],
) -> dict[str, Any]:
    """One medium of a batch of one record, with the maps over it; `masks` say which tokens are real."""
    modality = model.preparation.modalities[name]
    told: dict[str, Any] = {"name": name, "kind": modality.signature().kind, "absent": True, "maps": {}}
    media = arrays.media[name]
    if not media.present_B.any() or name not in masks:
        return told
    real_T = masks[name][0]
    told["absent"] = False
    told["maps"] = {
        method: [round(float(weight), 6) for weight in each[name][0][real_T]] for method, each in maps.items()
    }
    told.update(show_medium(modality, media, record, num_tokens=int(real_T.sum())))
    tail = picture_tails(model.network).get(name)
    if tail is not None:
        told["grid"], told["pooled_grid"] = list(tail.patches), list(tail.grid)
    return told


def _most_likely(prediction: Prediction) -> dict[str, float]:
    return dict(sorted(prediction.probabilities.items(), key=lambda item: -item[1])[:5])


# The page ----------------------------------------------------------------------------------------------------------


def _drawn(record: Mapping[str, Any], place: int) -> dict[str, Any]:
    """A record as the template wants it."""
    inputs = [drawn_input(each) for each in record["inputs"]]
    lines = []
    for number, found in enumerate(record["faithful"].values()):
        lines.append(charts.Line(found["deletion"]["share"], found["deletion"]["sure"], number))
    random = next(iter(record["faithful"].values()), None)
    chart = None
    if random is not None:
        lines.append(charts.Line(random["random_deletion"]["share"], random["random_deletion"]["sure"], len(lines)))
        label = "How sure the answer stays as the tokens that a map names first go first, beside a random order"
        chart = charts.line_chart(f"deletion{place}", label, lines, across="share of tokens that are gone")
    gains = {method: found["deletion_gain"] for method, found in record["faithful"].items()}
    return {**record, "inputs": inputs, "curve": chart, "gains": gains, "heads": _drawn_heads(record)}


def drawn_input(given: Mapping[str, Any]) -> dict[str, Any]:
    """A medium of `input_told`, with each map laid over it as templates want it."""
    shown = dict(given)
    shown["views"] = []
    for method, weights in given["maps"].items():
        shades = relative(weights)
        view: dict[str, Any] = {"method": method, "share": sum(weights)}
        if given["kind"] == "text":
            tokens = given["tokens"]
            view["tokens"] = shaded_tokens(tokens, shades) if len(tokens) == len(shades) else []
        elif given["kind"] == "image":
            view["heat"] = heat(given["grid"], shades)
        elif given["kind"] == "table":
            columns = list(given["values"].items())
            view["values"] = [
                (column, value, shades[at] if len(shades) == len(columns) else 0.0)
                for at, (column, value) in enumerate(columns)
            ]
        else:
            view["strip"] = strip(shades)
        shown["views"].append(view)
    if given.get("points"):
        shown["line"] = _line(given["points"])
    return shown


def _drawn_heads(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Single heads over pictures, words and strips, the last blocks first, as many as fit."""
    kinds = {each["name"]: each for each in record["inputs"]}
    shown: list[dict[str, Any]] = []
    for one in reversed(record["heads"]):
        for number, row_S in enumerate(one["heads"]):
            if len(shown) >= MOST_HEADS:
                return shown
            start, parts = 0, []
            for name, count in one["keys"]:
                weights = row_S[start : start + count]
                start += count
                given = kinds.get(name, {})
                mass, squares = sum(weights), None
                for grid in (given.get("grid"), given.get("pooled_grid")):
                    if (
                        grid is not None
                        and squares is None
                        and len(weights) in (grid[0] * grid[1], grid[0] * grid[1] + 1)
                    ):
                        squares = heat(grid, relative(weights[len(weights) - grid[0] * grid[1] :]))  # no class token
                parts.append({"name": name, "mass": mass, "heat": squares, "strip": strip(relative(weights))})
            shown.append({"block": one["block"], "head": number, "asking": one["asking"], "parts": parts})
    return shown


def _line(points: Sequence[float]) -> str:
    low, high = min(points), max(points)
    across, up = 100 / max(1, len(points) - 1), 28 / max(high - low, 1e-9)
    return " ".join(f"{at * across:.2f},{29 - (point - low) * up:.2f}" for at, point in enumerate(points))
