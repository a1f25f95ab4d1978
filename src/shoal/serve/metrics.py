"""What Prometheus may request."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from shoal.serve.engine import Engine, QueuedRequest, Reason
from shoal.serve.generating import GenerationCounts

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_RATES = (0.5, 1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500, 1000)


class Metrics:
    """The figures of one server, in a registry of its own.

    Executed layers, drafted and accepted tokens appear with the first request that counts them: under a policy, or with
    a draft. Depth is `rate(shoal_layers_executed_total) / rate(shoal_generated_tokens_total)`, acceptance likewise.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self.requests = Counter("shoal_requests", "Requests answered, by status.", ["path", "status"], registry=own)
        self.generations = Counter("shoal_generations", "Generations, by how they ended.", ["reason"], registry=own)
        self.prompt = Counter("shoal_prompt_tokens", "Tokens of the prompts that were put to the model.", registry=own)
        self.generated = Counter("shoal_generated_tokens", "Tokens that were generated.", registry=own)
        self.first = Histogram(
            "shoal_time_to_first_token_seconds",
            "From joining the line to the first token.",
            buckets=_SECONDS,
            registry=own,
        )
        self.rate = Histogram(
            "shoal_tokens_per_second",
            "Decoding speed of a request, after its first token.",
            buckets=_RATES,
            registry=own,
        )
        self._counted: dict[str, Counter] = {}

    def watch(self, engine: Engine) -> None:
        """Show the line of `engine`."""
        length = Gauge("shoal_queue_length", "Requests that wait.", registry=self.registry)
        length.set_function(lambda: engine.waiting)
        working = Gauge("shoal_requests_at_work", "Requests that are being written.", registry=self.registry)
        working.set_function(lambda: engine.working)

    def ended(self, job: QueuedRequest, reason: Reason, counts: GenerationCounts) -> None:
        """Count a job; called from the generating thread."""
        self.generations.labels(reason).inc()
        self.generated.inc(job.tokens)
        if job.begun is not None:
            self.prompt.inc(len(job.request.ids))
        if job.first is not None:
            self.first.observe(job.first - job.asked)
            if job.tokens > 1 and job.ended is not None and job.ended > job.first:
                self.rate.observe((job.tokens - 1) / (job.ended - job.first))
        self._count("shoal_layers_executed", "Layers executed for the generated tokens.", counts.layers)
        self._count("shoal_drafted_tokens", "Tokens that a draft proposed.", counts.drafted)
        self._count("shoal_accepted_tokens", "Tokens of the drafts that were kept.", counts.accepted)

    def _count(self, name: str, says: str, value: float | None) -> None:
        if value is None:
            return
        if name not in self._counted:
            self._counted[name] = Counter(name, says, registry=self.registry)
        self._counted[name].inc(value)

    def text(self) -> tuple[bytes, str]:
        """The page and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
