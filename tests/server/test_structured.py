"""Replies have the shape that was asked for, whatever the model would rather say."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import httpx2
import jsonschema
import pytest
import torch
from openai.types.chat import ChatCompletion
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from server.detokenize import Detokenizer
from server.engine.base import ConstraintError
from server.engine.local import LocalEngine
from server.grammar import (
    MAX_GRAMMAR_CHARACTERS,
    Grammar,
    GrammarCompiler,
    GrammarError,
    json_text,
)
from server.hosting import DEMO, Host
from server.structured import JsonSchema, ResponseFormat, constrain
from server.tool_parsers import Call, Text, ToolFormat
from server.tools import Tool, ToolUse
from tests.conftest import make_model
from tests.server.fakes import error_of, events, http_client, make_host, openai_client, post
from tests.server.templates import with_template

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "mood": {"enum": ["réd", None, 3]},
    },
    "required": ["name", "age", "mood"],
    "additionalProperties": False,
}
TREE: dict[str, Any] = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "number"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["value", "children"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    TREE,
    {"type": "object", "properties": {"on": {"type": "string", "format": "date"}},
     "required": ["on"], "additionalProperties": False},
    {"anyOf": [{"type": "string", "pattern": "^[a-cé]{2,5}$"}, {"type": "boolean"}]},
    {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 3},
]  # fmt: skip

# What satisfies `a` is what satisfies `a`: the grammar has a beginning and no end.
DEAD_END: dict[str, Any] = {
    "$defs": {"a": {"$ref": "#/$defs/a"}},
    "type": "object",
    "properties": {"a": {"$ref": "#/$defs/a"}},
    "required": ["a"],
    "additionalProperties": False,
}


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama 2's and Gemma's: `▁` for blanks, bytes where no token fits."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    text = [json.dumps({"name": "Zoë b", "age": i, "value": [True, None]}) for i in range(100)]
    special = ["<unk>", "<s>", "</s>"]
    # Bytes are part of the text: they must not be special, as whatever a trainer adds is.
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))]
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = [t for t in saved["added_tokens"] if t["content"] in special]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(saved)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


class Vocabulary:
    """As much of a model as a grammar looks at; it knows three tokens more than its tokenizer."""

    def __init__(self, tokenizer: Any, *more_ends: int) -> None:
        self.tokenizer = tokenizer
        self.model = torch.nn.Module()
        self.size = len(tokenizer) + 3
        self.model.get_output_embeddings = lambda: torch.nn.Linear(1, self.size)  # type: ignore
        self.eos_token_ids = frozenset([tokenizer.eos_token_id, *more_ends])


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bytes": lambda: make_model("llama").tokenizer,
    "demo": lambda: AutoTokenizer.from_pretrained(DEMO / "model"),
    "sentencepiece": sentencepiece_like,
}


@cache
def compiler(name: str) -> GrammarCompiler:
    return GrammarCompiler(Vocabulary(TOKENIZERS[name]()))  # type: ignore[arg-type]


def write(grammar: Grammar, lm: Any, seed: int, limit: int = 400) -> str | None:
    """Text of tokens drawn at random from what the grammar allows, None if it has no end."""
    rng = torch.Generator().manual_seed(seed)
    state, ids = grammar.copy(), []
    for _ in range(limit):
        logits = torch.randn(len(state.allowed()), generator=rng) * 3
        logits[sorted(lm.eos_token_ids)] += 4
        logits[~state.allowed()] = -torch.inf
        token = int(torch.multinomial(logits.softmax(-1), 1, generator=rng))
        state.accept(token)
        if token in lm.eos_token_ids:
            detokenizer = Detokenizer(lm.tokenizer, keep=("<tool_call>", "</tool_call>"))
            return "".join(map(detokenizer.push, ids)) + detokenizer.flush()
        ids.append(token)
    return None


def compiled(name: str, grammar: str) -> Grammar:
    return asyncio.run(compiler(name).compile(grammar))


@pytest.mark.parametrize("tokenizer", sorted(TOKENIZERS))
@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_any_choice_of_allowed_tokens_is_json_of_the_schema(
    tokenizer: str, schema: dict[str, Any]
) -> None:
    grammar = compiled(tokenizer, f"start: {json_text(schema)}")
    texts = [write(grammar, compiler(tokenizer)._lm, seed) for seed in range(25)]
    whole = [text for text in texts if text is not None]
    assert len(whole) > 15
    for text in whole:
        jsonschema.validate(json.loads(text), schema)


def test_a_token_of_several_that_end_a_reply_may_end_it() -> None:
    vocabulary: Any = Vocabulary(make_model("llama").tokenizer, 256)
    grammar = asyncio.run(GrammarCompiler(vocabulary).compile(f"start: {json_text({'const': 1})}"))
    state = grammar.copy()
    state.accept(vocabulary.tokenizer("1")["input_ids"][0])
    assert state.allowed().nonzero().flatten().tolist() == [256, 257]
    assert len(state.allowed()) == vocabulary.size


def test_a_copy_goes_its_own_way() -> None:
    grammar = compiled("bytes", f"start: {json_text(PERSON)}")
    before = grammar.allowed()
    write(grammar, compiler("bytes")._lm, seed=0)
    assert torch.equal(grammar.allowed(), before)


def test_blanks_cannot_go_on_for_ever() -> None:
    state = compiled("bytes", f"start: {json_text(PERSON)}").copy()
    encode = make_model("llama").tokenizer
    blank, line = encode(" \n")["input_ids"]
    state.accept(encode("{")["input_ids"][0])
    state.accept(line)
    for _ in range(20):
        state.accept(blank)
    assert not state.allowed()[[blank, line]].any()


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "strin"}, "Invalid type"),
        ({"not": {}}, '"not"'),
        ({"x-guidance": {"lenient": True}, "not": {}}, '"not"'),
        ({"pattern": "(", "type": "string"}, "unclosed group"),
        ({"$ref": "https://example.org/schema.json"}, "example.org"),
        ({"$ref": "#"}, "no text can satisfy it"),
        ({"type": "string", "minLength": 2, "maxLength": 1}, "minLength"),
        ({"const": "\ud800"}, "hex escape"),
        ({"multipleOf": 303755540}, "multipleOf"),
        ({"multipleOf": 10**400 + 1}, "multipleOf"),
        # Their least common multiple alone would take half a minute.
        ({"anyOf": [{"multipleOf": 7919 * i + 1} for i in range(15_000)]}, "multipleOf"),
        ({"enum": [1] * MAX_GRAMMAR_CHARACTERS}, str(MAX_GRAMMAR_CHARACTERS)),
        ({"items": {"allOf": [{"multipleOf": 9973}, {"multipleOf": 0.9967}]}}, "multipleOf"),
        ({"enum": ["x" * MAX_GRAMMAR_CHARACTERS]}, str(MAX_GRAMMAR_CHARACTERS)),
    ],
)
def test_a_schema_that_cannot_be_compiled_says_why(schema: dict[str, Any], says: str) -> None:
    with pytest.raises(GrammarError) as raised:
        compiled("bytes", f"start: {json_text(schema)}")
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_a_dead_end_is_an_error_and_no_broken_json() -> None:
    with pytest.raises(ConstraintError, match="no text can satisfy"):
        write(compiled("bytes", f"start: {json_text(DEAD_END)}"), compiler("bytes")._lm, seed=0)


def test_numbers_may_be_multiples() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 250},
              "b": {"type": "number", "multipleOf": 0.01}}, "required": ["a", "b"],
              "additionalProperties": False}  # fmt: skip
    for seed in range(10):
        text = write(compiled("bytes", f"start: {json_text(schema)}"), compiler("bytes")._lm, seed)
        if text is not None:
            assert json.loads(text)["a"] % 250 == 0


def test_a_grammar_that_never_gets_ready_is_refused_and_delays_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server.grammar.COMPILE_SECONDS", 0.05)
    subject = GrammarCompiler(Vocabulary(make_model("llama").tokenizer))  # type: ignore[arg-type]
    stuck = threading.Event()
    really = subject._compile

    def compile(grammar: str) -> Grammar:
        if "stuck" in grammar:
            stuck.wait()
        return really(grammar)

    monkeypatch.setattr(subject, "_compile", compile)
    try:
        with pytest.raises(GrammarError, match="takes more than"):
            asyncio.run(subject.compile(f"start: {json_text({'const': 'stuck'})}"))
        monkeypatch.setattr("server.grammar.COMPILE_SECONDS", 30)
        asyncio.run(subject.compile(f"start: {json_text({'const': 'other'})}"))
    finally:
        stuck.set()


def test_the_cache_is_bounded_and_used() -> None:
    once = compiled("bytes", f"start: {json_text({'const': 'once'})}")
    assert compiled("bytes", f"start: {json_text({'const': 'once'})}") is once
    for i in range(70):
        compiled("bytes", f"start: {json_text({'const': i})}")
    assert len(compiler("bytes")._cache) == 64


# Tools


def tool(name: str, strict: bool | None = None, **properties: Any) -> Tool:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": sorted(properties),
        "additionalProperties": False,
    }
    function = {"name": name, "strict": strict, "parameters": parameters if properties else None}
    return Tool.model_validate({"type": "function", "function": function})


NODE = {"$defs": {"n": {"type": "integer"}}, "type": "object",
        "properties": {"a": {"$ref": "#/$defs/n"}}, "required": ["a"],
        "additionalProperties": False}  # fmt: skip
TREE_TOOL = Tool.model_validate(
    {"type": "function", "function": {"name": "tree", "strict": True, "parameters": NODE}}
)
OFFERED = (tool("look", where={"type": "string", "maxLength": 5}), tool("wait"), TREE_TOOL)


def written(
    use: ToolUse, answer: ResponseFormat | None = None, *, special: bool = False
) -> list[tuple[str, list[Call]]]:
    """Content and calls of replies drawn at random under the grammar of a request."""
    lm: Any = Vocabulary(make_model("llama").tokenizer)
    if special:
        lm.tokenizer = with_template(None).tokenizer
        lm.tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<tool_call>", "</tool_call>"]}
        )
        lm = Vocabulary(lm.tokenizer)
    grammar = asyncio.run(constrain(GrammarCompiler(lm), lm, answer, use))
    assert grammar is not None
    found = []
    for seed in range(20):
        if (text := write(grammar, lm, seed)) is None:
            continue
        parser = use.parser()
        parts = [*parser.push(text), *parser.finish()]
        content = "".join(part.text for part in parts if isinstance(part, Text))
        found.append((content, [part for part in parts if isinstance(part, Call)]))
    assert len(found) >= 10
    for _, calls in found:
        for call in calls:
            [definition] = [t.function for t in use.offered if t.function.name == call.name]
            jsonschema.validate(json.loads(call.arguments), definition.schema_of_arguments)
    return found


@pytest.mark.parametrize("format", ["hermes", "llama3"])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_forced_call_is_a_right_one_and_nothing_else(format: ToolFormat, parallel: bool) -> None:
    forced = OFFERED if parallel else OFFERED[:1]
    for content, calls in written(ToolUse(OFFERED, forced, format, parallel)):
        assert content == "" and calls
        assert parallel or len(calls) == 1
        assert {call.name for call in calls} <= {t.function.name for t in forced}


def test_a_forced_call_uses_tags_that_are_special_tokens() -> None:
    for content, calls in written(ToolUse(OFFERED, OFFERED, "hermes"), special=True):
        assert content == "" and calls


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("format", ["hermes", "llama3"])
def test_with_a_strict_tool_a_reply_is_free_but_its_calls_are_right(
    format: ToolFormat, special: bool
) -> None:
    found = written(ToolUse(OFFERED, (), format), special=special)
    assert any(content and not calls for content, calls in found)
    assert all("<tool_call>" not in content for content, _ in found)


@pytest.mark.parametrize("format", ["hermes", "llama3"])
def test_a_schema_and_tools_leave_the_choice_between_them(format: ToolFormat) -> None:
    schema = JsonSchema(name="x", schema=PERSON)
    found = written(
        ToolUse(OFFERED, (), format), ResponseFormat(type="json_schema", json_schema=schema)
    )
    for content, calls in found:
        assert bool(content) != bool(calls)
        if content:
            jsonschema.validate(json.loads(content), PERSON)


# The whole way


@pytest.fixture
def host() -> Host:
    return local_host()


def local_host() -> Host:
    """It runs once."""
    return make_host(LocalEngine(make_model("llama"), max_num_seqs=4, max_model_len=256))


def person_format(schema: dict[str, Any] = PERSON) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}


def ask_all(host: Host, requests: list[dict[str, Any]]) -> list[Any]:
    async def run() -> list[Any]:
        async with openai_client(host) as client:
            create: Any = client.chat.completions.create
            messages = [{"role": "user", "content": "Hi"}]
            return await asyncio.gather(
                *(create(model="tiny", messages=messages, **r) for r in requests),
                return_exceptions=True,
            )

    return asyncio.run(run())


def test_every_profile_and_temperature_gives_json_of_the_schema(host: Host) -> None:
    requests = [
        {
            "response_format": person_format(),
            "temperature": temperature,
            "seed": seed,
            "max_tokens": 150,
            "extra_body": {"steering": {"profile": profile, "strength": 3.0}},
        }
        for profile in ("raw", "bold", "shy")
        for temperature in (0, 0.7, 2)
        for seed in range(4)
    ]
    reasons = []
    for completion in ask_all(host, requests):
        assert isinstance(completion, ChatCompletion), completion
        [choice] = completion.choices
        reasons.append(choice.finish_reason)
        if choice.finish_reason == "stop":
            jsonschema.validate(json.loads(choice.message.content or ""), PERSON)
        else:
            assert choice.finish_reason == "length"
            assert completion.usage is not None and completion.usage.completion_tokens == 150
    assert reasons.count("stop") > 20


def test_each_of_several_choices_is_json_of_the_schema(host: Host) -> None:
    asked = {"response_format": person_format(), "n": 3, "seed": 1, "max_tokens": 150,
             "temperature": 0.8, "logprobs": True, "top_logprobs": 1}  # fmt: skip
    [completion] = ask_all(host, [asked])
    texts = [choice.message.content for choice in completion.choices]
    assert len(set(texts)) == 3
    forced = False
    for choice in completion.choices:
        jsonschema.validate(json.loads(choice.message.content), PERSON)
        for token in choice.logprobs.content:  # raw: what the grammar forbids is still there
            [best] = token.top_logprobs
            forced |= best.token != token.token and best.logprob > token.logprob
    assert forced


def test_max_tokens_cuts_with_length(host: Host) -> None:
    [completion] = ask_all(host, [{"response_format": person_format(), "max_tokens": 3}])
    [choice] = completion.choices
    assert choice.finish_reason == "length" and len(choice.message.content) <= 3


def test_a_constraint_and_its_failure_concern_no_neighbour() -> None:
    free = [{"temperature": 1, "seed": seed, "max_tokens": 40} for seed in range(3)]
    alone = [ask_all(local_host(), [r])[0].choices[0].message.content for r in free]
    for schema in (PERSON, DEAD_END):
        constrained = {"response_format": person_format(schema), "seed": 0, "max_tokens": 90}
        *together, last = ask_all(local_host(), [*free, constrained])
        assert [c.choices[0].message.content for c in together] == alone
        if schema is PERSON:
            jsonschema.validate(json.loads(last.choices[0].message.content), PERSON)
        else:
            assert last.status_code == 400 and last.param == "response_format"


def test_a_json_object_is_one(host: Host) -> None:
    requests = [
        {"response_format": {"type": "json_object"}, "seed": seed, "max_tokens": 200}
        for seed in range(6)
    ]
    for completion in ask_all(host, requests):
        [choice] = completion.choices
        assert choice.message.content.startswith("{")
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.message.content), dict)


COMPACT = (
    "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for m in messages %}"
    "<|{{ m.role }}|>{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n'
    "</tool_call>{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_random_model_calls_the_tool_it_must(choice: Any) -> None:
    lm = with_template(COMPACT)
    host = replace(make_host(LocalEngine(lm, max_num_seqs=4, max_model_len=256)), lm=lm)
    offered = [t.model_dump(exclude_none=True) for t in OFFERED[:1]]
    requests = [
        {"tools": offered, "tool_choice": choice, "parallel_tool_calls": False, "seed": seed,
         "max_tokens": 150}
        for seed in range(4)
    ]  # fmt: skip
    for completion in ask_all(host, requests):
        [answer] = completion.choices
        assert answer.finish_reason == "tool_calls" and answer.message.content is None
        [call] = answer.message.tool_calls
        assert call.function.name == "look"
        assert len(json.loads(call.function.arguments)["where"]) <= 5


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "'json_schema'"),
        ({"response_format": "json"}, "response_format", "object"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "required"),
        (
            {"response_format": {**person_format(), "type": "json_object"}},
            "response_format.json_schema",
            "only possible",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "required",
        ),
        (
            {
                "response_format": person_format(),
                "continue_final_message": True,
                "messages": [{"role": "assistant", "content": "{"}],
            },
            "response_format",
            "continues",
        ),
        ({"response_format": person_format({"type": "strin"})}, "response_format", "Invalid type"),
    ],
)
def test_a_wrong_format_is_a_400_that_says_why(
    changes: dict[str, Any], param: str, says: str
) -> None:
    response = post(**changes)
    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == param
    assert says in error_of(response)["message"]


def test_text_is_what_it_always_was() -> None:
    assert post(response_format={"type": "text"}).status_code == 200


def test_without_the_extra_the_400_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    host = make_host()

    async def run() -> list[httpx2.Response]:
        async with http_client(host) as client:
            base = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
            return [
                await client.post("/v1/chat/completions", json={**base, **changes})
                for changes in ({"response_format": {"type": "json_object"}}, {})
            ]

    refused, served = asyncio.run(run())
    assert refused.status_code == 400 and served.status_code == 200
    assert "pip install 'pilothouse[structured]'" in error_of(refused)["message"]
    assert error_of(refused)["param"] == "response_format"


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_grows_too_complex_on_the_way_is_the_requests_own_mistake(
    host: Host, stream: bool
) -> None:
    many = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(900)}}
    response = post(
        host=host, response_format=person_format(many), seed=1, max_tokens=90, stream=stream
    )
    if stream:
        *_, last, done = events(response)
        error = last["error"]
        assert done == "[DONE]"
    else:
        assert response.status_code == 400
        error = error_of(response)
    assert error["param"] == "response_format" and "simpler schema" in error["message"]
