"""What is counted, for Prometheus."""

from __future__ import annotations

from functools import partial

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from edge_slm_runtime import Generation, Session

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Of one server."""

    def __init__(self, session: Session) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._answers = Counter(
            "edge_slm_answers", "Answers, by what ended them", ["finish_reason"], registry=registry
        )
        self._refused = Counter(
            "edge_slm_refused", "Requests that were not answered", ["code"], registry=registry
        )
        self._tokens = Counter("edge_slm_tokens", "Tokens", ["kind"], registry=registry)
        self._first = Histogram(
            "edge_slm_first_token_seconds",
            "From submission to the first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self._whole = Histogram(
            "edge_slm_answer_seconds",
            "From submission to the end",
            buckets=_SECONDS,
            registry=registry,
        )
        for name, of in (("running", "Answers under way"), ("waiting", "Requests that wait")):
            gauge = Gauge(f"edge_slm_{name}", of, registry=registry)
            gauge.set_function(partial(getattr, session, name))

    def answered(self, result: Generation) -> None:
        """Counts an answer."""
        stats = result.stats
        self._answers.labels(result.finish_reason).inc()
        for kind in ("prompt", "cached", "new"):
            self._tokens.labels(kind).inc(getattr(stats, f"{kind}_tokens"))
        if stats.new_tokens:
            self._first.observe(stats.ttft_ms / 1e3)
        self._whole.observe(stats.total_ms / 1e3)

    def refused(self, code: str) -> None:
        """Counts a request that ended in an error."""
        self._refused.labels(code).inc()

    def text(self) -> bytes:
        """In Prometheus' format."""
        page: bytes = generate_latest(self._registry)
        return page
