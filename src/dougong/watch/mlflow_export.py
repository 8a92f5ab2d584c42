"""A run's events in MLflow, beside whatever else is kept there.

Here        `export_run`, Exported.
Elsewhere   the events (core/events.py); the same curves for TensorBoard (watch/tensorboard.py); a registry of versions
            in MLflow's tables (continual/registry/).
Promise     the run's folder is only read. Exporting a run that has gone on adds what is new; one whose steps were
            trained again becomes a run of its own there, since MLflow forgets nothing. MLflow is not let to tell its
            makers of its use.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from dougong.core.errors import ConfigError, RunError
from dougong.core.events import Evaluated, RecordsSetAside, StepDone, read_events
from dougong.watch.diagnose.catalogue import CATALOGUE
from dougong.watch.diagnose.history import History
from dougong.watch.diagnose.rules import SURE, diagnose
from dougong.watch.gradient_flow import balance
from dougong.watch.tensorboard import scalars_of

EVENTS: Final = "events.jsonl"
AT_ONCE: Final = 1000
"""Figures that MLflow takes in one request, at most."""

LONGEST: Final = 250
"""Characters of a value of a parameter or tag that every store takes."""

MOST_PARAMETERS: Final = 100
SOURCE: Final = "dougong.run"
KEPT: Final = "dougong.events"
BEGINNING: Final = "dougong.beginning"
DRAWN: Final = {each.__name__: each for each in (StepDone, Evaluated, RecordsSetAside)}


class Exported(NamedTuple):
    """What was written where."""

    run_id: str
    experiment: str
    num_events: int
    """That were new."""

    num_figures: int


def export_run(run: Path, store: str, *, experiment: str = "dougong") -> Exported:
    """Write a run's figures, settings and diagnoses into an MLflow store, which is made where there is none.

    `store` is an MLflow tracking URI: `sqlite:///runs.db`, or an http(s) address of a server.

    Raises:
        RunError: the folder holds no run.
        ConfigError: MLflow is not installed, or the store is none, or does not answer.
    """
    path = run / EVENTS
    if not path.is_file():
        raise RunError(f"{run} holds no {EVENTS}: name a run's folder.")
    if not re.match(r"(sqlite:///|https?://).", store):
        raise ConfigError(f"--mlflow {store!r} is no MLflow store. Use sqlite:///runs.db, or a server's http address.")
    events = read_events(path)
    if not events:
        raise RunError(f"{path} holds no event yet. Try again after the first step.")
    client, failed = _client(store)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what MLflow's own parts no longer like is nothing a user can mend
            return _write(client, run.resolve(), events, experiment)
    except failed as error:
        raise ConfigError(f"--mlflow {store}: {str(error).splitlines()[0]}") from None


def _client(store: str) -> tuple[Any, type[Exception]]:
    # Asked before it is loaded: it would otherwise tell its makers of every use.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # else a wrong address is asked for minutes
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import mlflow  # noqa: F401, loads what the client needs
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient
    except ImportError:
        raise ConfigError("--mlflow needs mlflow, which is not installed: dougong[continual].") from None
    for noisy in ("mlflow", "alembic"):  # only now: loading it sets its own level
        logging.getLogger(noisy).setLevel(logging.WARNING)
    failed: type[Exception] = MlflowException
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return MlflowClient(tracking_uri=store), failed
        except Exception as error:  # a database driver's own kind, which is not named by MLflow
            raise ConfigError(f"--mlflow {store}: {str(error).splitlines()[0]}") from None


def _write(client: Any, run: Path, events: list[dict[str, Any]], experiment: str) -> Exported:
    found = client.get_experiment_by_name(experiment)
    number = client.create_experiment(experiment) if found is None else found.experiment_id
    # A name may come again in another folder; where a run began is its own.
    source = hashlib.sha256(str(run).encode()).hexdigest()[:16]
    known = client.search_runs([number], filter_string=f"tags.`{SOURCE}` = '{source}'", max_results=1)
    done = int(known[0].data.tags[KEPT]) if known else 0
    if known and (done > len(events) or known[0].data.tags[BEGINNING] != _digest(events[:done])):
        known, done = [], 0
    if known:
        run_id = known[0].info.run_id
    else:
        made = client.create_run(number, run_name=run.name, tags={SOURCE: source, KEPT: "0", BEGINNING: _digest([])})
        run_id = made.info.run_id
        _write_settings(client, run_id, run)
    figures = list(_figures(events[done:]))
    from mlflow.entities import Metric, RunTag

    for start in range(0, len(figures), AT_ONCE):
        client.log_batch(run_id, metrics=[Metric(*each) for each in figures[start : start + AT_ONCE]])
    tags = {KEPT: str(len(events)), BEGINNING: _digest(events), **_diagnoses(events)}
    client.log_batch(run_id, tags=[RunTag(key, value[:LONGEST]) for key, value in tags.items()])
    finished = next((event for event in reversed(events) if event["kind"] == "RunFinished"), None)
    if finished is not None:
        client.set_terminated(run_id, end_time=int(1000 * finished["time"]))
    return Exported(str(run_id), experiment, len(events) - done, len(figures))


def _figures(events: list[dict[str, Any]]) -> Iterator[tuple[str, float, int, int]]:
    """Key, value, time in milliseconds and step. What is not finite is left out: not every store can hold it."""
    for event in events:
        for key, value in _named(event):
            if math.isfinite(value):
                yield re.sub(r"[^0-9A-Za-z_./ -]", "_", key), float(value), int(1000 * event["time"]), event["step"]


def _named(event: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    known = DRAWN.get(event["kind"])
    if known is not None:
        yield from scalars_of(known(**{key: value for key, value in event.items() if key != "kind"})).items()
    elif event["kind"] == "FlowMeasured":
        yield "flow/gradient_norm", event["facts"].get("gradient_norm", math.nan)
        for name, ((_, ratio),) in balance([event]).items():
            yield f"flow/update_over_weight/{name}", ratio
        for name, value in event["gate"].items():
            yield f"flow/gate/{name}", value
        for name, told in event["probes"].items():
            yield f"flow/exchange_costs/{name}", told.get("exchange_costs", math.nan)


def _diagnoses(events: list[dict[str, Any]]) -> dict[str, str]:
    found = [finding for finding in diagnose(History.of(events)) if finding.confidence >= SURE]
    return {f"dougong.finding.{each.cause}": f"{CATALOGUE[each.cause].title} ({each.place})" for each in found}


def _write_settings(client: Any, run_id: str, run: Path) -> None:
    import yaml
    from mlflow.entities import Param

    path = run / "run.yaml"
    if not path.is_file():
        return
    flat = dict(_flat("", yaml.safe_load(path.read_text(encoding="utf-8"))))
    params = [Param(key[:LONGEST], value[:LONGEST]) for key, value in flat.items()]
    for start in range(0, len(params), MOST_PARAMETERS):
        client.log_batch(run_id, params=params[start : start + MOST_PARAMETERS])


def _flat(path: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, each in value.items():
            yield from _flat(f"{path}.{key}" if path else str(key), each)
    elif path:
        yield re.sub(r"[^0-9A-Za-z_./ -]", "_", path), value if isinstance(value, str) else json.dumps(value)


def _digest(events: list[dict[str, Any]]) -> str:
    digest = hashlib.sha256()
    for event in events:
        digest.update(f"{event['kind']} {event['step']} {event['time']}\n".encode())
    return digest.hexdigest()[:32]
