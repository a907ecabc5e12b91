"""What profiles refuse and answer."""

from __future__ import annotations

from panels import (
    PROFILE,
    Json,
    band,
    count,
    dashboard,
    heatmap,
    mean,
    panel,
    rate,
    table,
    variables,
    wilson,
)

DAY = "1d"


def refused(by: str, prompt_class: str = "", ago: str = "") -> str:
    return count("refusals_total", by, prompt_class and f'prompt_class="{prompt_class}"', ago=ago)


def judged(by: str, prompt_class: str = "", ago: str = "", outcome: str = "") -> str:
    labels = ",".join(
        filter(
            None,
            [prompt_class and f'prompt_class="{prompt_class}"', outcome and f'outcome="{outcome}"'],
        )
    )
    return count("responses_judged_total", by, labels, ago=ago)


def refusal_rate(by: str, prompt_class: str = "", ago: str = "") -> str:
    return f"{refused(by, prompt_class, ago)} / {judged(by, prompt_class, ago)}"


def refusals() -> Json:
    both = "profile, prompt_class"
    raw = (
        'sum by (prompt_class) (increase(steering_refusals_total{job=~"$job",instance=~"$instance",profile="raw"}[$window]))'
        ' / sum by (prompt_class) (increase(steering_responses_judged_total{job=~"$job",instance=~"$instance",profile="raw"}[$window]))'
    )
    return dashboard(
        "pilothouse-refusals",
        "Pilothouse / Refusals",
        "What profiles refuse and answer, by the class of the prompt.",
        variables(PROFILE),
        {
            "Rates": [
                panel(
                    "timeseries",
                    "Over-refusal",
                    "Share of benign prompts (by the monitor's unedited read) that were refused. Lower is better.",
                    "percentunit",
                    {"{{profile}}": refusal_rate("profile", "benign")},
                    top=1,
                ),
                panel(
                    "timeseries",
                    "Harmful prompts answered",
                    "Share of harmful prompts that got an answer. Lower is better.",
                    "percentunit",
                    {
                        "{{profile}}": f"{judged('profile', 'harmful', outcome='answer')} / {judged('profile', 'harmful')}"
                    },
                    top=1,
                ),
                table(
                    "Refusal rates with 95 % intervals",
                    "Refusals among judged replies within the window, with Wilson's interval. "
                    "Counts are extrapolated to the window's ends.",
                    {
                        "replies": ("short", judged(both)),
                        "refusal rate": ("percentunit", refusal_rate(both)),
                        "low": ("percentunit", wilson(refused(both), judged(both), "low")),
                        "high": ("percentunit", wilson(refused(both), judged(both), "high")),
                    },
                ),
                band(
                    "Refusals of benign prompts: $profile",
                    "Rate and Wilson's 95 % interval over the window.",
                    refused("profile", "benign"),
                    judged("profile", "benign"),
                    repeat="profile",
                ),
                band(
                    "Refusals of harmful prompts: $profile",
                    "Rate and Wilson's 95 % interval over the window.",
                    refused("profile", "harmful"),
                    judged("profile", "harmful"),
                    repeat="profile",
                ),
                panel(
                    "timeseries",
                    "Outcomes",
                    "Replies judged per second. Degenerate and empty replies are neither answers nor refusals.",
                    "reqps",
                    {"{{profile}} {{outcome}}": rate("responses_judged_total", "profile, outcome")},
                    stacked=True,
                ),
                panel(
                    "timeseries",
                    "Prompts by class",
                    "Replies judged per second by class of the prompt; unknown where the probe is undecided or was not read.",
                    "reqps",
                    {"{{prompt_class}}": rate("responses_judged_total", "prompt_class")},
                    stacked=True,
                ),
            ],
            "Scores": [
                heatmap(
                    "Refusal score",
                    "Log-odds of a refusal's opening, from the edited model's first logits; above 0 a refusal is likelier.",
                    "refusal_score",
                ),
                heatmap(
                    "Answer probe",
                    "Probability that the profile answers, by its own probe. Little mass in the middle is a decided model.",
                    "answer_probe_score",
                ),
                heatmap(
                    "Benign probe",
                    "Probability that the prompt is benign, by the unedited model's probe: what traffic is made of.",
                    "benign_probe_score",
                ),
            ],
            "Drift": [
                panel(
                    "timeseries",
                    "Refusal rate less raw's",
                    "Difference to the unedited model on the same class. Above 0 on benign prompts, or below 0 on harmful ones, the profile does worse than none.",
                    "percentunit",
                    {
                        "{{profile}} {{prompt_class}}": f"{refusal_rate(both)} - on (prompt_class) group_left () ({raw})"
                    },
                ),
                panel(
                    "timeseries",
                    "Refusal rate less yesterday's",
                    "Difference to the same time a day ago. A step without a new fingerprint is a change of prompts, model or judge.",
                    "percentunit",
                    {
                        "{{profile}} {{prompt_class}}": f"{refusal_rate(both)} - ({refusal_rate(both, ago=DAY)})"
                    },
                ),
                panel(
                    "timeseries",
                    "Means of the probes",
                    "Mean of the answer probe and of the benign probe over the window.",
                    "percentunit",
                    {
                        "{{profile}} answers": mean("answer_probe_score", "profile"),
                        "{{profile}} benign": mean("benign_probe_score", "profile"),
                    },
                    top=1,
                ),
                panel(
                    "timeseries",
                    "Means of the probes less yesterday's",
                    "Difference to the same time a day ago.",
                    "percentunit",
                    {
                        "{{profile}} answers": f"{mean('answer_probe_score', 'profile')} - ({mean('answer_probe_score', 'profile', ago=DAY)})",
                        "{{profile}} benign": f"{mean('benign_probe_score', 'profile')} - ({mean('benign_probe_score', 'profile', ago=DAY)})",
                    },
                ),
            ],
        },
    )
