from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fake_engine import FakeEngine
from pagedserve_engine.errors import StepFailedError
from pagedserve_engine.server import app
from pagedserve_engine.tracing import OtelTracer, SilentTracer, create_tracer
from serving import call, chat, complete


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    exporter, provider = InMemorySpanExporter(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(app, "create_tracer", lambda endpoint: OtelTracer(provider))
    return exporter


def only(spans: InMemorySpanExporter) -> Any:
    [span] = spans.get_finished_spans()
    return span


def test_without_an_endpoint_the_sdk_is_not_imported() -> None:
    program = (
        "import sys; from pagedserve_engine.tracing import create_tracer; create_tracer(None).close();"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert isinstance(create_tracer(None), SilentTracer)


def test_a_request_is_a_span_with_semantic_names(spans: InMemorySpanExporter) -> None:
    chat(max_tokens=5, temperature=0.5, seed=3)
    span = only(spans)
    assert span.name == "POST /v1/chat/completions"
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "org/fake",
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.usage.input_tokens": 8,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.finish_reasons": ("length",),
        "http.response.status_code": 200,
    }
    assert {name: span.attributes[name] for name in expected} == expected


def test_a_span_continues_the_client_s_trace(spans: InMemorySpanExporter) -> None:
    trace = "0af7651916cd43dd8448eb211c80319c"
    call("GET", "/v1/models", headers={"TraceParent": f"00-{trace}-b7ad6b7169203331-01"})
    assert f"{only(spans).context.trace_id:032x}" == trace


def test_a_failure_marks_its_span_without_text(spans: InMemorySpanExporter) -> None:
    complete(FakeEngine(fail_after=(0, StepFailedError("the prompt was: secret"))), prompt="secret")
    span = only(spans)
    assert not span.status.is_ok
    assert span.attributes["error.type"] == "step_failed"
    assert "secret" not in span.to_json()


def test_a_tracer_with_an_endpoint_exports_there() -> None:
    tracer = create_tracer("http://127.0.0.1:9/")
    assert isinstance(tracer, OtelTracer)
    tracer.close()
