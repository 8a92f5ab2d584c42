import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image

from dougong.core.errors import RunError
from dougong.core.events import (
    Announcer,
    Evaluated,
    EventFile,
    RecordsSetAside,
    RunFinished,
    RunStarted,
    StepDone,
)
from dougong.core.files import write_atomic, write_json
from dougong.watch import cards, report
from dougong.watch.report import write_report

HOSTILE = '<script>alert(1)</script>" onload="x'
LABELS = ["black", "blue", "rectangle", HOSTILE]
CONDITIONS = {"written": ["image", "question"], "spoken": ["image", "speech"]}


def fake_run(folder: Path, *, task: str = "single_label", labels: list[str] = LABELS) -> Path:
    """A run's folder such as recipes/run.py leaves behind."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"name": "vqa-demo", "about": "A few minutes.", "seed": 0, "data": {"source": "easy-vqa"}}
    write_atomic(folder / "run.yaml", yaml.safe_dump(settings, sort_keys=False))
    write_events(folder / "events.jsonl", task)
    write_json(folder / "evaluation.json", evaluation_of(task, labels if task != "regression" else []))
    write_json(folder / "samples.json", samples_of(folder, task))
    return folder


def write_events(path: Path, task: str) -> None:
    file = EventFile(path)
    announce = Announcer(file)
    announce(RunStarted(step=0, total_steps=300, precision="fp32", num_parameters=412_345, resumed=False))
    random = np.random.default_rng(0)
    for step in range(1, 301):
        loss = float("nan") if step == 7 else 0.2 + 1.8 * float(np.exp(-step / 80)) + 0.2 * float(random.random())
        announce(
            StepDone(
                step=step,
                loss=loss,
                grad_norm=1.0,
                learning_rate=1e-3 * min(1.0, step / 30),
                num_records=128,
                epoch=0,
                seconds=0.2,
                wait_seconds=0.01,
            )
        )
        if step % 50 == 0:
            for place, condition in enumerate(CONDITIONS):
                metrics = {name: value - 0.1 * place - 20 / step for name, value in metrics_of(task).items()}
                announce(
                    Evaluated(
                        step=step, split="validation", condition=condition, metrics=metrics, num_records=64, seconds=0.5
                    )
                )
    bad = {"row": 17, "column": "speech", "reason": f"is not sound {HOSTILE}"}
    announce(RecordsSetAside(step=300, count=1, seen=900, first=[bad]))
    announce(RunFinished(step=300, reason="steps", best_metric=0.9, best_step=250, seconds=70.0))
    file.close()


def metrics_of(task: str) -> dict[str, float]:
    return {
        "single_label": {"accuracy": 0.934, "balanced_accuracy": 0.91, "macro_f1": 0.905},
        "multi_label": {"micro_f1": 0.8, "macro_f1": 0.75, "mean_average_precision": 0.815},
        "regression": {"rmse": 12.25, "mae": 9.5, "r2": -0.125},
    }[task]


def evaluation_of(task: str, labels: list[str]) -> dict[str, Any]:
    random = np.random.default_rng(1)
    confusion = (random.integers(0, 6, (len(labels), len(labels))) + 40 * np.eye(len(labels), dtype=int)).tolist()
    conditions = {
        name: {
            "split": "test",
            "keep": keep,
            "metrics": {metric: value - 0.08 * place for metric, value in metrics_of(task).items()},
            "confusion": confusion if task == "single_label" else None,
            "gate": {"image": 0.55, keep[1]: 0.45},
            "num_records": 1234,
            "seconds": 1.5,
        }
        for place, (name, keep) in enumerate(CONDITIONS.items())
    }
    rows = [
        {"name": "majority", "written": 0.24, "spoken": 0.24, "parameters": 0, "seconds": 0.0},
        {"name": "late concat", "written": 0.892, "spoken": 0.81, "parameters": 390_000, "seconds": 170.2},
        {"name": "sandwich", "written": 0.934, "spoken": 0.854, "parameters": 412_345, "seconds": 214.9},
    ]
    gain = {"text": "sandwich over late concat, written", "value": 0.042, "low": 0.021, "high": 0.063}
    return {
        "target": {"name": "answer", "task": task, "labels": labels, "mean": 0.0, "scale": 1.0},
        "data": {
            "name": "train.parquet",
            "rows": {"train": 9000, "validation": 450, "test": 1234},
            "notes": ["the spoken questions are synthetic (espeak-ng)"],
        },
        "conditions": conditions,
        "comparison": rows if task == "single_label" else [],
        "gains": [gain] if task == "single_label" else [],
        "bad": {"count": 1, "seen": 1234, "first": [{"row": 3, "column": "image", "reason": "is cut off"}]},
    }


def samples_of(folder: Path, task: str) -> list[dict[str, Any]]:
    target, right, wrong = {
        "single_label": (HOSTILE, HOSTILE, "blue"),
        "multi_label": ("['b', 'a']", "['a', 'b']", "['a', 'c']"),
        "regression": ("3.142", "3", "2.5"),
    }[task]
    samples: list[dict[str, Any]] = []
    for number in range(6):
        spoken = number >= 3
        write_atomic(folder / f"samples/{number}-image.png", picture())
        write_atomic(folder / f"samples/{number}-2-sound.wav", sound())
        tokens = ["[CLS]", "what", "colo", "##ur", "is", "the", "rect", "##angle", "?", "[SEP]"]
        image = {"kind": "image", "absent": False, "file": f"samples/{number}-image.png"}
        question = {"kind": "text", "absent": False, "text": f"What colour is the rectangle? {HOSTILE}"}
        speech = {"kind": "audio", "absent": False, "file": f"samples/{number}-2-sound.wav"}
        table = {"kind": "table", "absent": False, "values": {"age": "41", HOSTILE: "<b>bold</b>"}}
        away = {"absent": True}
        attention: dict[str, Any] = {
            "image": {"from": "question", "weights": [(place % 7) / 50 for place in range(16)], "grid": [4, 4]},
            "table": {"from": "image", "weights": [0.1, 0.4], "tokens": ["age", HOSTILE]},
        }
        if spoken:
            weights = np.abs(np.sin(np.arange(400) / 50)).tolist()
            attention["speech"] = {"from": "image", "weights": weights, "seconds": 1.25}
        else:
            attention["question"] = {"from": "image", "weights": [0.02 * n for n in range(10)], "tokens": tokens}
        samples.append(
            {
                "condition": "spoken" if spoken else "written",
                "row": 100 + number,
                "inputs": {
                    "image": image,
                    "question": {"kind": "text", **away} if spoken else question,
                    "speech": speech if spoken else {"kind": "audio", **away},
                    "table": table,
                },
                "target": target,
                "prediction": wrong if number % 3 == 0 else right,
                "probabilities": {} if task == "regression" else {HOSTILE: 0.8, "blue": 0.15, "black": 0.05},
                "gate": {"image": 0.6, "question": 0.3, "speech": 0.1},
                "attention": attention,
            }
        )
    return samples


def picture() -> bytes:
    pixels = np.full((64, 64, 3), 235, np.uint8)
    pixels[20:44, 12:50] = (40, 90, 200)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return content.getvalue()


def sound() -> bytes:
    content = io.BytesIO()
    soundfile.write(content, 0.3 * np.sin(np.arange(8000) / 6), 8000, format="WAV", subtype="PCM_16")
    return content.getvalue()


class Page(HTMLParser):
    """What a browser would find: elements, their attributes, and the text outside style and title."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._inside = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("style", "title"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def values(self, attribute: str) -> list[str]:
        return [given[attribute] or "" for _, given in self.elements if attribute in given]

    def ids(self) -> list[str]:
        return self.values("id")


