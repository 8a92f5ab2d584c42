"""Answers records with an exported model. This one file, beside the export, is all that is needed of Dougong.

Here        Runtime (records in, answers out), `run_parts` (which graph is fed what), `prepare` (records to arrays);
            opening graphs of each kind; `python run.py RECORDS.jsonl [ANSWERS.jsonl]`.
Elsewhere   making the export (compress/export.py); the same preparation for training (data/modality/).
Promise     it imports nothing of Dougong, so that its copy runs where Dougong is not installed; records are read as in
            training; the encoder of a modality that no record has is not run; a record that cannot be read gets its
            reason, and its neighbours their answers; graphs that are run as one answer as they do one after the other.

Beside NumPy it needs what the export was made for (openvino, onnxruntime, or torch), and of the libraries that read
media only those of the modalities at hand: tokenizers, Pillow, soundfile and soxr.
"""

from __future__ import annotations

import functools
import io
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

EXPORT = "export.json"
PREPARATION = "preparation.json"
GRAPHS = "graphs"
WHOLE = "whole"
BATCH_SIZE = 64
LARGEST_BYTES = 256 * 2**20
LARGEST_CHARACTERS = 1_000_000
LARGEST_NUMBERS = 64 * 2**20
PICTURES = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
SOUND_STEPS = 4096.0
SOUND_PAD = 800

Arrays = dict[str, Any]
Call = Callable[[str, Arrays], Arrays]
Media = dict[str, tuple[Arrays, Any, Any]]
Graphs = Path | Mapping[str, bytes]


class BadValue(Exception):
    """This cell cannot be used, and why."""


class Runtime:
    """An exported model, ready to answer."""

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        """`threads`: None leaves their number to the engine.

        Raises:
            ValueError: the model reads figures of quality, which only Dougong measures.
        """
        self.folder = Path(folder)
        self.spec = json.loads((self.folder / EXPORT).read_text(encoding="utf-8"))
        saved = json.loads((self.folder / PREPARATION).read_text(encoding="utf-8"))
        self.modalities: dict[str, Any] = saved["modalities"]
        self.target = saved["target"]
        if any(part["quality"] for part in self.spec["encoders"]):
            raise ValueError("this model reads figures of quality, which only Dougong measures: use dougong predict.")
        self.call = open_graphs(self.spec, self.folder / GRAPHS, threads)
        self._tokenizers: dict[str, Any] = {}

    def answer(self, records: Sequence[Mapping[str, Any]], folder: str | Path = ".") -> Iterator[dict[str, Any]]:
        """One answer for each record: a label, a number or the labels that hold. Paths of media are below `folder`."""
        for start in range(0, len(records), BATCH_SIZE):
            part = records[start : start + BATCH_SIZE]
            media, bad = self.prepare(part, Path(folder))
            good = [place for place in range(len(part)) if place not in bad]
            said = {place: {"answer": None, "error": reason} for place, reason in bad.items()}
            if good:
                found = run_parts(self.spec, self.call, media)
                said.update({place: self._said(found, row) for row, place in enumerate(good)})
            for place in range(len(part)):
                yield {"row": start + place, **said[place]}

    def _said(self, found: Arrays, row: int) -> dict[str, Any]:
        if self.target["task"] == "regression":
            return {"answer": float(found["output_BC"][row, 0]) * self.target["scale"] + self.target["mean"]}
        chances = [round(float(chance), 6) for chance in found["probability_BC"][row]]
        probabilities = dict(zip(self.target["labels"], chances, strict=True))
        if self.target["task"] == "multi_label":
            held = [label for label, chance in probabilities.items() if chance >= 0.5]
            return {"answer": held, "probabilities": probabilities}
        best = int(np.argmax(found["probability_BC"][row]))
        return {"answer": self.target["labels"][best], "confidence": chances[best], "probabilities": probabilities}

    def prepare(self, records: Sequence[Mapping[str, Any]], folder: Path) -> tuple[Media, dict[int, str]]:
        """By modality: the values of distinct media, which of them each good record has, and whether it has one; then
        the reason of each bad record, by its place."""
        bad: dict[int, str] = {}
        met: dict[str, dict[int, tuple[str, Any]]] = {}
        for name, settings in self.modalities.items():
            met[name], known = {}, {}
            for place, record in enumerate(records):
                cells = tuple(record.get(column) for column in columns_of(settings))
                if all(cell is None or _says_nothing(cell) for cell in cells):
                    continue
                key = repr(cells)
                try:
                    if key not in known:
                        known[key] = self._decode(name, settings, cells, folder)
                    met[name][place] = (key, known[key])
                except BadValue as error:
                    bad.setdefault(place, f"{name}: {error}")
        good = [place for place in range(len(records)) if place not in bad]
        return {name: _gathered(self.modalities[name], met[name], good) for name in self.modalities}, bad

    def _decode(self, name: str, settings: Mapping[str, Any], cells: tuple[Any, ...], folder: Path) -> Any:
        kind = settings["kind"]
        if kind == "text":
            return read_text(cells[0], self._tokenizer(name, settings["max_tokens"]))
        if kind == "image":
            return read_picture(media_bytes(cells[0], folder), settings)
        if kind == "audio":
            return read_sound(media_bytes(cells[0], folder), settings)
        if kind == "table":
            return read_row(cells, settings)
        return read_signal(cells[0], folder, settings)

    def _tokenizer(self, name: str, max_tokens: int) -> Any:
        if name not in self._tokenizers:
            from tokenizers import Tokenizer

            place = list(self.modalities).index(name)
            tokenizer = Tokenizer.from_file(str(self.folder / f"tokenizer-{place}.json"))
            tokenizer.no_padding()
            tokenizer.enable_truncation(max_tokens)
            self._tokenizers[name] = tokenizer
        return self._tokenizers[name]


