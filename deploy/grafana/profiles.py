"""What is served, and how strongly it acts."""

from __future__ import annotations

from panels import PROFILE, Json, count, dashboard, heatmap, mean, panel, select, table, variables


def profiles() -> Json:
    bucket = 'le="0.3"'
    return dashboard(
        "pilothouse-profiles",
        "Pilothouse / Profiles",
        "What is served, and how strongly it acts.",
        variables(PROFILE),
        {
            "What is served": [
                table(
                    "Profiles",
                    "Fingerprint and method of each. Replicas that differ show as several rows.",
                    {
                        "servers": (
                            "short",
                            f"count by (profile, fingerprint, method) ({select('profile_info')})",
                        )
                    },
                    width=12,
                ),
                table(
                    "Model",
                    "Architecture, digest of the weights, dtype and device.",
                    {
                        "servers": (
                            "short",
                            "count by (model, architecture, weights, revision, dtype, device) "
                            f"({select('model_info', by_profile=False)})",
                        )
                    },
                    width=12,
                ),
                panel(
                    "timeseries",
                    "Fingerprints over time",
                    "Servers per profile and fingerprint: a rollout shows as one line that falls while another rises.",
                    "short",
                    {
                        "{{profile}} {{fingerprint}}": f"count by (profile, fingerprint) ({select('profile_info')})"
                    },
                    stacked=True,
                ),
                table(
                    "Builds",
                    "Versions of Pilothouse and torch.",
                    {
                        "servers": (
                            "short",
                            f"count by (version, torch) ({select('build_info', by_profile=False)})",
                        )
                    },
                    width=12,
                ),
            ],
            "Edits": [
                heatmap(
                    "Edit norm",
                    "Norm of the edits' change over the hidden state's, at the last prompt token. 0 for raw.",
                    "edit_norm_ratio",
                    width=12,
                ),
                panel(
                    "timeseries",
                    "Mean edit norm",
                    "By profile, over the window. Far above what eval reports, prompts are unlike those fitted on.",
                    "percentunit",
                    {"{{profile}}": mean("edit_norm_ratio", "profile")},
                ),
            ],
            "Gates": [
                heatmap(
                    "Gate values",
                    "Of gates that are read once per prompt. AlphaSteer: about 0 on benign prompts, about 1 on harmful ones.",
                    "gate_value",
                    width=12,
                ),
                panel(
                    "timeseries",
                    "Gates that open",
                    "Share of gate values above 0.3.",
                    "percentunit",
                    {
                        "{{profile}}": f"1 - {count('gate_value_bucket', 'profile', bucket)} / {count('gate_value_count', 'profile')}"
                    },
                    top=1,
                ),
            ],
        },
    )
