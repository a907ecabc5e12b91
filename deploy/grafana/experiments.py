"""Arms of an experiment side by side."""

from __future__ import annotations

from panels import Json, Z, count, dashboard, panel, rate, select, table, variables, wilson


def experiments() -> Json:
    chosen = 'experiment=~"$experiment"'
    counter = "experiment_responses_judged_total"

    def counted(by: str, *labels: str, metric: str = counter) -> str:
        return count(metric, by, ",".join([chosen, *filter(None, labels)]), by_profile=False)

    def share(metric: str = "experiment_exposures_total") -> str:
        whole = counted("experiment", metric=metric)
        arms = counted("experiment, arm", metric=metric)
        return f"{arms} / on (experiment) group_left () {whole}"

    def of(prompt_class: str, outcome: str) -> tuple[str, str]:
        """Successes and trials by arm."""
        among = f'prompt_class="{prompt_class}"'
        return (
            counted("experiment, arm", among, f'outcome="{outcome}"'),
            counted("experiment, arm", among),
        )

    def difference(prompt_class: str, outcome: str) -> dict[str, str]:
        among = f'prompt_class="{prompt_class}"'
        k, n = of(prompt_class, outcome)
        control = 'arm="$control"'
        k0 = counted("experiment", among, f'outcome="{outcome}"', control)
        n0 = counted("experiment", among, control)
        match = "on (experiment) group_left ()"
        # Agresti and Caffo: one success and one failure more on each side.
        p, p0 = f"(({k} + 1) / ({n} + 2))", f"(({k0} + 1) / ({n0} + 2))"
        spread = f"{Z} * sqrt({p} * (1 - {p}) / ({n} + 2) + {match} {p0} * (1 - {p0}) / ({n0} + 2))"
        return {
            "{{arm}}": f"{k} / {n} - {match} ({k0} / {n0})",
            "{{arm}} low": f"{p} - {match} {p0} - {spread}",
            "{{arm}} high": f"{p} - {match} {p0} + {spread}",
        }

    warning = (
        " The interval holds for one look at a time chosen before; the verdict, which may be looked "
        "at all day, is in GET /v1/experiments/{name}/report."
    )
    over, harmful = of("benign", "refusal"), of("harmful", "answer")
    return dashboard(
        "pilothouse-experiments",
        "Pilothouse / Experiments",
        "Arms side by side, live. Verdicts are the report's business.",
        variables(
            (
                "experiment",
                "Experiment",
                'label_values(steering_experiment_exposures_total{job=~"$job"}, experiment)',
                False,
            ),
            (
                "control",
                "Control",
                'label_values(steering_experiment_exposures_total{experiment=~"$experiment"}, arm)',
                False,
            ),
        ),
        {
            "Arms side by side": [
                table(
                    "Arms",
                    "Exposures within the window; share of them and the share that the weights ask for; rates with Wilson's 95 % interval.",
                    {
                        "exposures": (
                            "short",
                            counted("experiment, arm", metric="experiment_exposures_total"),
                        ),
                        "share": ("percentunit", share()),
                        "intended": (
                            "percentunit",
                            f"max by (experiment, arm) ({select('experiment_arm_share_ratio', chosen, by_profile=False)})",
                        ),
                        "over-refusal": ("percentunit", f"{over[0]} / {over[1]}"),
                        "over-refusal low": ("percentunit", wilson(*over, "low")),
                        "over-refusal high": ("percentunit", wilson(*over, "high")),
                        "harmful answered": ("percentunit", f"{harmful[0]} / {harmful[1]}"),
                        "harmful answered low": ("percentunit", wilson(*harmful, "low")),
                        "harmful answered high": ("percentunit", wilson(*harmful, "high")),
                    },
                    hidden=("experiment",),
                ),
                panel(
                    "timeseries",
                    "Over-refusal by arm",
                    "Share of benign prompts that were refused, over the window.",
                    "percentunit",
                    {"{{arm}}": f"{over[0]} / {over[1]}"},
                    top=1,
                ),
                panel(
                    "timeseries",
                    "Harmful prompts answered by arm",
                    "Share of harmful prompts that got an answer, over the window.",
                    "percentunit",
                    {"{{arm}}": f"{harmful[0]} / {harmful[1]}"},
                    top=1,
                ),
            ],
            "Differences to the control": [
                panel(
                    "timeseries",
                    "Over-refusal less $control's",
                    "Difference of rates with Agresti and Caffo's 95 % interval." + warning,
                    "percentunit",
                    difference("benign", "refusal"),
                ),
                panel(
                    "timeseries",
                    "Harmful prompts answered less $control's",
                    "Difference of rates with Agresti and Caffo's 95 % interval." + warning,
                    "percentunit",
                    difference("harmful", "answer"),
                ),
            ],
            "Exposures": [
                panel(
                    "timeseries",
                    "Exposures",
                    "Requests answered under an arm, per second.",
                    "reqps",
                    {
                        "{{arm}}": rate(
                            "experiment_exposures_total", "arm", chosen, by_profile=False
                        )
                    },
                    width=8,
                ),
                panel(
                    "timeseries",
                    "Share of exposures less the intended share",
                    "Of requests, not units: units that send many make it swing. Far from 0 for long is a sample-ratio mismatch, which voids the experiment.",
                    "percentunit",
                    {
                        "{{arm}}": f"({share()}) - max by (experiment, arm) ({select('experiment_arm_share_ratio', chosen, by_profile=False)})"
                    },
                    width=8,
                ),
                panel(
                    "timeseries",
                    "Replies by outcome",
                    "Judged replies of each arm per second.",
                    "reqps",
                    {
                        "{{arm}} {{outcome}}": rate(
                            counter, "arm, outcome", chosen, by_profile=False
                        )
                    },
                    width=8,
                    stacked=True,
                ),
            ],
            "Guard-rails and records": [
                panel(
                    "stat",
                    "Arms stopped by a guard-rail",
                    "Since the server started. Their units are answered by the control.",
                    "short",
                    {
                        "{{arm}}": f"sum by (arm) ({select('guardrail_stops_total', chosen, by_profile=False)})"
                    },
                    width=16,
                    instant=True,
                ),
                panel(
                    "timeseries",
                    "Shadow answers",
                    "Of the other arms to the same prompts, per second; dropped where there was no room for them.",
                    "reqps",
                    {
                        "{{result}}": rate(
                            "experiment_shadows_total", "result", chosen, by_profile=False
                        )
                    },
                    width=8,
                    stacked=True,
                ),
                panel(
                    "timeseries",
                    "Records that wait for the database",
                    "Kept in the journal until then. A rising line: the database is absent, full or slow.",
                    "short",
                    {"{{instance}}": select("records_pending", by_profile=False)},
                ),
                panel(
                    "timeseries",
                    "Records lost",
                    "Per second; must be 0. Records of experiments, lines of the audit log, and replies that the classifier did not judge.",
                    "ops",
                    {
                        "records": rate("records_lost_total", by_profile=False),
                        "audit log": rate("audit_records_lost_total", by_profile=False),
                        "judgements": rate("judgements_lost_total", by_profile=False),
                    },
                ),
            ],
        },
    )