def run_parts(spec: Mapping[str, Any], call: Call, media: Media, quality: Arrays | None = None) -> Arrays:
    """From media to the model's answer: each encoder on its distinct media, then the roof that joins them.

    The encoder of a modality that no record has is not run: masked tokens stand in their place, which leave no
    trace. `quality` has the (U, Q) figures of modalities whose gate reads them. Where every modality is there, graphs
    that can be joined are run as one (`joins`).
    """
    given: Arrays = {}
    joined = joins(spec) and all(present_B.any() for _, _, present_B in media.values())
    for place, part in enumerate(spec["encoders"]):
        values, index_B, present_B = media[part["name"]]
        figures = None if quality is None else quality.get(part["name"])
        if present_B.any():
            filled = filled_up(part, values)
            found = filled if joined else call(part["graph"], filled)
        else:
            found = {
                name: np.zeros((1, *shape), np.bool_ if name == "mask_UT" else np.float32)
                for name, shape in part["nothing"].items()
            }
            index_B, figures = np.zeros_like(index_B), None
        found = {**found, "index_B": index_B, "present_B": present_B}
        if part["quality"]:
            found["quality_UQ"] = np.zeros((1, part["quality"]), np.float32) if figures is None else figures
        given |= {f"{name}_{place}": value for name, value in found.items()}
    if joined:
        return call(WHOLE, given)
    return call(spec["roof"]["graph"], {name: given[name] for name in spec["roof"]["inputs"]})


def joins(spec: Mapping[str, Any]) -> bool:
    """Whether graphs of this kind can be joined: from one to the next, a small model takes longer than in either."""
    return bool(spec.get("to") == "openvino")


