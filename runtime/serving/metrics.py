"""GET /metrics: what the server has done and does, as Prometheus reads it.

Names and meanings are vLLM's, with our prefix, so that its dashboards need one change. The engine
measures (runtime/serving/statistics.py); here its numbers are written, with those of HTTP.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping

from runtime.serving.statistics import Gauges, Histogram, Statistics

PREFIX = "gptoss:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
HELP = {
    "num_requests_running": "Answers that are being computed.",
    "num_requests_waiting": "Answers that wait for a slot.",
    "kv_cache_usage_perc": "Part of the caches that is in use; 1 = all.",
    "prompt_tokens_total": "Tokens of prompts that were read.",
    "generation_tokens_total": "Tokens drawn.",
    "prefix_cache_queries_total": "Tokens of prompts that were looked for in the caches.",
    "prefix_cache_hits_total": "Of them, those that did not have to be computed.",
    "passes_total": "Passes through the model.",
    "failures_total": "Passes or callbacks that raised an error.",
    "queue_full_total": "Answers refused because the queue was full.",
    "request_success_total": "Finished answers, by reason.",
    "http_requests_total": "HTTP requests, by route and status.",
    "expert_tokens_total": "Tokens that were sent to an expert.",
    "request_queue_time_seconds": "From a request to its slot.",
    "time_to_first_token_seconds": "From a request to the first token of its answer.",
    "inter_token_latency_seconds": "From a token to the next.",
    "e2e_request_latency_seconds": "From a request to the end of its answer.",
}
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """What the HTTP side counts. Any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, dict[Labels, int]] = defaultdict(lambda: defaultdict(int))

    def count(self, name: str, **labels: str) -> None:
        """Add 1 to a counter."""
        with self._lock:
            self._counts[name][tuple(labels.items())] += 1

    def text(self, engines: Mapping[str, tuple[Statistics, Gauges]]) -> str:
        """Return the page. engines: what each model's engine counts and holds."""
        samples: dict[str, list[str]] = defaultdict(list)
        for model, (statistics, gauges) in engines.items():
            labels: Labels = (("model_name", model),)
            for name, value in _numbers(statistics, gauges).items():
                samples[name].append(_line(name, labels, value))
            for name, histogram in _histograms(statistics).items():
                samples[name] += _histogram_lines(name, labels, histogram)
            samples["expert_tokens_total"] += _expert_lines(labels, statistics)
        with self._lock:
            for name, by_labels in self._counts.items():
                samples[name] += [_line(name, labels, n) for labels, n in by_labels.items()]
        return "".join(f"{_head(name)}{''.join(samples[name])}" for name in HELP if samples[name])


def _numbers(statistics: Statistics, gauges: Gauges) -> dict[str, float]:
    return {
        "num_requests_running": gauges.num_running,
        "num_requests_waiting": gauges.num_waiting,
        "kv_cache_usage_perc": gauges.num_cached_tokens / max(gauges.most_cached_tokens, 1),
        "prompt_tokens_total": statistics.num_prompt_tokens,
        "generation_tokens_total": statistics.num_generated_tokens,
        "prefix_cache_queries_total": statistics.num_prompt_tokens,
        "prefix_cache_hits_total": statistics.num_reused_tokens,
        "passes_total": statistics.num_passes,
        "failures_total": statistics.num_failures,
        "queue_full_total": statistics.num_refused_full,
    }


def _histograms(statistics: Statistics) -> dict[str, Histogram]:
    return {
        "request_queue_time_seconds": statistics.queue_seconds,
        "time_to_first_token_seconds": statistics.time_to_first_token_seconds,
        "inter_token_latency_seconds": statistics.inter_token_latency_seconds,
        "e2e_request_latency_seconds": statistics.request_seconds,
    }


def _histogram_lines(name: str, labels: Labels, histogram: Histogram) -> Iterator[str]:
    pairs = histogram.cumulative()
    for bound, count in pairs:
        end = "+Inf" if bound == float("inf") else f"{bound:g}"
        yield _line(f"{name}_bucket", (*labels, ("le", end)), count)
    yield _line(f"{name}_sum", labels, histogram.total)
    yield _line(f"{name}_count", labels, pairs[-1][1])


def _expert_lines(labels: Labels, statistics: Statistics) -> Iterator[str]:
    for block, row in enumerate(statistics.expert_tokens_LE.tolist()):
        for expert, count in enumerate(row):
            where = (("block", str(block)), ("expert", str(expert)))
            yield _line("expert_tokens_total", labels + where, count)


def _head(name: str) -> str:
    kind = "counter" if name.endswith("_total") else "gauge"
    kind = "histogram" if name.endswith("_seconds") else kind
    return f"# HELP {PREFIX}{name} {HELP[name]}\n# TYPE {PREFIX}{name} {kind}\n"


def _line(name: str, labels: Labels, value: float) -> str:
    told = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
    number = f"{int(value)}" if float(value).is_integer() else repr(float(value))
    return f"{PREFIX}{name}{{{told}}} {number}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
