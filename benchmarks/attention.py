"""Whether maps of where a model looks are true, on easy-VQA's test split (claim 12's second bar).

Here        a sandwich of pictures and typed questions, trained for 600 steps; on records that it answers rightly: the
            pointing game (is the strongest patch on the asked shape?), deletion and insertion against random orders,
            and the same maps of random weights; for relevance, rollout, the bridge's raw attention, and captum's
            integrated gradients on fewer records.
Elsewhere   the model, trained and kept (attention_model.py); the maps (watch/attention.py); following them
            (watch/faithful.py); options and the written result (harness.py).
Promise     the shape is where pixels differ from the picture's median colour, which no map knows of. A patch of 8 x 8
            pixels hits where it covers some of the shape; `strictly`, where its middle lies in it. Chance is pointing
            at any patch. Deletion takes away all tokens that a map is over, or the picture's patches alone; its gain is
            how far the area under its curve lies below that of random orders of the same records. What
            an answer gains that goes at once is told beside it: of patches little, as a question is answered without.

Intervals are over batches of 100 records (bootstrap, 95 %), or Wilson's for shares; the model is one, of seed 0. What a
batch shows is kept while model and maps stay as they are, so it can be stopped and gone on with.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from attention_model import asked_recipe, trained
from harness import Kept, run
from shares import share
from torch import Tensor

from dougong.bundle.model import Model
from dougong.core.figures import Figure
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.split import sample_table
from dougong.engine.batches import to_tensors
from dougong.nn.batch import Batch
from dougong.recipes.build import open_records
from dougong.watch import attention, faithful
from dougong.watch.attention import Inside, look_inside, unshared
from dougong.watch.faithful import captum_relevance, curves, patches, sanity

RECORDS: Final = 1000
WITH_CAPTUM: Final = 150
SANE: Final = 2
"""Batches of which maps of random weights are made too."""

DIFFERENT: Final = 0.35
"""Of a pixel from the picture's median colour, summed over channels, in normalised units."""


PARTS: Final = ("maps", "captum")


def measure(quick: bool, parts: Sequence[str]) -> Iterator[Figure]:
    recipe = asked_recipe(quick)
    model = trained(recipe, quick)
    table = sample_table(open_records(recipe).test, 100 if quick else RECORDS, seed=0)
    if "maps" in parts:
        yield from _maps(model, table, None if quick else Kept("attention"))
    if "captum" in parts:
        yield from _captum(model, table, quick)


def _maps(model: Model, table: Any, kept: Kept | None) -> Iterator[Figure]:
    loader = Loader(table, model.preparation, LoaderConfig(batch_size=100, workers=0))
    asked = [_asked(model, number, arrays, kept) for number, arrays in enumerate(loader.one_pass())]
    right = sum(one["right"] for one in asked)
    total = sum(one["records"] for one in asked)
    yield Figure(name="records answered rightly", value=right / total, unit="", seeds=total)
    hits = {name: [row for one in asked for row in one["hits"][name]] for name in asked[0]["hits"]}
    yield from _pointing(hits, np.mean([row for one in asked for row in one["chance"]], axis=0))
    for name in asked[0]["gains"]:
        values = [one["gains"][name] for one in asked]
        wanted = ">= 0.30" if name == "relevance: deletion of all tokens below chance" else None
        low, high = _bootstrap(values)
        yield Figure(name=name, value=float(np.mean(values)), unit="", asked=wanted, low=low, high=high, seeds=right)
    checks = [one["sanity"] for one in asked if one["sanity"]]
    for method in checks[0]:
        for modality in checks[0][method]:
            value = float(np.mean([check[method][modality] for check in checks]))
            yield Figure(name=f"{method} of {modality}: rank correlation with random weights", value=value, unit="")


def _asked(model: Model, number: int, arrays: Any, kept: Kept | None) -> dict[str, Any]:
    """What a batch of records shows, or what is kept of it."""
    key = f"batch {number}, maps {_maps_digest()}"
    found: dict[str, Any] | None = None if kept is None else kept.get(key)
    if found is not None:
        return found
    batch, counted = _right(model, to_tensors(arrays))
    inside = look_inside(model.network, batch)
    own = {"relevance": inside.relevance, "rollout": inside.rollout, "raw attention": _raw(inside, model)}
    shape = _shape(batch, patches(model.network)["image"])
    gains: dict[str, float] = {}
    hits: dict[str, list[list[bool]]] = {}
    for name, each in own.items():
        hits[name] = shape[torch.arange(len(shape)), each["image"].argmax(dim=1)].tolist()
        for what, names in (("the picture's patches", ["image"]), ("all tokens", None)):
            if names is None and "question" not in each:
                continue
            followed = curves(model.network, batch, each, inside.masks, inside.target_B, names=names, seed=number)
            gains[f"{name}: deletion of {what} below chance"] = followed.deletion_gain
            gains[f"an answer that goes at once: deletion of {what} below chance"] = followed.full_gain
            more = followed.insertion.area / max(followed.random_insertion.area, 1e-9) - 1
            gains[f"{name}: insertion of {what} above chance"] = more
    told = {
        "right": batch.num_records,
        "records": counted,
        "chance": shape.float().mean(dim=1).tolist(),
        "hits": hits,
        "gains": gains,
        "sanity": sanity(model.network, batch, seed=number) if number < SANE else {},
    }
    if kept is not None:
        kept.put(key, told)
    print(f"{number + 1}: {counted} records", file=sys.stderr)
    return told