def filled_up(part: Mapping[str, Any], values: Arrays) -> Arrays:
    """The values as the graph takes them: signals are filled up with masked zeros to a length that it can divide."""
    rule = part["length"]
    if rule is None:
        return values
    key = next(name for name in values if name.startswith("samples"))
    have = values[key].shape[-1]
    steps = max(0, -(-(have - rule["first"]) // rule["step"])) if rule["step"] else 0
    more = rule["first"] + steps * rule["step"] - have
    if rule["step"] == 0 and more < 0:
        raise ValueError(f"{have} samples are more than the {rule['first']} that this graph takes")
    if more <= 0:
        return values
    return {name: np.pad(value, [(0, 0)] * (value.ndim - 1) + [(0, more)]) for name, value in values.items()}


# ---- Graphs: each gives a function from a part's name and its inputs to its outputs. ----


def open_graphs(spec: Mapping[str, Any], graphs: Graphs, threads: int | None = None) -> Call:
    """Load every graph of an export, from its folder or from what was read of it."""
    openers: dict[str, Callable[..., Call]] = {
        "openvino": OpenVinoGraphs,
        "onnx": _open_onnx,
        "torch": _open_torch,
        "inductor": _open_torch,
    }
    return openers[spec["to"]](spec, graphs, threads)


def file_names(spec: Mapping[str, Any]) -> list[str]:
    """Of the files that graphs are opened from."""
    endings = {"openvino": ("xml", "bin"), "onnx": ("onnx",), "torch": ("pt2",), "inductor": ("pt2",)}[spec["to"]]
    return [f"{name}.{ending}" for name in part_names(spec) for ending in endings]


def part_names(spec: Mapping[str, Any]) -> list[str]:
    """Of the graphs, in the order in which they are run."""
    return [part["graph"] for part in spec["encoders"]] + [spec["roof"]["graph"]]


def outputs_of(spec: Mapping[str, Any], name: str) -> list[str]:
    """What a graph says, in its order."""
    parts = {part["graph"]: part["outputs"] for part in (*spec["encoders"], spec["roof"])}
    return list(parts[spec["roof"]["graph"] if name == WHOLE else name])


@functools.cache
def openvino_core() -> Any:
    """The library, once for the whole process and never given up.

    Each one gives the thread a stack for signals, and in the end gives back the one that was there before
    (openvinotoolkit/openvino, pull request 11894). Of two, where the first goes first, that is one that has gone: the
    next signal, an interrupt for one, would end the process.
    """
    import openvino

    return openvino.Core()


class OpenVinoGraphs:
    """Each graph is compiled when it is first asked, and so is WHOLE."""

    def __init__(
        self, spec: Mapping[str, Any], graphs: Graphs, threads: int | None = None, *, profile: bool = False
    ) -> None:
        """`profile` has it count the time of each operation, which takes some itself."""
        self.spec, self._graphs = spec, graphs
        self._core = openvino_core()
        self._settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "PERF_COUNT": profile,
            # As was asked of the export: left to itself it computes in bf16 where the processor has units for that,
            # and answers otherwise than what was measured.
            "INFERENCE_PRECISION_HINT": spec.get("compute", "f32"),
        }
        if threads is not None:
            self._settings["INFERENCE_NUM_THREADS"] = threads
        self.compiled: dict[str, Any] = {}
        self.requests: dict[str, Any] = {}

    def __call__(self, name: str, given: Arrays) -> Arrays:
        self.open(name)
        found = self.requests[name].infer(given, share_inputs=True)
        # By place: a name may belong to an input that is passed on.
        return {output: np.array(found[place]) for place, output in enumerate(outputs_of(self.spec, name))}

    def open(self, name: str) -> Any:
        """A graph, compiled."""
        if name not in self.compiled:
            self.compiled[name] = self._core.compile_model(self.written(name), "CPU", self._settings)
            self.requests[name] = self.compiled[name].create_infer_request()
        return self.compiled[name]

    def written(self, name: str) -> Any:
        """A graph as the export has it; WHOLE is made of those."""
        if name == WHOLE:
            return joined_by_openvino(self.spec, self.written)
        if isinstance(self._graphs, Path):
            return self._core.read_model(self._graphs / f"{name}.xml")
        return self._core.read_model(self._graphs[f"{name}.xml"], self._graphs[f"{name}.bin"])


def joined_by_openvino(spec: Mapping[str, Any], read: Callable[[str], Any]) -> Any:
    """All graphs as one: what the encoders give goes straight into the roof. Its inputs are the encoders' and those of
    the roof that no encoder gives, each with its encoder's place behind its name."""
    import openvino

    roof = read(spec["roof"]["graph"])
    awaited = dict(zip(spec["roof"]["inputs"], roof.get_parameters(), strict=True))
    given: list[Any] = []
    for place, part in enumerate(spec["encoders"]):
        encoder = read(part["graph"])
        for name, parameter in zip(part["inputs"], encoder.get_parameters(), strict=True):
            parameter.output(0).set_names({f"{name}_{place}"})
            given.append(parameter)
        for name, result in zip(part["outputs"], encoder.get_results(), strict=True):
            parameter = awaited.pop(f"{name}_{place}", None)
            if parameter is not None:  # a roof of votes reads no tokens
                for target in parameter.output(0).get_target_inputs():
                    target.replace_source_output(result.input_value(0))
    return openvino.Model(roof.get_results(), [*given, *awaited.values()], WHOLE)


def _open_onnx(spec: Mapping[str, Any], graphs: Graphs, threads: int | None) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    sessions = {}
    for name in part_names(spec):
        given = str(graphs / f"{name}.onnx") if isinstance(graphs, Path) else graphs[f"{name}.onnx"]
        sessions[name] = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])

    def call(name: str, given: Arrays) -> Arrays:
        # By place: in the graph, an output has another name than the input that it may pass on.
        return dict(zip(outputs_of(spec, name), sessions[name].run(None, given), strict=True))

    return call


