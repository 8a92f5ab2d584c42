"""Whether maps of where a model looks are true, on easy-VQA's test split (claim 12's second bar).

Here        a sandwich of pictures and typed questions, trained for 600 steps; on records that it answers rightly: the
            pointing game (is the strongest patch on the asked shape?), deletion and insertion against random orders,
            and the same maps of random weights; for relevance, rollout, the bridge's raw attention, and captum's
            integrated gradients on fewer records.
Elsewhere   the model, trained and kept (attention_model.py); the maps (watch/attention.py); following them
            (watch/faithful.py); options and the written result (harness.py).
Promise     the shape is where pixels differ from the picture's median colour, which no map knows of. A patch of 8 x 8
            pixels hits where it covers some of the shape; `strictly`, where its middle lies in it. Chance is pointing
            at any patch. Deletion takes away the picture's patches alone, or all tokens; its gain is how far the area
            under its curve lies below that of random orders of the same records.

Intervals are over records (bootstrap, 95 %), or Wilson's for shares; the model is one, of seed 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch
from attention_model import asked_recipe, trained
from harness import run
from shares import wilson
from torch import Tensor

from dougong.bundle.model import Model
from dougong.core.figures import Figure
from dougong.data.loader import Loader, LoaderConfig
from dougong.data.split import sample_table
from dougong.engine.batches import to_tensors
from dougong.nn.batch import Batch
from dougong.recipes.build import open_records
from dougong.watch.attention import Inside, look_inside, unshared
from dougong.watch.faithful import captum_relevance, curves, patches, sanity

RECORDS: Final = 1000
WITH_CAPTUM: Final = 150
DIFFERENT: Final = 0.35
"""Of a pixel from the picture's median colour, summed over channels, in normalised units."""


def measure(quick: bool) -> Iterator[Figure]:
    recipe = asked_recipe(quick)
    model = trained(recipe, quick)
    table = sample_table(open_records(recipe).test, 100 if quick else RECORDS, seed=0)
    loader = Loader(table, model.preparation, LoaderConfig(batch_size=100, workers=0))
    maps: dict[str, list[Tensor]] = {}
    shapes: list[Tensor] = []
    gains: dict[str, list[float]] = {}
    checks: list[dict[str, dict[str, float]]] = []
    right = total = 0
    for number, arrays in enumerate(loader.one_pass()):
        batch = to_tensors(arrays)
        batch, counted = _right(model, batch)
        right, total = right + batch.num_records, total + counted
        found = look_inside(model.network, batch)
        own = {"relevance": found.relevance, "rollout": found.rollout, "raw attention": _raw(found, model)}
        shapes.append(_shape(batch, patches(model.network)["image"]))
        for name, each in own.items():
            maps.setdefault(name, []).append(each["image"])
            for what, names in (("the picture's patches", ["image"]), ("all tokens", None)):
                if names is None and "question" not in each:
                    continue
                followed = curves(model.network, batch, each, found.masks, found.target_B, names=names, seed=number)
                gains.setdefault(f"{name}: deletion of {what} below chance", []).append(followed.deletion_gain)
                more = followed.insertion.area / max(followed.random_insertion.area, 1e-9) - 1
                gains.setdefault(f"{name}: insertion of {what} above chance", []).append(more)
        if number < 2:
            checks.append(sanity(model.network, batch, seed=number))
    yield Figure(name="records answered rightly", value=right / total, unit="", seeds=total)
    yield from _pointing(maps, torch.cat(shapes))
    yield from _captum(model, table, quick)
    for name, values in gains.items():
        asked = ">= 0.30" if name == "relevance: deletion of the picture's patches below chance" else None
        low, high = _bootstrap(values)
        yield Figure(name=name, value=float(np.mean(values)), unit="", asked=asked, low=low, high=high, seeds=right)
    for method in checks[0]:
        for modality in checks[0][method]:
            value = float(np.mean([check[method][modality] for check in checks]))
            yield Figure(name=f"{method} of {modality}: rank correlation with random weights", value=value, unit="")


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


def _pointing(maps: dict[str, list[Tensor]], shape: Tensor) -> Iterator[Figure]:
    number = len(shape)
    for name, parts in maps.items():
        strongest_B = torch.cat(parts).argmax(dim=1)
        hits = shape[torch.arange(number), strongest_B]
        for place, how in enumerate(("", ", strictly")):
            low, high = wilson(int(hits[:, place].sum()), number)
            yield Figure(
                name=f"{name}: pointing game{how}",
                value=float(hits[:, place].float().mean()),
                unit="",
                asked=">= 0.90" if name == "relevance" and not place else None,
                low=low,
                high=high,
                seeds=number,
                baseline=float(shape[..., place].float().mean()),
            )


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
    share = torch.stack(hits)[:, 0].float().mean()
    low, high = wilson(int(share * len(hits)), len(hits))
    yield Figure(
        name="integrated gradients (captum): pointing game",
        value=float(share),
        unit="",
        low=low,
        high=high,
        seeds=len(hits),
        baseline=float(np.mean(chance)),
    )
    low, high = _bootstrap(gains)
    name = "integrated gradients (captum): deletion of the picture's patches below chance"
    yield Figure(name=name, value=float(np.mean(gains)), unit="", low=low, high=high, seeds=len(gains))


def _bootstrap(values: list[float]) -> tuple[float, float]:
    drawn = np.random.default_rng(0).choice(np.array(values), (2000, len(values)))
    low, high = np.quantile(drawn.mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


if __name__ == "__main__":
    run("attention", "Whether maps of where a model looks are true, on easy-VQA.", measure)
