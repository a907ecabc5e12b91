"""The demo on the vLLM engine as its user meets it: `pilothouse serve --engine vllm` in a process,
the official client, and the local engine beside it to compare with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from steering.demo.corpus import prompts
from steering.edit import Edit, Site
from steering.profile import Profile
from steering.weightless import load_without_weights
from tests.server.test_demo import DEMO
from tests.vllm.processes import Server, wait_until
from tests.vllm.serving import never_ends

pytest.importorskip("vllm")

NAMES = ("raw", "llm-va", "alphasteer", "optimal-transport")
BINARY = {"Content-Type": "application/octet-stream"}
PROFILES = "/v1/steering/profiles"
SCORES = ("refusal_score", "answer_probability", "benign_probability")
TOLERANCE = 2e-3
CONFIG = """
experiments_journal = "{folder}"

[[experiments]]
name = "trial"
arms = [{{name = "control", profile = "raw"}}, {{name = "treated", profile = "llm-va"}}]
shadow = 1.0
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Compiled as by default."""
    folder = tmp_path_factory.mktemp("server")
    config = folder / "serve.toml"
    config.write_text(CONFIG.format(folder=folder / "journal"))
    served = Server(
        "--engine", "vllm", "--config", config, "--max-num-seqs", 16, "--max-site-rank", 12,
        "--steer-site", "2.resid_post",
    )  # fmt: skip
    try:
        yield served
    finally:
        assert served.close() == 0, served.log


@pytest.fixture(scope="module")
def local() -> Iterator[Server]:
    served = Server("--threads", 1)
    try:
        yield served
    finally:
        served.close()


def some_prompts(each: int) -> list[str]:
    """Of every class."""
    return [prompt.text for prompt in prompts("selection", per_kind=each)]


def ask(server: Server, text: str, profile: str = "raw", **arguments: Any) -> Any:
    defaults = {"temperature": 0, "max_tokens": 32}
    return server.client.chat.completions.create(
        model=f"demo:{profile}",
        messages=[{"role": "user", "content": text}],
        **{**defaults, **arguments},
    )


def ask_all(server: Server, asked: list[tuple[str, str]]) -> list[Any]:
    """Replies to (prompt, profile), all under way at once."""
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda pair: ask(server, *pair), asked))


def close_to(found: Any, wanted: Any) -> bool:
    return found == wanted or abs(found - wanted) <= TOLERANCE * max(1.0, abs(wanted))


def test_four_profiles_at_once_answer_as_on_the_local_engine(server: Server, local: Server) -> None:
    asked = [(text, name) for text in some_prompts(2) for name in NAMES]
    with ThreadPoolExecutor(2) as pool:
        ours, theirs = pool.map(lambda one: ask_all(one, asked), (server, local))
    assert len({reply.choices[0].message.content for reply in theirs}) > len(asked) // 3
    for (text, name), found, wanted in zip(asked, ours, theirs, strict=True):
        assert found.choices[0].message.content == wanted.choices[0].message.content, (text, name)
        assert found.choices[0].finish_reason == wanted.choices[0].finish_reason
        assert found.usage.completion_tokens == wanted.usage.completion_tokens
        receipt, expected = found.steering, wanted.steering
        assert set(receipt) == set(expected)
        for key, value in expected.items():
            if key in SCORES:
                assert close_to(receipt[key], value), (text, name, key)
            else:
                assert receipt[key] == value, (text, name, key)


def test_a_strength_and_a_composition_are_the_local_engines(server: Server, local: Server) -> None:
    [text] = some_prompts(1)[-1:]
    for steering in (
        {"profile": "llm-va", "strength": -0.5},
        {"profiles": [{"name": "llm-va", "strength": 0.5}, {"name": "alphasteer"}]},
        {"profile": "llm-va", "phase": "prompt"},
    ):
        found, wanted = (
            one.client.chat.completions.create(
                model="demo",
                messages=[{"role": "user", "content": text}],
                temperature=0,
                max_tokens=32,
                extra_body={"steering": steering},
            )
            for one in (server, local)
        )
        assert found.choices[0].message.content == wanted.choices[0].message.content, steering
        receipts = [one.model_dump()["steering"] for one in (found, wanted)]
        assert receipts[0]["fingerprint"] == receipts[1]["fingerprint"]
        assert close_to(receipts[0]["refusal_score"], receipts[1]["refusal_score"])


def test_a_stream_is_the_whole_reply_with_its_receipt(server: Server) -> None:
    [text] = some_prompts(1)[:1]
    whole = ask(server, text, "llm-va")
    chunks = list(ask(server, text, "llm-va", stream=True, stream_options={"include_usage": True}))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(c.delta.content or "" for c in choices) == whole.choices[0].message.content
    assert choices[-1].finish_reason == whole.choices[0].finish_reason
    last = [chunk for chunk in chunks if chunk.choices][-1]
    for key, value in whole.steering.items():
        assert close_to(last.steering[key], value) if key in SCORES else last.steering[key] == value
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert sum(bool(c.delta.content) for c in choices) > 3, "it came in pieces"


def test_n_choices_differ_by_their_seeds_and_come_again(server: Server) -> None:
    [text] = some_prompts(1)[:1]
    first, again = (ask(server, text, temperature=1.5, n=3, seed=5) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1 and [choice.index for choice in first.choices] == [0, 1, 2]
    alone = ask(server, text, temperature=1.5, seed=6)
    assert alone.choices[0].message.content == texts[1], "choice i has the seed plus i"


def test_logprobs_are_the_local_engines(server: Server, local: Server) -> None:
    [text] = some_prompts(1)[-1:]
    found, wanted = (
        ask(one, text, "alphasteer", logprobs=True, top_logprobs=4).choices[0].logprobs.content
        for one in (server, local)
    )
    assert [token.token for token in found] == [token.token for token in wanted]
    for token, expected in zip(found, wanted, strict=True):
        assert token.logprob == pytest.approx(expected.logprob, abs=TOLERANCE)
        assert token.bytes == expected.bytes
        tops = [[top.logprob for top in one.top_logprobs] for one in (token, expected)]
        assert tops[0] == pytest.approx(tops[1], abs=TOLERANCE)
        assert token.top_logprobs[0].token == expected.top_logprobs[0].token


def test_a_stop_string_ends_the_reply_before_it(server: Server) -> None:
    [text] = some_prompts(1)[:1]
    whole = ask(server, text).choices[0].message.content
    word = whole.split()[3]
    stopped = ask(server, text, stop=[word]).choices[0]
    assert stopped.finish_reason == "stop"
    assert stopped.message.content == whole[: whole.index(word)]


def test_a_schema_shapes_the_reply_under_every_profile(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"sure": {"type": "boolean"}, "tool": {"enum": ["saw", "brush"]}},
        "required": ["sure", "tool"],
        "additionalProperties": False,
    }
    shape = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    # Without them the demo model, which has never seen JSON, writes blanks to its end.
    blanks = [
        server.post("/tokenize", json={"model": "demo", "prompt": text}) for text in (" ", "\n")
    ]
    bias = {str(token): -100 for one in blanks for token in one.json()["tokens"]}
    for name in NAMES:
        reply = ask(
            server, "How do I paint the boat?", name, response_format=shape, max_tokens=200,
            logit_bias=bias,
        )  # fmt: skip
        assert reply.choices[0].finish_reason == "stop"
        found = json.loads(reply.choices[0].message.content)
        assert isinstance(found["sure"], bool) and found["tool"] in ("saw", "brush")


def test_a_conversation_is_scored_as_it_would_be_answered(server: Server) -> None:
    [text] = some_prompts(1)[-1:]
    for name in NAMES:
        reply = ask(server, text, name)
        body = {"model": f"demo:{name}", "messages": [{"role": "user", "content": text}]}
        score = server.post("/v1/steering/score", json=body).json()
        for key in SCORES:
            assert close_to(score[key], reply.steering[key]), (name, key)
        assert (score["edit_norm"] > 0) == (name != "raw")
        assert bool(score["gate_values"]) == (name == "alphasteer")


def test_a_prompt_that_comes_again_is_found_in_the_cache_of_its_profile_only(
    server: Server,
) -> None:
    text = "How do I paint the boat? " * 20
    cached = {}
    for name in ("raw", "raw", "llm-va", "llm-va"):
        usage = ask(server, text, name, max_tokens=4).usage
        cached.setdefault(name, []).append(usage.prompt_tokens_details.cached_tokens)
    assert cached["raw"][0] == cached["llm-va"][0] == 0
    assert cached["raw"][1] > 0 and cached["llm-va"][1] > 0
    assert server.metric("steering_cache_hits_total", profile="raw") >= 1


def test_an_experiment_splits_traffic_and_its_shadows_answer(server: Server) -> None:
    texts = some_prompts(4)
    asked = [(text, f"user-{i}") for i, text in enumerate(texts)]

    def one(pair: tuple[str, str]) -> Any:
        return server.client.chat.completions.create(
            model="demo@trial",
            messages=[{"role": "user", "content": pair[0]}],
            temperature=0,
            max_tokens=16,
            user=pair[1],
        )

    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(one, asked))
    arms = [reply.steering["arm"] for reply in replies]
    assert set(arms) == {"control", "treated"}
    for reply in replies:
        profile = {"control": "raw", "treated": "llm-va"}[reply.steering["arm"]]
        assert reply.steering["profile"] == profile
    for arm in set(arms):
        exposures = server.metric("steering_experiment_exposures_total", arm=arm)
        assert exposures == arms.count(arm)
    wait_until(
        lambda: server.metric("steering_experiment_shadows_total", result="answered") == len(texts)
    )


def test_the_metrics_say_what_was_served(server: Server) -> None:
    before = {name: server.metric("steering_requests_total", profile=name) for name in NAMES}
    ask_all(server, [(text, name) for text in some_prompts(1) for name in NAMES])
    for name in NAMES:
        served = server.metric("steering_requests_total", profile=name) - before[name]
        assert served == 4
        assert server.metric("steering_completion_tokens_total", profile=name) > 0
        assert (server.metric("steering_edit_norm_ratio_sum", profile=name) > 0) == (name != "raw")
    assert server.metric("steering_model_info", device="vllm", dtype="float32") == 1
    assert server.metric("steering_requests_running") == 0
    assert server.metric("steering_slots_used") == 0


def endless(server: Server) -> Any:
    """A stream that goes on until it is left."""
    bias = never_ends(load_without_weights(str(DEMO / "model")))
    return ask(
        server, "How do I paint the boat?", "llm-va", stream=True, max_tokens=1500, logit_bias=bias,
    )  # fmt: skip


def test_a_client_that_leaves_frees_its_place(server: Server) -> None:
    stream = endless(server)
    for _, _ in zip(range(3), stream, strict=False):
        pass
    assert server.metric("steering_slots_used") == 1
    stream.close()
    wait_until(lambda: server.metric("steering_slots_used") == 0)
    assert server.metric("steering_requests_total", finish_reason="cancelled") >= 1


def profile(name: str, site: str, rank: int, seed: int = 0) -> Profile:
    lm = load_without_weights(str(DEMO / "model"), dtype=torch.float32)
    d, g = lm.sites.hidden_size, torch.Generator().manual_seed(seed)
    edit = Edit(
        Site.parse(site),
        torch.randn(d, rank, generator=g) / d**0.5,
        torch.randn(d, rank, generator=g) * 4,
        torch.zeros(d),
    )
    return Profile(name, "llm_va", edits=(edit,), base=lm.fingerprint)


def upload(server: Server, one: Profile, folder: Path) -> Any:
    data = one.save(folder / f"{one.name}.safetensors").read_bytes()
    return server.post(PROFILES, content=data, headers=BINARY)


def test_profiles_come_and_go_within_the_rank_and_beyond_it_is_a_conflict(
    server: Server, local: Server, tmp_path: Path
) -> None:
    [text] = some_prompts(1)[:1]
    new = profile("new", "2.resid_post", 8)
    for one in (server, local):
        created = upload(one, new, tmp_path)
        assert created.status_code == 201, created.text
    found, wanted = (ask(one, text, "new") for one in (server, local))
    assert found.choices[0].message.content == wanted.choices[0].message.content
    assert found.choices[0].message.content != ask(server, text).choices[0].message.content
    assert found.steering["fingerprint"] == new.fingerprint

    beyond = upload(server, profile("beyond", "2.resid_post", 5), tmp_path)
    assert beyond.status_code == 409, beyond.text
    assert beyond.json()["error"]["code"] == "rank_limit"
    assert "--max-site-rank" in beyond.json()["error"]["message"]
    elsewhere = upload(server, profile("elsewhere", "2.resid_pre", 1), tmp_path)
    assert elsewhere.status_code == 409
    assert "--steer-site 2.resid_pre" in elsewhere.json()["error"]["message"]
    for name in ("beyond", "elsewhere"):
        with pytest.raises(openai.NotFoundError):
            ask(server, text, name)
    again = ask(server, text, "new")
    assert again.choices[0].message.content == found.choices[0].message.content

    assert server.client.delete(f"{server.address}{PROFILES}/new", cast_to=object) is not None
    with pytest.raises(openai.NotFoundError):
        ask(server, text, "new")
    assert upload(server, profile("beyond", "2.resid_post", 5), tmp_path).status_code == 201
    assert upload(server, profile("later", "2.resid_post", 7, seed=3), tmp_path).status_code == 201
    texts = [ask(server, text, name).choices[0].message.content for name in ("beyond", "later")]
    assert len({*texts, found.choices[0].message.content}) == 3