def report_of(folder: Path) -> Page:
    path = write_report(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """A report for each task: drawing one takes about a second."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        task: report_of(fake_run(folder / task, task=task)) for task in ("single_label", "multi_label", "regression")
    }


def change(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    write_json(path, {**json.loads(path.read_text()), **values})


@pytest.mark.parametrize("task", ["single_label", "multi_label", "regression"])
def test_the_page_refers_to_nothing_outside_itself_and_runs_nothing(pages: dict[str, Page], task: str) -> None:
    page = pages[task]

    for attribute in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
        for value in page.values(attribute):
            assert value.startswith(("data:image/png;base64,", "data:audio/wav;base64,", "#")), value[:80]
    references = re.findall(r"url\(([^)]*)\)", page.source)
    assert all(reference.startswith("#") for reference in references)
    assert "@import" not in page.source
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page.source)
    assert "http" not in without_namespaces.replace("http-equiv", "")
    assert "file:" not in page.source
    tags = {tag for tag, _ in page.elements}
    assert tags.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form"})
    assert not [name for _, given in page.elements for name in given if name.startswith("on")]


@pytest.mark.parametrize("task", ["single_label", "multi_label", "regression"])
def test_every_reference_inside_the_page_is_found_and_no_id_stands_twice(pages: dict[str, Page], task: str) -> None:
    page = pages[task]

    ids = page.ids()
    assert len(ids) == len(set(ids))
    wanted = [value[1:] for value in page.values("href") if value.startswith("#")]
    wanted += re.findall(r"url\(#([^)]*)\)", page.source)
    wanted += page.values("for") + page.values("aria-labelledby")
    assert wanted
    assert set(wanted) <= set(ids)


def test_text_from_data_is_shown_as_text(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run")
    change(folder, "evaluation.json", data={"name": HOSTILE, "notes": [HOSTILE]})
    events = (folder / "events.jsonl").read_text()
    (folder / "events.jsonl").write_text(events.replace('"written"', '"</svg><img src=x> $\\\\frac"'))

    page = report_of(folder)

    assert "<script" not in page.source
    assert "src=x>" not in page.source
    assert "&lt;/svg&gt;&lt;img src=x&gt; $\\frac" in page.source
    assert HOSTILE in page.text  # as it is, to whoever reads the page


def test_the_page_says_what_was_measured(pages: dict[str, Page]) -> None:
    page = pages["single_label"]

    for words in (
        "vqa-demo",
        "Predicts answer ( single label , 4 labels)",
        "93.4 %",
        "1,234 test records judged",
        "the spoken questions are synthetic (espeak-ng)",
        "sandwich over late concat, written: +4.2 percentage points (95 % interval +2.1 to +6.3).",
        "Steps without a finite loss, which are not drawn: 1.",
        "What is taken for what",
        "300 in 1 min 0 s",
        "640",
        "fp32",
        "Training: 1 of 900 records",
        "Judging: 1 of 1,234 records",
        "is cut off",
        "source: easy-vqa",
    ):
        assert re.sub(r"\s", "", words) in re.sub(r"\s", "", page.text), words
    assert "this may be chance" not in page.text
    labels = page.values("aria-label")
    assert "accuracy: written 93.4 %, spoken 85.4 %" in labels
    assert any(label.startswith("Training loss over 299 steps") for label in labels)
    assert any("written: image 55 %, question 45 %" in label for label in labels)


def test_a_record_shows_what_was_given_and_what_was_made_of_it(pages: dict[str, Page]) -> None:
    page = pages["single_label"]

    tags = [tag for tag, _ in page.elements]
    assert (tags.count("img"), tags.count("audio")) == (6, 3)
    assert all(given.get("alt") for tag, given in page.elements if tag == "img")
    assert page.text.count("not given") == 6
    assert page.values("class").count("verdict right") == 4
    assert page.values("class").count("verdict wrong") == 2
    assert "wrong" in page.texts
    assert page.values("aria-label").count("attention, strongest at row 2 of 4, column 3 of 4") == 6
    assert "shaded: where question looked" in page.text
    assert page.values("class").count("token") == 3 * 8
    assert page.values("class").count("token special") == 3 * 2
    assert "(target)" in page.text


def test_switches_of_number_format_are_drawn_and_the_first_listed(
    tmp_path: Path, pages: dict[str, Page], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "MOST_SWITCHES", 3)
    assert "formats" not in pages["single_label"].ids()  # none has happened
    folder = fake_run(tmp_path / "run")
    switch = {"kind": "PrecisionSwitched", "time": 0.0, "scale_exponent": 12}
    switches = [
        {
            **switch,
            "step": 1,
            "group": "block 3",
            "modality": "image",
            "before": "bf16",
            "after": "fp16",
            "reason": "fits",
        },
        {**switch, "step": 1, "group": "head", "modality": "", "before": "bf16", "after": "fp16", "reason": "fits"},
        {**switch, "step": 90, "group": "head", "modality": "", "before": "fp16", "after": "bf16", "reason": HOSTILE},
        {
            **switch,
            "step": 95,
            "group": "head",
            "modality": "",
            "before": "bf16",
            "after": "fp16",
            "reason": "unlisted",
        },
    ]
    with (folder / "events.jsonl").open("a") as events:
        events.writelines(json.dumps(event) + "\n" for event in switches)

    page = report_of(folder)

    assert "formats" in page.ids()
    assert (
        "Number formats in 300 steps: block 3 (image) bf16 from step 0, fp16 from step 1; "
        "head bf16 from step 0, fp16 from step 1, bf16 from step 90, fp16 from step 95"
    ) in page.values("aria-label")
    assert "90 head fp16 bf16 2 12 " + HOSTILE in page.text
    assert "unlisted" not in page.text
    assert "The first 3 of 4 switches are listed." in page.text
    assert "<script" not in page.source


@pytest.mark.parametrize(
    ("file", "part"), [("samples.json", "records"), ("events.jsonl", "curves"), ("run.yaml", "settings")]
)
def test_a_part_without_its_file_is_left_out(tmp_path: Path, pages: dict[str, Page], file: str, part: str) -> None:
    folder = fake_run(tmp_path / "run")
    assert part in pages["single_label"].ids()
    (folder / file).unlink()
    page = report_of(folder)
    assert part not in page.ids()
    assert f"#{part}" not in page.values("href")


def test_parts_without_figures_are_left_out(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run")
    evaluation = evaluation_of("single_label", LABELS)
    for condition in evaluation["conditions"].values():
        condition.update(gate=None, metrics={}, confusion=None, num_records=0)
    write_json(folder / "evaluation.json", {**evaluation, "comparison": [], "gains": []})

    page = report_of(folder)

    assert {"comparison", "gate", "confusion"}.isdisjoint(page.ids())
    assert "–" in page.texts  # there is no main figure, and that is said


def test_validation_figures_come_with_a_warning(tmp_path: Path, pages: dict[str, Page]) -> None:
    folder = fake_run(tmp_path / "run")
    assert "figures are of validation records" not in pages["single_label"].text
    evaluation = evaluation_of("single_label", LABELS)
    for condition in evaluation["conditions"].values():
        condition["split"] = "validation"
    write_json(folder / "evaluation.json", evaluation)
    assert "figures are of validation records" in report_of(folder).text


def test_a_gain_that_may_be_chance_is_called_so(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run")
    change(folder, "evaluation.json", gains=[{"text": "ours", "value": 0.004, "low": -0.011, "high": 0.019}])
    assert "(95 % interval −1.1 to +1.9). The interval holds 0: this may be chance." in report_of(folder).text


def test_many_labels_become_the_pairs_that_are_confused_most(tmp_path: Path) -> None:
    labels = [f"label {number}" for number in range(31)]
    folder = fake_run(tmp_path / "run", labels=labels)
    evaluation = evaluation_of("single_label", labels)
    for condition in evaluation["conditions"].values():
        condition["confusion"][4][9] = 77
    write_json(folder / "evaluation.json", evaluation)

    page = report_of(folder)

    assert "There are 31 labels, too many for a matrix" in page.text
    assert "matrix" not in page.values("class")
    total = sum(evaluation["conditions"]["written"]["confusion"][4])
    assert f"label 4 label 9 77 of {total}" in page.text
    assert len(re.findall(r"label \d+ label \d+ \d+ of", page.text)) == 2 * 10


def test_a_regression_is_off_by_so_much(pages: dict[str, Page]) -> None:
    page = pages["regression"]
    assert "confusion" not in page.ids()
    assert {"12.25", "RMSE", "off by 0.142", "off by 0.642"} <= {text.strip() for text in page.texts}
    assert "RMSE: written 12.25, spoken 12.17" in page.values("aria-label")
    assert "R²: written −0.125, spoken −0.205" in page.values("aria-label")


def test_label_sets_are_compared_whatever_their_order(pages: dict[str, Page]) -> None:
    page = pages["multi_label"]
    assert page.values("class").count("verdict right") == 4
    assert "1 of 2 labels found, 1 too many" in page.texts
    assert "mean average precision" in page.text


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "samples/link.png", "samples/\0"])
def test_a_path_out_of_the_run_is_refused(tmp_path: Path, name: str) -> None:
    folder = fake_run(tmp_path / "run")
    (tmp_path / "secret.png").write_bytes(picture())
    (folder / "samples/link.png").symlink_to(tmp_path / "secret.png")
    sample, *_ = samples_of(folder, "single_label")
    sample["inputs"]["image"]["file"] = name
    write_json(folder / "samples.json", [sample])
    (folder / "events.jsonl").unlink()

    page = report_of(folder)

    assert "not shown: its path leads out of the run's folder" in page.texts
    assert "img" not in [tag for tag, _ in page.elements]


def test_a_file_that_is_no_picture_is_not_passed_on(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run")
    (folder / "samples/0-image.png").write_text("<svg onload='alert(1)'/>")
    (folder / "samples/1-image.png").unlink()
    page = report_of(folder)
    assert "not shown: samples/0-image.png holds no image that a page can show" in page.texts
    assert "not shown: samples/1-image.png is not in the run's folder" in page.texts
    assert [tag for tag, _ in page.elements].count("img") == 4


def test_what_would_make_the_page_large_is_left_out_and_said(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run")
    with (folder / "samples/0-image.png").open("ab") as file:
        file.truncate(cards.MOST_MEDIA)
    page = report_of(folder)
    assert "below about 10 MB: 1." in page.text
    assert [tag for tag, _ in page.elements].count("img") == 5
    assert len(page.source) < 1_000_000


def test_the_same_run_gives_the_same_page(tmp_path: Path, pages: dict[str, Page]) -> None:
    assert report_of(fake_run(tmp_path / "run")).source == pages["single_label"].source


def test_odd_signs_in_labels_break_nothing(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run")
    evaluation = evaluation_of("single_label", ["$x$ and $y", "日本語 🙂", "nul \0 \ud800", "_under"])
    spoken = evaluation["conditions"].pop("spoken")
    evaluation["conditions"]["日本語 🙂 \0 \ud800 $\\frac{" + "x" * 100] = spoken
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    page = report_of(folder)
    assert "日本語 🙂" in page.text


def test_a_folder_without_figures_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError) as refused:
        write_report(tmp_path)
    assert str(refused.value) == (
        f"{tmp_path} has no evaluation.json, so there are no figures to report. "
        "Name the folder of a finished run, or finish this one with --resume."
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(RunError, match=r"evaluation\.json .*Finish the run with --resume"):
        write_report(tmp_path)
