"""OpenTelemetry traces: one span a request, by the conventions for generative AI, and what its drafts were worth.

The libraries are those of the `otel` extra, imported when tracing is asked for. No span holds prompts or answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from outrider import __version__
from outrider.engine.generation import AsyncGeneration
from outrider.errors import OptionError
from outrider.server.paths import OPEN_PATHS, POLLED_PATHS

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat", "/v1/responses": "chat"}
"""What the conventions call the work of each route; elsewhere a span is named after its method and route."""

SERVICE = "outrider"


class Tracing:
    """Makes the spans of one server. A request's is OpenTelemetry's current one while its route runs."""

    def __init__(self, provider: TracerProvider, model_name: str) -> None:
        """`provider`: of the SDK; it is shut down by `close`."""
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace, self._provider, self._model_name = trace, provider, model_name
        self._tracer = provider.get_tracer(SERVICE, __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._generations: dict[int, AsyncGeneration] = {}  # by the id of their request's span

    @classmethod
    def to(cls, endpoint: str, model_name: str) -> Tracing:
        """Traces sent to a collector by OTLP over HTTP. OptionError without the extra."""
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ModuleNotFoundError as error:
            raise OptionError(f"otlp_traces_endpoint needs {error.name}: outrider doctor says how to get it") from None
        provider = TracerProvider(resource=Resource.create({"service.name": SERVICE, "service.version": __version__}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        return cls(provider, model_name)

    def begin(self, method: str, path: str, headers: Mapping[str, str]) -> Span | None:
        """The span of a request that has come, a child of its `traceparent`'s if any; None for what is polled."""
        if path in OPEN_PATHS or path in POLLED_PATHS:
            return None
        context = self._propagator.extract(headers)
        return self._tracer.start_span(method, context, self._trace.SpanKind.SERVER)

    def current(self, span: Span) -> Any:
        """A context manager under which the span is the current one."""
        return self._trace.use_span(span, end_on_exit=False, record_exception=False, set_status_on_exception=False)

    def began(self, generation: AsyncGeneration) -> None:
        """The current request is answered by this generation."""
        context = self._trace.get_current_span().get_span_context()
        if context.is_valid:
            self._generations[context.span_id] = generation

    def end(self, span: Span, method: str, route: str, status: int, request_id: str) -> None:
        """The request is over."""
        generation = self._generations.pop(span.get_span_context().span_id, None)
        operation = OPERATIONS.get(route)
        span.update_name(f"{operation} {self._model_name}" if operation is not None else f"{method} {route}")
        span.set_attributes(
            {
                "http.request.method": method,
                "http.route": route,
                "http.response.status_code": status,
                "outrider.request.id": request_id,
            }
        )
        if operation is not None:
            span.set_attributes({"gen_ai.operation.name": operation, "gen_ai.provider.name": SERVICE})
            span.set_attribute("gen_ai.request.model", self._model_name)
        if generation is not None:
            span.set_attributes(_attributes(generation, self._model_name))
        failure = generation.error if generation is not None else None
        if status >= 400 or failure is not None:
            span.set_attribute("error.type", type(failure).__name__ if failure is not None else str(status))
        if status >= 500 or failure is not None:  # what is the client's doing is no error of a server's span
            span.set_status(self._trace.StatusCode.ERROR)
        span.end()

    def close(self) -> None:
        """Sends what has not been sent. Blocks, for as long as the SDK waits for a collector that does not answer."""
        self._provider.shutdown()


def _attributes(generation: AsyncGeneration, model_name: str) -> dict[str, Any]:
    """A generation's attributes; those of OpenAI's meaning in the conventions' names."""
    sampling, usage = generation.params, generation.usage()
    attributes: dict[str, Any] = {
        "gen_ai.response.model": model_name,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.seed": sampling.seed,
        "gen_ai.request.choice.count": sampling.n if sampling.n > 1 else None,
        "gen_ai.response.finish_reasons": [each.output.finish_reason or "none" for each in generation.completions],
        "gen_ai.usage.input_tokens": usage.prompt_tokens,
        "gen_ai.usage.output_tokens": usage.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        "gen_ai.server.time_to_first_token": generation.seconds_to_first_token,
        "outrider.speculative.drafts": usage.acceptance.drafts,
        "outrider.speculative.drafted": usage.acceptance.drafted,
        "outrider.speculative.accepted": usage.acceptance.accepted,
        "outrider.speculative.acceptance_length": usage.acceptance.length,
    }
    return {name: value for name, value in attributes.items() if value is not None}
