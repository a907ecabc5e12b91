"""Latency, throughput, queue and errors."""

from __future__ import annotations

from panels import PROFILE, Json, dashboard, panel, quantile, rate, select, variables


def serving() -> Json:
    def quantiles(metric: str, by: str = "", *, by_profile: bool = True) -> dict[str, str]:
        name = f"{{{{{by}}}}} " if by else ""
        return {
            f"{name}p{round(100 * q)}": quantile(q, metric, by, by_profile=by_profile)
            for q in (0.5, 0.95, 0.99)
        }

    return dashboard(
        "pilothouse-serving",
        "Pilothouse / Serving",
        "Latency, throughput, queue and errors.",
        variables(PROFILE),
        {
            "Latency": [
                panel(
                    "timeseries",
                    "Time to first token",
                    "From a request's arrival, waiting included.",
                    "s",
                    quantiles("time_to_first_token_seconds"),
                    width=8,
                ),
                panel(
                    "timeseries",
                    "Time to first token by profile, p95",
                    "A profile that edits before the benign probe reads its prompt twice (--monitor-read).",
                    "s",
                    {"{{profile}}": quantile(0.95, "time_to_first_token_seconds", "profile")},
                    width=8,
                ),
                panel(
                    "timeseries",
                    "Inter-token latency",
                    "Between two tokens of a request.",
                    "s",
                    quantiles("inter_token_latency_seconds"),
                    width=8,
                ),
                panel(
                    "timeseries",
                    "Request duration",
                    "From a request's arrival to its last token.",
                    "s",
                    quantiles("request_duration_seconds"),
                    width=8,
                ),
                panel(
                    "timeseries",
                    "Queue time",
                    "From submission to admission, all profiles.",
                    "s",
                    quantiles("queue_time_seconds", by_profile=False),
                    width=8,
                ),
                panel(
                    "timeseries",
                    "Time to judge a reply",
                    "Off the client's path.",
                    "s",
                    quantiles("judge_seconds", by_profile=False),
                    width=8,
                ),
            ],
            "Throughput": [
                panel(
                    "timeseries",
                    "Requests",
                    "Requests that ended, per second, by profile.",
                    "reqps",
                    {"{{profile}}": rate("requests_total", "profile")},
                    width=8,
                    stacked=True,
                ),
                panel(
                    "timeseries",
                    "Tokens",
                    "Prompt tokens read and tokens generated, per second.",
                    "short",
                    {
                        "prompt": rate("prompt_tokens_total"),
                        "generated": rate("completion_tokens_total"),
                    },
                    width=8,
                ),
                panel(
                    "timeseries",
                    "Prompts that began in the prefix cache",
                    "Share of requests whose prompt's beginning was not computed again.",
                    "percentunit",
                    {
                        "{{profile}}": f"{rate('cache_hits_total', 'profile')} / {rate('requests_total', 'profile')}"
                    },
                    width=8,
                ),
            ],
            "Queue and slots": [
                panel(
                    "timeseries",
                    "Requests computed and waiting",
                    "Waiting for long: add replicas or raise --max-num-seqs.",
                    "short",
                    {
                        "computed": f"sum({select('requests_running', by_profile=False)})",
                        "waiting": f"sum({select('requests_waiting', by_profile=False)})",
                    },
                ),
                panel(
                    "timeseries",
                    "Slots in use",
                    "Of the cache, at most --max-num-seqs per server.",
                    "short",
                    {"{{instance}}": select("slots_used", by_profile=False)},
                ),
            ],
            "Errors": [
                panel(
                    "timeseries",
                    "Requests by finish reason",
                    "error: a forward pass failed; cancelled: the client went away.",
                    "reqps",
                    {"{{finish_reason}}": rate("requests_total", "finish_reason")},
                    width=8,
                    stacked=True,
                ),
                panel(
                    "timeseries",
                    "Requests turned down",
                    "By reason, before an answer began.",
                    "reqps",
                    {"{{reason}}": rate("rejections_total", "reason", by_profile=False)},
                    width=8,
                ),
                panel(
                    "timeseries",
                    "HTTP responses",
                    "By class of status.",
                    "reqps",
                    {"{{status}}": rate("http_requests_total", "status", by_profile=False)},
                    width=8,
                    stacked=True,
                ),
                panel(
                    "timeseries",
                    "HTTP duration by route, p95",
                    "To the end of the response, streams included.",
                    "s",
                    {
                        "{{route}}": quantile(
                            0.95, "http_request_duration_seconds", "route", by_profile=False
                        )
                    },
                    width=16,
                ),
                panel(
                    "stat",
                    "Servers up",
                    "Targets of the scrape job that answer.",
                    "short",
                    {"up": 'sum(up{job=~"$job",instance=~"$instance"})'},
                    width=8,
                    instant=True,
                ),
            ],
        },
    )
