"""OpenTelemetry traces of requests, with the semantic names ``gen_ai.*``; without an endpoint nothing is imported.

Prompts and outputs are never recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

Attribute = str | int | float | bool | list[str]


class Span(Protocol):
    """What a request adds to its trace."""

    def set(self, attributes: Mapping[str, Attribute | None]) -> None:
        """Add attributes; None is left out."""

    def fail(self, kind: str) -> None:
        """Mark the span as failed with an error of ``kind``."""


class Tracer(Protocol):
    """Opens a span for each request."""

    @contextmanager
    def span(self, name: str, headers: Mapping[str, str]) -> Iterator[Span]:
        """A server span, the child of what ``headers`` (traceparent) name."""
        ...

    def close(self) -> None:
        """Send what is left; blocks for some seconds at most."""


class SilentSpan:
    """A span that nobody collects."""

    def set(self, attributes: Mapping[str, Attribute | None]) -> None:
        """Nothing."""

    def fail(self, kind: str) -> None:
        """Nothing."""


class SilentTracer:
    """Traces nothing."""

    _span = SilentSpan()

    @contextmanager
    def span(self, name: str, headers: Mapping[str, str]) -> Iterator[Span]:
        """A span that nobody collects."""
        yield self._span

    def close(self) -> None:
        """Nothing."""


class OtelSpan:
    """A span of the OpenTelemetry SDK."""

    def __init__(self, span: object) -> None:
        from opentelemetry.trace import Span as SdkSpan

        assert isinstance(span, SdkSpan)
        self._span = span

    def set(self, attributes: Mapping[str, Attribute | None]) -> None:
        """Add attributes; None is left out."""
        self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})

    def fail(self, kind: str) -> None:
        """Mark the span as failed with an error of ``kind``."""
        from opentelemetry.trace import Status, StatusCode

        self._span.set_attribute("error.type", kind)
        self._span.set_status(Status(StatusCode.ERROR))


class OtelTracer:
    """Spans of one provider."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("pagedserve_engine")
        self._propagator = TraceContextTextMapPropagator()

    @contextmanager
    def span(self, name: str, headers: Mapping[str, str]) -> Iterator[Span]:
        """A server span, the child of what ``headers`` (traceparent) name."""
        from opentelemetry.trace import SpanKind

        parent = self._propagator.extract({name.lower(): value for name, value in headers.items()})
        # An exception's message may quote a prompt: only its kind is recorded, by ``fail``.
        with self._tracer.start_as_current_span(
            name, context=parent, kind=SpanKind.SERVER, record_exception=False, set_status_on_exception=False
        ) as span:
            yield OtelSpan(span)

    def close(self) -> None:
        """Send what is left; blocks for some seconds at most."""
        self._provider.shutdown()


def create_tracer(endpoint: str | None) -> Tracer:
    """A tracer that sends to the collector at ``endpoint`` (OTLP over HTTP, its base URL), or a silent one."""
    if endpoint is None:
        return SilentTracer()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "pagedserve-engine"}), shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces", timeout=5)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return OtelTracer(provider)
