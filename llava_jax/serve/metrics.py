"""The metrics of `/metrics`, for Prometheus."""

from collections.abc import Iterator

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from llava_jax.inference.answer import Answer
from llava_jax.inference.engine import Engine

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
TOKENS_PER_SECOND = (1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """The engine's counts at the time of the request, and those of the API."""

    def __init__(self, engine: Engine):
        self.registry = prometheus_client.CollectorRegistry()
        self.registry.register(_EngineCollector(engine))
        self._requests = prometheus_client.Counter(
            "llava_http_requests", "Responses under /v1 by status", ["status"], registry=self.registry
        )
        self._first_token = prometheus_client.Histogram(
            "llava_time_to_first_token_seconds",
            "From a request's arrival in the queue to its first token",
            buckets=SECONDS,
            registry=self.registry,
        )
        self._speed = prometheus_client.Histogram(
            "llava_answer_tokens_per_second",
            "Of each answer, after its first token",
            buckets=TOKENS_PER_SECOND,
            registry=self.registry,
        )

    def responded(self, path: str, status: int) -> None:
        """Counts a response."""
        if path.startswith("/v1/"):
            self._requests.labels(status).inc()

    def text(self) -> bytes:
        return prometheus_client.generate_latest(self.registry)

    def finished(self, answer: Answer, seconds: float) -> None:
        """Counts an answer that ended `seconds` after it was submitted."""
        if answer.first_token_seconds is None:
            return
        self._first_token.observe(answer.first_token_seconds)
        decoding = seconds - answer.first_token_seconds
        if answer.completion_tokens > 1 and decoding > 0:
            self._speed.observe((answer.completion_tokens - 1) / decoding)


class _EngineCollector:
    """Turns `Engine.stats` into metrics at each request of Prometheus."""

    GAUGES = {
        "slots": ("llava_slots", "Answers that can be generated at a time"),
        "busy": ("llava_slots_busy", "Answers being generated"),
        "queued": ("llava_queue_length", "Requests that wait for a slot"),
        "adapters": ("llava_adapters", "Adapters that are loaded"),
        "pages": ("llava_cache_pages", "Pages for keys and values, of 256 positions each"),
        "pages_used": ("llava_cache_pages_used", "Of these, pages of answers being generated"),
    }
    COUNTERS = {
        "prompt_tokens": ("llava_prompt_tokens", "Positions of prompts, images included"),
        "prefix_tokens": ("llava_prefix_tokens", "Of these, positions that the prefix cache held"),
        "generated_tokens": ("llava_generated_tokens", "Tokens of answers; its rate is the server's tokens a second"),
        "finished": ("llava_answers_finished", "Answers that were finished"),
        "cancelled": ("llava_answers_cancelled", "Answers whose client disconnected"),
        "failed": ("llava_answers_failed", "Answers that ended in an error"),
    }

    def __init__(self, engine: Engine):
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats()
        yield GaugeMetricFamily("llava_ready", "1 once everything is compiled", float(self._engine.ready))
        for field, (name, text) in self.GAUGES.items():
            yield GaugeMetricFamily(name, text, getattr(stats, field))
        for field, (name, text) in self.COUNTERS.items():
            yield CounterMetricFamily(name, text, getattr(stats, field))
