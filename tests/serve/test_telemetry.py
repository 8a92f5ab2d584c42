"""Traces, held in memory in place of a collector."""

import sys
from pathlib import Path

import pytest
from serving import Slow, serving

from dougong.core.errors import ConfigError
from dougong.serve.models import Wanted
from dougong.serve.telemetry import start_spans
from dougong.serve.workers import ThreadWorkers


def test_a_span_names_model_and_request_and_nothing_of_contents(
    hollow_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = pytest.importorskip("opentelemetry.trace")
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    wanted = [Wanted("colours", "1", hollow_bundle)]
    with serving(
        wanted, workers=lambda _: ThreadWorkers(Slow), telemetry=True, batching={"slo_seconds": 1.0}
    ) as server:
        headers = {"x-request-id": "mine-1", "content-type": "application/json"}
        assert server.ask("POST", "/v1/predict", b'{"remark": "xylophone"}', headers)[0] == 200
        assert server.ask("POST", "/v1/predict", b'{"remark": 3}', headers)[0] == 422

    (span,) = exporter.get_finished_spans()  # of what a model was asked
    assert span.name == "infer"
    assert dict(span.attributes or {}) == {"model": "colours", "request": "mine-1"}
    assert "xylophone" not in span.to_json()


@pytest.mark.parametrize("missing", ["opentelemetry", "opentelemetry.exporter"])
def test_without_somebody_to_send_to_it_does_not_start(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing != "opentelemetry":
        pytest.importorskip("opentelemetry.sdk.trace")
    for name in [name for name in sys.modules if name == missing or name.startswith(f"{missing}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ConfigError, match=r"--telemetry needs opentelemetry.*pip install opentelemetry-sdk"):
        start_spans()