def _open_torch(spec: Mapping[str, Any], graphs: Graphs, threads: int | None) -> Call:
    import torch

    if spec["to"] == "inductor":
        import torch._inductor
    if threads is not None:
        torch.set_num_threads(threads)
    modules: dict[str, Any] = {}
    for name in part_names(spec):
        given = graphs / f"{name}.pt2" if isinstance(graphs, Path) else io.BytesIO(graphs[f"{name}.pt2"])
        if spec["to"] == "torch":
            modules[name] = torch.export.load(given).module()
        else:
            modules[name] = torch._inductor.aoti_load_package(given)

    def call(name: str, given: Arrays) -> Arrays:
        with torch.inference_mode():
            found = modules[name]({key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in given.items()})
        return {key: value.numpy() for key, value in found.items()}

    return call


# ---- Media: from a cell to numbers, as data/modality/ has it. ----


def columns_of(settings: Mapping[str, Any]) -> list[str]:
    """The columns that a modality reads."""
    if settings["kind"] == "table":
        return [column["name"] for column in (*settings["numbers"], *settings["categories"])]
    return [settings["column"]]


def _says_nothing(cell: Any) -> bool:
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    return cell is None or (isinstance(cell, str) and not cell.strip())


def _gathered(settings: Mapping[str, Any], met: Mapping[int, tuple[str, Any]], good: Sequence[int]) -> Any:
    index_B, present_B = np.zeros(len(good), np.int64), np.zeros(len(good), np.bool_)
    places: dict[str, int] = {}
    own: list[Any] = []
    for row, place in enumerate(good):
        if place in met:
            key, medium = met[place]
            if key not in places:
                places[key] = len(own)
                own.append(medium)
            index_B[row], present_B[row] = places[key], True
    return stacked(settings, own), index_B, present_B


