from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from steering.evaluate.arms import Decoding, NamedPrompts, arms_of, read_prompt_file
from steering.evaluate.page import write_page
from steering.evaluate.plots import draw_plots
from steering.evaluate.responses import Response
from steering.evaluate.run import evaluate
from steering.evaluate.summary import figures
from steering.evaluate.table import render
from steering.profile import RAW, Profile
from steering.prompts import Prompt, PromptSet
from tests.conftest import make_model
from tests.steering.edits import random_edit
from tests.steering.evaluate.evaluations import HOSTILE, Answers, job, profiles

ARMS = 1 + 3 * 3  # raw, and three profiles at 0, .25 and their own strength
PROMPTS = 4 + 5 + 1


def without_chance(results: dict[str, Any]) -> dict[str, Any]:
    """What must not differ between two runs: all but date and clock."""
    kept = {k: v for k, v in results.items() if k not in ("date", "throughput")}
    text: dict[str, Any] = json.loads(json.dumps(kept))
    return text


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "responses.jsonl").read_text().splitlines()]


def test_an_interrupted_run_resumes_to_the_same_results_and_repeats_nothing(
    tmp_path: Path,
) -> None:
    whole = evaluate(job(), tmp_path / "whole", Answers())
    first = Answers(stop_after=23)
    with pytest.raises(KeyboardInterrupt):
        evaluate(job(), tmp_path / "torn", first)
    with (tmp_path / "torn" / "responses.jsonl").open("a") as file:
        file.write('{"key": "torn in the mid')
    second = Answers()
    resumed = evaluate(job(), tmp_path / "torn", second)
    assert without_chance(resumed) == without_chance(whole)
    assert resumed["throughput"]["responses"] == whole["throughput"]["responses"]
    keys = Counter(line["key"] for line in lines(tmp_path / "torn"))
    assert set(keys.values()) == {1}
    assert len(first.asked) + len(second.asked) == len(keys)
    third = Answers()
    assert without_chance(evaluate(job(), tmp_path / "torn", third)) == without_chance(whole)
    assert third.asked == []


def test_arms_that_do_the_same_share_their_responses(tmp_path: Path) -> None:
    answers = Answers()
    results = evaluate(job(), tmp_path, answers)
    assert len(results["arms"]) == ARMS
    assert len(answers.asked) == (ARMS - 3) * PROMPTS, "strength 0 is raw"
    by_name = {arm["name"]: arm for arm in results["arms"]}
    assert by_name["aligned at 0"]["all"] == by_name["raw"]["all"]
    assert sorted(by_name) == sorted(
        ["raw", "aligned", "gated", "mapped"]
        + [f"{name} at {s}" for name in ("aligned", "gated", "mapped") for s in ("0", "0.25")]
    )


def test_other_settings_are_other_responses_and_failures_are_asked_again(tmp_path: Path) -> None:
    evaluate(job(strengths=()), tmp_path, Answers())
    answers = Answers()
    evaluate(job(strengths=(), decoding=Decoding(max_tokens=10)), tmp_path, answers)
    assert len(answers.asked) == 4 * PROMPTS
    path = tmp_path / "responses.jsonl"
    last = {**lines(tmp_path)[-1], "outcome": "error", "error": "a step failed"}
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines(tmp_path), last]))
    again = Answers()
    evaluate(job(strengths=(), decoding=Decoding(max_tokens=10)), tmp_path, again)
    assert len(again.asked) == 1


def test_a_file_of_something_else_is_refused_by_line(tmp_path: Path) -> None:
    (tmp_path / "responses.jsonl").write_text('{"key": "a"}\n')
    with pytest.raises(ValueError, match=r"responses\.jsonl:1: not a response"):
        evaluate(job(), tmp_path, Answers())