def _maps_digest() -> str:
    """Of what makes maps and follows them: figures that are kept must not outlive a change of it."""
    digest = hashlib.sha256()
    for module in (attention, faithful):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()[:16]


def _right(model: Model, batch: Batch) -> tuple[Batch, int]:
    """Those that are answered rightly, each with media of its own."""
    assert batch.target is not None
    with torch.inference_mode():
        right_B = model.network(batch).output_BC.argmax(dim=1) == batch.target
    media = {
        name: one._replace(index_B=one.index_B[right_B], present_B=one.present_B[right_B])
        for name, one in batch.media.items()
    }
    return unshared(Batch(media, batch.target[right_B])), len(right_B)


def _shape(batch: Batch, grid: tuple[int, int]) -> Tensor:
    """Which patches cover some of the shape, and which have their middle in it: (B, rows x columns, 2)."""
    pixels_BCHW = batch.media["image"].values["pixels_UCHW"]
    median_BC11 = pixels_BCHW.flatten(2).median(dim=2).values[..., None, None]
    shape_BHW = (pixels_BCHW - median_BC11).abs().sum(dim=1) > DIFFERENT
    rows, columns = grid
    height, width = shape_BHW.shape[1] // rows, shape_BHW.shape[2] // columns
    cells = shape_BHW.view(-1, rows, height, columns, width)
    covers = cells.any(dim=4).any(dim=2).flatten(1)
    middle = cells[:, :, height // 2, :, width // 2].flatten(1)
    return torch.stack([covers, middle], dim=2)


def _raw(found: Inside, model: Model) -> dict[str, Tensor]:
    """What the question's tokens looked at in the bridge's last block, heads averaged, on the patches that enter."""
    last = [each for each in found.maps if each.asking == "question" and each.keys[0][0] == "image"][-1]
    row_BHS = (last.weight_BHTS * last.mask_BT[:, None, :, None]).sum(dim=2)
    count = last.keys[0][1]
    weight_BS = row_BHS[..., :count].mean(dim=1)
    rows, columns = model.network.grids["image"]
    high, wide = patches(model.network)["image"]
    spread = weight_BS.view(-1, rows, columns)
    spread = spread.repeat_interleave(high // rows, 1).repeat_interleave(wide // columns, 2)
    return {"image": spread.flatten(1)}


def _pointing(hits: Mapping[str, list[list[bool]]], chance: Any) -> Iterator[Figure]:
    for name, rows in hits.items():
        for place, how in enumerate(("", ", strictly")):
            found = share(
                f"{name}: pointing game{how}",
                sum(row[place] for row in rows),
                len(rows),
                ">= 0.90" if name == "relevance" and not place else None,
            )
            yield found.model_copy(update={"baseline": float(chance[place])})


def _captum(model: Model, table: Any, quick: bool) -> Iterator[Figure]:
    few = sample_table(table, 20 if quick else WITH_CAPTUM, seed=1)
    loader = Loader(few, model.preparation, LoaderConfig(batch_size=1, workers=0))
    hits: list[Tensor] = []
    gains: list[float] = []
    chance: list[float] = []
    for number, arrays in enumerate(loader.one_pass()):
        batch, _ = _right(model, to_tensors(arrays))
        if not batch.num_records:
            continue
        found = look_inside(model.network, batch)
        own = captum_relevance(model.network, batch, found.target_B)
        shape = _shape(batch, patches(model.network)["image"])[0]
        hits.append(shape[int(own["image"].argmax())])
        chance.append(float(shape[:, 0].float().mean()))
        followed = curves(model.network, batch, own, found.masks, found.target_B, names=["image"], seed=number)
        gains.append(followed.deletion_gain)
    pointed = share("integrated gradients (captum): pointing game", sum(bool(hit[0]) for hit in hits), len(hits))
    yield pointed.model_copy(update={"baseline": float(np.mean(chance))})
    low, high = _bootstrap(gains)
    name = "integrated gradients (captum): deletion of the picture's patches below chance"
    yield Figure(name=name, value=float(np.mean(gains)), unit="", low=low, high=high, seeds=len(gains))


def _bootstrap(values: list[float]) -> tuple[float, float]:
    drawn = np.random.default_rng(0).choice(np.array(values), (2000, len(values)))
    low, high = np.quantile(drawn.mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


if __name__ == "__main__":
    run("attention", "Whether maps of where a model looks are true, on easy-VQA.", measure, parts=PARTS)
