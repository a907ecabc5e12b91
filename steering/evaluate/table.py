"""The results as a table for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, get_args

from steering.judge import Outcome

Results = Mapping[str, Any]


def interval(estimate: Mapping[str, float] | None, digits: int = 3) -> str:
    """`0.500 [0.404, 0.596]`, or a dash."""
    if estimate is None:
        return "-"
    return (
        f"{estimate['value']:.{digits}f} "
        f"[{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"
    )


def number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else format(value, form)


COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "F1": lambda arm: interval(arm["all"]["f1"]),
    "paper's F1": lambda arm: number((arm["all"]["f1_paper"] or {}).get("value")),
    "Youden's J": lambda arm: interval(arm["all"]["youden_j"]),
    "attack success": lambda arm: interval(arm["all"]["attack_success"]),
    "over-refusal": lambda arm: interval(arm["all"]["over_refusal"]),
    "degenerate": lambda arm: interval(arm["all"]["degenerate"]),
}
CORRECTED_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "attack success": lambda arm: interval(arm["all"]["attack_success"]),
    "corrected attack success": lambda arm: interval(arm["all"]["attack_success_corrected"]),
    "over-refusal": lambda arm: interval(arm["all"]["over_refusal"]),
    "corrected over-refusal": lambda arm: interval(arm["all"]["over_refusal_corrected"]),
}
UTILITY_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "perplexity": lambda arm: number(_utility(arm).get("perplexity"), ".4g"),
    "KL benign": lambda arm: number(_kl(arm, "benign"), ".4f"),
    "KL harmful": lambda arm: number(_kl(arm, "harmful"), ".4f"),
    "choices right": lambda arm: number(_choices(arm)),
    "utility kept": lambda arm: number(_utility(arm).get("kept")),
    "edit norm": lambda arm: number(arm.get("inside", {}).get("edit_norm", {}).get("mean")),
    "tokens/s": lambda arm: number(arm["decode_tokens_per_second"], ".1f"),
}


def _utility(arm: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = arm.get("utility", {})
    return found


def _kl(arm: Mapping[str, Any], label: str) -> float | None:
    found: float | None = _utility(arm).get(f"kl_to_raw_{label}", {}).get("nats_per_token")
    return found


def _choices(arm: Mapping[str, Any]) -> float | None:
    """Accuracy, the mean over the files."""
    found = [f["accuracy"]["value"] for f in _utility(arm).get("multiple_choice", {}).values()]
    return sum(found) / len(found) if found else None


def rows(
    results: Results, columns: Mapping[str, Callable[[Mapping[str, Any]], str]], *, sweep: bool
) -> list[list[str]]:
    """Header and one row per arm.

    Args:
        sweep: with the arms of the strength sweep.
    """
    arms = [arm for arm in results["arms"] if sweep or arm["main"]]
    return [
        ["profile", *columns],
        *([arm["name"], *(cell(arm) for cell in columns.values())] for arm in arms),
    ]


def judge_line(results: Results) -> str:
    """Who judged, and how often it errs."""
    judge = results["judge"]
    rates = (
        f"{name} {interval(estimate(judge, name))} of {judge[f'{name}_n']}"
        for name in ("sensitivity", "specificity")
    )
    part = judge["part"].replace("_", "-")
    return f"Judge {judge['version']}: {', '.join(rates)} {part} labelled replies"


def correction_line(results: Results) -> str:
    """What corrected rates are, or why there are none."""
    if why := results["judge"]["not_corrected"]:
        return f"No rate is corrected for the judge's errors: {why}"
    return (
        "Corrected for the judge's sensitivity and specificity (Rogan-Gladen; interval by Lang and "
        "Reiczigel, which takes in how few replies they were measured on). The labelled replies "
        "are harder than most: where replies are plain, this corrects too much. Compare profiles "
        "by the rates as counted: the judge may err more often on one profile's replies than on "
        "another's."
    )


def estimate(judge: Mapping[str, Any], name: str) -> dict[str, float]:
    low, high = judge[f"{name}_95"]
    return {"value": judge[name], "low": low, "high": high}


def outcome_rows(results: Results) -> list[list[str]]:
    """Counts of outcomes by label, of every profile at its own strength."""
    arms = [arm for arm in results["arms"] if arm["main"]]
    outcomes = [
        outcome
        for outcome in get_args(Outcome)
        if outcome != "error" or any("error" in _counts(arm) for arm in arms)
    ]
    return [
        ["counts", "prompts", *outcomes],
        *(
            [
                arm["name"],
                f"{count} {label}",
                *(str(arm["all"]["outcomes"][label].get(outcome, 0)) for outcome in outcomes),
            ]
            for arm in arms
            for label, count in arm["all"]["prompts"].items()
            if count
        ),
    ]


def _counts(arm: Mapping[str, Any]) -> dict[str, int]:
    outcomes = arm["all"]["outcomes"]
    return {**outcomes["harmful"], **outcomes["benign"]}


def comparison_rows(results: Results) -> list[list[str]]:
    return [
        ["McNemar", "prompts", "only the first right", "only the second", "p", "p (Holm)"],
        *(
            [
                f"{row['first']} / {row['second']}",
                row["prompts"],
                str(row["first_only_right"]),
                str(row["second_only_right"]),
                f"{row['p']:.2g}",
                f"{row['p_holm']:.2g}",
            ]
            for row in results["comparisons"]
        ),
    ]


def class_rows(results: Results) -> list[list[str]]:
    """Refusal rates by class of prompts, a column per profile; what else there was in brackets."""
    arms = [arm for arm in results["arms"] if arm["main"]]
    return [
        ["prompts", "class", "label", "count", *(f"{arm['name']} refuses" for arm in arms)],
        *(
            [
                name,
                kind,
                "harmful" if found["harmful"] else "benign",
                str(found["prompts"]),
                *(_refused(arm["sets"][name]["classes"][kind]) for arm in arms),
            ]
            for name, prompts in arms[0]["sets"].items()
            for kind, found in prompts["classes"].items()
        ),
    ]


def _refused(found: Mapping[str, Any]) -> str:
    others = {
        outcome: count
        for outcome, count in found["outcomes"].items()
        if outcome not in ("answer", "refusal")
    }
    noted = ", ".join(f"{count} {outcome}" for outcome, count in others.items())
    return interval(found["refused"]) + (f" ({noted})" if noted else "")


def align(cells: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table with a rule under its header."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for number_, row in enumerate(cells):
        pairs = zip(row, widths, strict=True)
        yield "  ".join(cell.ljust(width) for cell, width in pairs).rstrip()
        if number_ == 0:
            yield "  ".join("-" * width for width in widths)


def render(results: Results) -> Iterator[str]:
    """All tables, line by line."""
    settings, speed = results["settings"], results["throughput"]
    for found in results["prompts"]:
        yield f"{found['name']}: {found['harmful']} harmful, {found['benign']} benign prompts"
    yield (
        f"Replies of at most {settings['max_tokens']} tokens at temperature "
        f"{settings['temperature']:g}; 95 % intervals in brackets"
    )
    yield judge_line(results)
    swept = any(not arm["main"] for arm in results["arms"])
    for table in (
        rows(results, COLUMNS, sweep=False),
        outcome_rows(results),
        *(
            []
            if results["judge"]["not_corrected"]
            else [rows(results, CORRECTED_COLUMNS, sweep=False)]
        ),
        rows(results, UTILITY_COLUMNS, sweep=False),
        *([rows(results, COLUMNS, sweep=True)] if swept else []),
        class_rows(results),
        comparison_rows(results),
    ):
        yield ""
        yield from align(table)
    yield ""
    yield correction_line(results)
    if speed["seconds"]:
        yield (
            f"{speed['responses']} responses, {speed['reply_tokens']} tokens in "
            f"{speed['seconds']:.1f} s: {speed['reply_tokens_per_second']:.0f} tokens/s, all "
            "profiles in shared batches"
        )
    for warning in results["warnings"]:
        yield f"warning: {warning}"