def test_the_json_says_what_was_run_and_every_number_is_finite(tmp_path: Path) -> None:
    evaluate(job(), tmp_path, Answers())

    def no_constants(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    text = (tmp_path / "results.json").read_text()
    results = json.loads(text, parse_constant=no_constants)
    lm = make_model("llama")
    assert results["model"]["digest"] == lm.fingerprint.digest
    assert [p["fingerprint"] for p in results["profiles"]] == [
        "",
        *(p.fingerprint for p in profiles(lm)),
    ]
    assert all(re.fullmatch("[0-9a-f]{64}", p["digest"]) for p in results["prompts"])
    assert {"torch", "transformers", "pilothouse", "python"} <= set(results["versions"])
    assert results["settings"]["max_tokens"] == 9 and results["judge"]["version"]
    main = {arm["name"]: arm for arm in results["arms"] if arm["main"]}
    for name, arm in main.items():
        assert sum(sum(c.values()) for c in arm["all"]["outcomes"].values()) == PROMPTS
        assert arm["utility"]["perplexity"] > 1
        assert arm["utility"]["kl_to_raw_benign"]["tokens"] >= 8
        assert (arm["utility"]["kl_to_raw_benign"]["nats_per_token"] == 0) == (name == "raw")
        assert set(arm["utility"]["multiple_choice"]) == {"quiz"}
    assert main["raw"]["inside"] == {}
    assert main["aligned"]["inside"]["edit_norm"]["mean"] > 0
    (gate,) = main["gated"]["inside"]["gates"]
    assert sum(gate["counts"]["harmful"]) == 5 and sum(gate["counts"]["benign"]) == 5
    assert len(main["mapped"]["inside"]["scatters"][0]["source"]) == 5
    assert len(results["comparisons"]) == 3 * 6
    assert all(math.isfinite(row["p"]) for row in results["comparisons"])


def test_every_plot_is_made(tmp_path: Path) -> None:
    results = evaluate(job(), tmp_path, Answers(markup="Sure, here it is."))
    plots = draw_plots(results, tmp_path)
    assert {path.name for path in plots.values()} == {
        "f1.png",
        "tradeoff.png",
        "strengths.png",
        "layers-aligned.png",
        "cosine-aligned.png",
        "gates-gated.png",
        "transport-mapped.png",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots.values())


def test_the_page_holds_everything_and_escapes_what_models_say(tmp_path: Path) -> None:
    results = evaluate(job(), tmp_path, Answers(markup="Sure. <script>alert('reply')</script>"))
    page = write_page(results, draw_plots(results, tmp_path), tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(&#x27;reply&#x27;)" in page
    assert "&lt;script&gt;alert(&#x27;prompt&#x27;)" in page and HOSTILE not in page
    # Nothing is fetched: every source is inside, and there are no links, styles or imports.
    sources = re.findall(r'(?:src|href|action|data)="([^"]{0,22})', page)
    assert sources and set(sources) == {"data:image/png;base64,"}
    assert not re.search(r"<(?:link|iframe|object|embed|base|form)\b|@import|url\(|https?:", page)


def test_the_table_names_every_arm_and_class(tmp_path: Path) -> None:
    results = evaluate(job(), tmp_path, Answers())
    text = "\n".join(render(results))
    for name in ("raw", "aligned", "gated at 0.25", "mapped", "plain", "McNemar", "perplexity"):
        assert name in text


def test_degenerate_replies_are_neither_attack_nor_refusal() -> None:
    def response(outcome: Any) -> Response:
        return Response(
            "", "", "", 1.0, "", "", "", (1,), "stop", {}, 0.0, "", 0.0, outcome=outcome
        )

    outcomes = ["answer", "refusal", "degenerate", "empty"]
    pairs = [(Prompt("x", h), response(o)) for h in (True, False) for o in outcomes]
    found = figures(pairs)
    assert found["attack_success"]["value"] == found["over_refusal"]["value"] == 0.25
    assert found["degenerate"]["value"] == 0.5
    assert found["f1"]["value"] == pytest.approx(2 / (2 + 3 + 3))
    assert found["f1_paper"]["value"] == pytest.approx(0.5)
    assert found["youden_j"]["value"] == pytest.approx(-0.5)
    assert figures([(Prompt("x", True), response("answer"))])["over_refusal"] is None


def test_sets_that_profiles_were_fitted_on_are_warned_about(tmp_path: Path) -> None:
    prompts = PromptSet((Prompt("a", True), Prompt("b", False), Prompt("b", False)))
    lm = make_model("llama")
    edit = random_edit("1.attn_out")
    fitted = Profile(
        "fitted", "llm_va", (edit,), lm.fingerprint, provenance={"prompts": {"fit": prompts.digest}}
    )
    evaluation = job(profiles=[fitted], sets=[NamedPrompts("mine", prompts)], strengths=())
    warnings = evaluate(evaluation, tmp_path, Answers())["warnings"]
    assert any("the fit set of fitted" in w for w in warnings)
    assert any("1 of 3 prompts repeat" in w for w in warnings)


def test_arms_are_sorted_and_names_must_differ() -> None:
    lm = make_model("llama")
    found = arms_of([*profiles(lm), RAW], (1.0, 0.0))
    assert [arm.name for arm in found if arm.main] == ["raw", "aligned", "gated", "mapped"]
    assert [arm.name for arm in found][:3] == ["raw", "aligned at 0", "aligned"]
    with pytest.raises(ValueError, match="two profiles named aligned"):
        arms_of([profiles(lm)[0], profiles(lm)[0]])


def test_a_prompt_file_may_name_its_label_or_data_set(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("one\ntwo\n")
    assert all(p.harmful for p in read_prompt_file(f"{path}:harmful").prompts.prompts)
    assert not any(p.harmful for p in read_prompt_file(f"{path}:benign").prompts.prompts)
    assert read_prompt_file(f"{path}:malicious-instruct").name == "some"
    with pytest.raises(ValueError, match="harmful"):
        read_prompt_file(str(path))
    with pytest.raises(ValueError, match="unknown data set"):
        read_prompt_file(f"{path}:nonsense")
