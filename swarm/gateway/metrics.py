"""What Prometheus reads: requests, tokens, seconds to the first token, and how the swarms stand."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from swarm.gateway.desk import Desk, Observer
from swarm.gateway.failures import failure_of
from swarm.gateway.watching import SwarmWatch
from swarm.gateway.writing import Ended, TextRequest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)


class Metrics(Observer):
    """The gateway's counters, in a registry of their own. `model` is always a name that is served."""

    def __init__(self, watch: SwarmWatch) -> None:
        self._watch = watch
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._requests = self._counter("swarm_gateway_requests", "Answers by endpoint and status", "endpoint", "status")
        self._prompt = self._counter("swarm_gateway_prompt_tokens", "Tokens of prompts", "model")
        self._written = self._counter("swarm_gateway_completion_tokens", "Tokens written", "model")
        self._texts = self._counter("swarm_gateway_texts", "Texts by how they ended", "model", "end")
        self._first = Histogram(
            "swarm_gateway_first_token_seconds",
            "From the request to its first token",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._writing = self._gauge("swarm_gateway_texts_writing", "Texts that are being written")
        self._waiting = self._gauge("swarm_gateway_texts_waiting", "Texts that wait for a place")
        self._hosts = self._gauge("swarm_hosts", "Hosts that announce blocks", "run")
        self._unserved = self._gauge("swarm_unserved_blocks", "Blocks without a live holder", "run")
        self._round = self._gauge("swarm_round", "Newest completed round", "run")
        self._trained = self._gauge("swarm_trained_tokens_per_second", "What all trainers train", "run")

    def answered(self, endpoint: str, status: int) -> None:
        """One answer was begun."""
        self._requests.labels(endpoint, str(status)).inc()

    def first_token(self, request: TextRequest, seconds: float) -> None:
        """See Observer."""
        self._first.labels(request.served.name).observe(seconds)
        self._prompt.labels(request.served.name).inc(len(request.ids))

    def ended(self, request: TextRequest, end: Ended) -> None:
        """See Observer."""
        self._written.labels(request.served.name).inc(end.tokens)
        self._texts.labels(request.served.name, end.reason).inc()

    def failed(self, request: TextRequest, error: BaseException) -> None:
        """See Observer."""
        failure = failure_of(error)
        self._texts.labels(request.served.name, "internal_error" if failure is None else failure.code).inc()

    def page(self, desk: Desk) -> bytes:
        """All of it, in Prometheus' text format."""
        self._writing.set(desk.writing)
        self._waiting.set(desk.waiting)
        for peer, seen in self._watch.sightings.items():
            run = str(peer.node.config.run)
            self._unserved.labels(run).set(len(seen.unserved))
            if seen.status is not None:
                self._hosts.labels(run).set(len(seen.status.hosts))
                self._round.labels(run).set(seen.status.round)
                self._trained.labels(run).set(seen.status.tokens_per_second)
        return generate_latest(self.registry)

    def _counter(self, name: str, words: str, *labels: str) -> Counter:
        return Counter(name, words, labels, registry=self.registry)

    def _gauge(self, name: str, words: str, *labels: str) -> Gauge:
        return Gauge(name, words, labels, registry=self.registry)
