"""Counts of a server in the names that routers and dashboards know: vLLM's.

Enters: what the pilot sees, in the event loop. Leaves: Prometheus's text. Invariant: counting costs a token less than a
microsecond, so histograms are lists of whole numbers here, which `prometheus_client` writes out.
"""

import bisect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

SECONDS = (
    0.001,
    0.002,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
)
"""Bounds of the buckets of times to tokens."""

LONG_SECONDS = (
    0.01,
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
)
"""Bounds of the buckets of times of whole requests."""

REASONS = ("stop", "length", "abort")


class Histogram:
    """Observations in buckets.

    Args:
        bounds: The buckets' upper bounds, from small to large; beyond the last is one more.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Takes an observation down, or several alike."""
        self.counts[bisect.bisect_left(self.bounds, value)] += count
        self.sum += value * count

    def buckets(self) -> list[tuple[str, float]]:
        """Each bound, with the number of observations up to it."""
        total, found = 0, []
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


class Metrics:
    """A server's counts.

    Args:
        model: The model's name, which is every metric's label.
    """

    def __init__(self, model: str) -> None:
        self.model = model
        self.running = self.waiting = 0
        self.cache_usage = 0.0
        self.prompt_tokens = self.generation_tokens = self.prefix_queries = self.prefix_hits = 0
        self.drafted = self.accepted = self.refused = 0
        self.ends = dict.fromkeys(REASONS, 0)
        self.first_token, self.inter_token = Histogram(SECONDS), Histogram(SECONDS)
        self.queue_time, self.prefill_time, self.decode_time, self.whole_time = (
            Histogram(LONG_SECONDS) for _ in range(4)
        )
        self.cache: dict[str, str] = {}

    def count_prompt(self, tokens: int, known: int) -> None:
        """Counts a prompt that has been read, and its tokens that were known."""
        self.prompt_tokens += tokens
        self.prefix_queries += tokens
        self.prefix_hits += known

    def count_end(self, reason: str) -> None:
        """Counts a sequence that has ended."""
        self.ends[reason] += 1

    def describe_cache(self, block: int, cache_bytes: int, token_bytes: int) -> None:
        """Takes down the caches' sizes, of which routers ask.

        Args:
            block: Tokens of a block that beginnings are shared by.
            cache_bytes: Keys and values of all rows at most.
            token_bytes: Keys and values of one token in a row.
        """
        blocks = cache_bytes // max(1, block * token_bytes)
        self.cache = {"block_size": str(block), "num_gpu_blocks": str(blocks), "cache_bytes": str(cache_bytes)}

    def text(self) -> bytes:
        """Prometheus's text."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator["Metric"]:
        """The metrics, as `prometheus_client` collects them."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        def family(kind: Any, name: str, about: str, value: float) -> Any:
            found = kind(f"vllm:{name}", about, labels=["model_name"])
            found.add_metric([self.model], value)
            return found

        yield family(GaugeMetricFamily, "num_requests_running", "Sequences that have a row.", self.running)
        yield family(GaugeMetricFamily, "num_requests_waiting", "Sequences that wait for a row.", self.waiting)
        usage = "Share of the memory for keys and values that is taken, from 0 to 1."
        yield family(GaugeMetricFamily, "kv_cache_usage_perc", usage, self.cache_usage)
        counters = {
            "prompt_tokens": ("Tokens of prompts.", self.prompt_tokens),
            "generation_tokens": ("New tokens.", self.generation_tokens),
            "prefix_cache_queries": ("Tokens of prompts that were looked for.", self.prefix_queries),
            "prefix_cache_hits": ("Tokens of prompts that were known.", self.prefix_hits),
            "spec_decode_num_draft_tokens": ("Tokens that were guessed.", self.drafted),
            "spec_decode_num_accepted_tokens": ("Guessed tokens that were right.", self.accepted),
        }
        for name, (about, value) in counters.items():
            yield family(CounterMetricFamily, name, about, value)
        ends = CounterMetricFamily(
            "vllm:request_success", "Sequences by the end.", labels=["model_name", "finished_reason"]
        )
        for reason, count in self.ends.items():
            ends.add_metric([self.model, reason], count)
        yield ends
        refused = CounterMetricFamily("arriero:requests_refused", "Requests refused for load.", labels=["model_name"])
        refused.add_metric([self.model], self.refused)
        yield refused
        histograms = {
            "time_to_first_token_seconds": ("From a request to its first token.", self.first_token),
            "inter_token_latency_seconds": ("From a token to the next.", self.inter_token),
            "request_queue_time_seconds": ("From a request to its row.", self.queue_time),
            "request_prefill_time_seconds": ("From a row to the first token.", self.prefill_time),
            "request_decode_time_seconds": ("From the first token to the end.", self.decode_time),
            "e2e_request_latency_seconds": ("From a request to its end.", self.whole_time),
        }
        for name, (about, each) in histograms.items():
            found = HistogramMetricFamily(f"vllm:{name}", about, labels=["model_name"])
            found.add_metric([self.model], buckets=each.buckets(), sum_value=each.sum)
            yield found
        if self.cache:
            info = GaugeMetricFamily(
                "vllm:cache_config_info", "Sizes of the caches.", labels=["model_name", *self.cache]
            )
            info.add_metric([self.model, *self.cache.values()], 1)
            yield info