def stacked(settings: Mapping[str, Any], media: Sequence[Any]) -> Arrays:
    """One batch of distinct media; names and shapes are those of the export's signature."""
    kind = settings["kind"]
    if kind == "text":
        ids_UT, mask_UT = _padded(media, max((len(ids) for ids in media), default=1), np.int64)
        return {"ids_UT": ids_UT, "mask_UT": mask_UT}
    if kind == "image":
        scale = np.array(settings["scale"], np.float32)
        shape = (0, settings["height"], settings["width"], 3)
        pixels_UHWC = np.stack(media) if media else np.zeros(shape, np.uint8)
        pixels_UCHW = np.ascontiguousarray(pixels_UHWC.transpose(0, 3, 1, 2)).astype(np.float32)
        pixels_UCHW *= (1 / 255 / scale)[:, None, None]
        pixels_UCHW -= (np.array(settings["mean"], np.float32) / scale)[:, None, None]
        return {"pixels_UCHW": pixels_UCHW}
    if kind == "audio":
        longest = max((len(medium) for medium in media), default=1)
        samples_UT, mask_UT = _padded(media, -(-longest // SOUND_PAD) * SOUND_PAD, np.float32)
        samples_UT /= SOUND_STEPS
        return {"samples_UT": samples_UT, "mask_UT": mask_UT}
    if kind == "table":
        rows_UC = np.stack(media) if media else np.zeros((0, len(columns_of(settings))))
        split = len(settings["numbers"])
        known_UN = ~np.isnan(rows_UC[:, :split])
        return {
            "numbers_UN": np.where(known_UN, rows_UC[:, :split], 0.0).astype(np.float32),
            "known_UN": known_UN,
            "categories_UK": np.ascontiguousarray(rows_UC[:, split:]).astype(np.int64),
        }
    longest = max((medium.shape[1] for medium in media), default=1)
    samples_UCT = np.zeros((len(media), settings["num_channels"], longest), np.float32)
    mask_UT = np.zeros((len(media), longest), np.bool_)
    for index, medium in enumerate(media):
        samples_UCT[index, :, : medium.shape[1]] = medium
        mask_UT[index, : medium.shape[1]] = True
    return {"samples_UCT": samples_UCT, "mask_UT": mask_UT}


def _padded(rows: Sequence[Any], width: int, dtype: Any) -> tuple[Any, Any]:
    padded, mask = np.zeros((len(rows), width), dtype), np.zeros((len(rows), width), np.bool_)
    for index, row in enumerate(rows):
        padded[index, : len(row)], mask[index, : len(row)] = row, True
    return padded, mask


def media_bytes(cell: Any, folder: Path) -> bytes:
    """The encoded file of a cell: its bytes, or what lies at a path below `folder`."""
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if isinstance(cell, str):
        root = folder.resolve()
        try:
            path = (root / cell).resolve()
            if not path.is_relative_to(root):
                raise BadValue(f"path {cell!r} leads out of the records' folder")
            if not path.is_file():
                raise BadValue(f"there is no file {cell!r}")
            if path.stat().st_size > LARGEST_BYTES:
                raise BadValue(f"file {cell!r} has over {LARGEST_BYTES // 2**20} MiB")
            cell = path.read_bytes()
        except (OSError, ValueError) as error:
            raise BadValue(f"path {cell!r} cannot be read ({error})") from None
    if not isinstance(cell, bytes):
        raise BadValue(f"holds {type(cell).__name__}, not a file's bytes or path")
    if not cell or len(cell) > LARGEST_BYTES:
        raise BadValue(f"is an empty file, or has over {LARGEST_BYTES // 2**20} MiB")
    return cell


def read_text(text: Any, tokenizer: Any) -> Any:
    """Token ids."""
    if not isinstance(text, str):
        raise BadValue(f"holds {type(text).__name__}, not text")
    if len(text) > LARGEST_CHARACTERS:
        raise BadValue(f"has over {LARGEST_CHARACTERS:,} characters")
    try:
        ids = tokenizer.encode(text).ids
    except TypeError:
        raise BadValue("holds half a character, which no UTF-8 can spell") from None
    if not ids:
        raise BadValue("has nothing that the tokenizer can read")
    return np.array(ids, np.int64)


def read_picture(content: bytes, settings: Mapping[str, Any]) -> Any:
    """Pixels (H, W, 3) as bytes, turned upright, of the model's size."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture: Any = Image.open(io.BytesIO(content), formats=PICTURES)
            if picture.width * picture.height > settings["largest_pixels"]:
                raise BadValue(f"claims {picture.width} x {picture.height} pixels, over the limit")
            picture.load()
            picture = _rgb(_upright(picture))
    except BadValue:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they meet in a broken file
        raise BadValue(f"is no whole picture ({str(error)[:80]})") from None
    if picture.size != (settings["width"], settings["height"]):
        picture = picture.resize((settings["width"], settings["height"]), Image.Resampling.BILINEAR)
    return np.asarray(picture)


def _upright(picture: Any) -> Any:
    from PIL import Image

    turns = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
    turns |= {6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}
    try:
        turn = turns.get(picture.getexif().get(0x0112, 1))
    except Exception:  # a broken note leaves the pixels as good as they are
        return picture
    return picture if turn is None else picture.transpose(Image.Transpose[turn])


def _rgb(picture: Any) -> Any:
    from PIL import Image

    if picture.mode == "F":
        raise BadValue("has pixels of floating point, of which none can say what is white")
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) // 256).astype(np.uint8))
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        ground = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(ground, picture.convert("RGBA"))
    return picture.convert("RGB")


def read_sound(content: bytes, settings: Mapping[str, Any]) -> Any:
    """Mono samples at the model's rate, as loud as every other, in 16 bits."""
    import soundfile
    import soxr

    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate = file.samplerate
            if file.frames > settings["largest_seconds"] * rate:
                raise BadValue(f"claims {file.frames / rate:.0f} seconds, over the limit")
            wanted = int((settings["max_seconds"] + 0.1) * rate) + 1
            block = file.read(wanted, dtype="float32", always_2d=True)
    except soundfile.LibsndfileError as error:
        raise BadValue(f"is not sound, or is cut short ({error.error_string})") from None
    samples = block.mean(axis=1, dtype=np.float64).astype(np.float32)
    if not np.isfinite(samples).all():
        raise BadValue("has samples that are not numbers")
    if rate != settings["sample_rate"]:
        samples = soxr.resample(samples, rate, settings["sample_rate"])
    samples = samples[: int(settings["max_seconds"] * settings["sample_rate"])]
    if not len(samples):
        raise BadValue("has no samples")
    samples = samples - samples.mean(dtype=np.float64)
    samples = samples / max(float(samples.std()), 1e-4)
    return (samples * SOUND_STEPS).clip(-32767, 32767).astype(np.int16)


def read_row(cells: tuple[Any, ...], settings: Mapping[str, Any]) -> Any:
    """Standardised numbers, NaN where missing, then category indices."""
    row = np.zeros(len(cells), np.float64)
    split = len(settings["numbers"])
    for place, column in enumerate(settings["numbers"]):
        row[place] = math.nan if cells[place] is None else _number(cells[place], column["name"])
        row[place] = (row[place] - column["mean"]) / column["scale"]
        if abs(row[place]) > np.finfo(np.float32).max:
            raise BadValue(f"{column['name']} holds {cells[place]}, which is too far from the others")
    for place, column in enumerate(settings["categories"], start=split):
        cell = cells[place]
        if cell is not None:
            name = str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)
            row[place] = column["values"].index(name) + 1 if name in column["values"] else 0
    return row


def _number(cell: Any, column: str) -> float:
    try:
        number = float(cell)
    except (TypeError, ValueError, OverflowError):
        raise BadValue(f"{column} holds {str(cell)[:40]!r}, not a number") from None
    if not math.isfinite(number):
        raise BadValue(f"{column} holds {number}: leave a missing number empty")
    return number


def read_signal(cell: Any, folder: Path, settings: Mapping[str, Any]) -> Any:
    """Standardised channels (C, T), from lists of numbers or a .npy file."""
    try:
        if isinstance(cell, list):
            samples = np.asarray(cell, np.float32)
        else:
            content = media_bytes(cell, folder)
            samples = np.load(io.BytesIO(content), allow_pickle=False).astype(np.float32)
    except (ValueError, TypeError, OSError, EOFError):
        raise BadValue("is neither an even list of numbers nor a whole .npy file") from None
    samples = samples[None] if samples.ndim == 1 else samples
    if samples.ndim != 2 or samples.shape[0] != settings["num_channels"] or not 0 < samples.size <= LARGEST_NUMBERS:
        raise BadValue(f"has shape {samples.shape}, not ({settings['num_channels']}, time)")
    samples = ((samples[:, : settings["max_samples"]] - settings["mean"]) / settings["scale"]).astype(np.float32)
    if not np.isfinite(samples).all():
        raise BadValue("has values that are not finite numbers")
    return samples


def main(arguments: Sequence[str]) -> int:
    """Answer the records of a .jsonl file, beside which their media lie."""
    if len(arguments) not in (1, 2):
        print("usage: python run.py RECORDS.jsonl [ANSWERS.jsonl]", file=sys.stderr)
        return 2
    source = Path(arguments[0])
    try:
        records = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
        runtime = Runtime(Path(__file__).resolve().parent)
    except (OSError, ValueError, ImportError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    lines = (json.dumps(answer, ensure_ascii=False) for answer in runtime.answer(records, source.parent))
    if len(arguments) == 1:
        for line in lines:
            print(line)
    else:
        Path(arguments[1]).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
