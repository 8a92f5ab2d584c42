"""Traces, for whoever collects them.

Here        start_spans.
Elsewhere   what is traced (app.py); where traces go (OpenTelemetry's own variables, such as
            OTEL_EXPORTER_OTLP_ENDPOINT).
Promise     a span holds a model's name and a request's id, nothing of contents. Traces go to somebody, or the server
            does not start.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dougong.core.errors import ConfigError


def start_spans() -> Callable[[str, Mapping[str, str]], Any]:
    """What makes a span of a name and attributes; whoever made it ends it.

    Where the process has set a provider of traces up, spans go there; else to a collector, by OTLP.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        if not isinstance(trace.get_tracer_provider(), TracerProvider):
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

            provider = TracerProvider()
            provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
            trace.set_tracer_provider(provider)
    except ImportError as error:
        raise ConfigError(
            f"--telemetry needs {error.name}, which is not installed. Use: pip install opentelemetry-sdk "
            "opentelemetry-exporter-otlp"
        ) from None
    tracer = trace.get_tracer("dougong.serve")

    def start(name: str, attributes: Mapping[str, str]) -> Any:
        return tracer.start_span(name, attributes=dict(attributes))

    return start
