"""Profiles that come and go while the server runs."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import save
from torch import Tensor

from server.access import Access
from server.audit import AuditLog
from server.auth import hash_secret
from server.engine.local import LocalEngine
from server.hosting import Host, RegistrationLimits
from server.profiles import ProfileStore
from steering.edit import edits_digest
from steering.plan import Step
from steering.profile import Profile
from tests.conftest import make_model
from tests.reference import greedy
from tests.server.fakes import FakeEngine, body, error_of, http_client, make_host, make_profile
from tests.server.live import live_server, wait_until
from tests.server.test_hosting import make_monitor
from tests.steering.edits import random_edit, random_gate

URL = "/v1/steering/profiles"
BINARY = {"Content-Type": "application/octet-stream"}


def make(name: str = "new", **changes: Any) -> Profile:
    edits = (
        random_edit("2.attn_out", 2, seed=5),
        random_edit("3.resid_pre", seed=6, gate=random_gate("1.resid_pre")),
    )
    return make_profile(name, **{"edits": edits, **changes})


def file_of(profile: Profile, path: Path) -> bytes:
    return profile.save(path / "profile.safetensors").read_bytes()


def real_host(limits: RegistrationLimits | None = None, **store: Any) -> Host:
    lm = make_model("llama")
    engine = LocalEngine(
        lm, max_num_seqs=4, max_model_len=128, monitor=make_monitor(lm), prefill_chunk=16
    )
    host = make_host(engine, **store)
    return replace(host, registration=limits or RegistrationLimits())


class Client:
    def __init__(self, http: httpx2.AsyncClient, host: Host) -> None:
        self.http = http
        self.host = host

    async def upload(self, data: bytes, query: str = "") -> httpx2.Response:
        return await self.http.post(URL + query, content=data, headers=BINARY)

    async def named(self, **asked: Any) -> httpx2.Response:
        return await self.http.post(URL, json=asked)

    async def ask(self, **changes: Any) -> httpx2.Response:
        defaults = {"temperature": 0, "max_tokens": 8}
        return await self.http.post("/v1/chat/completions", json=body(**{**defaults, **changes}))

    async def names(self) -> list[str]:
        return [card["name"] for card in (await self.http.get(URL)).json()["data"]]

    @property
    def hooked(self) -> set[str]:
        assert isinstance(self.host.engine, LocalEngine)
        return set(map(str, self.host.engine._steering.attached))


@asynccontextmanager
async def client_of(host: Host) -> AsyncIterator[Client]:
    async with http_client(host) as http:
        yield Client(http, host)


def text(profile: Profile | None, content: str = "Hi", tokens: int = 8) -> str:
    """What the model answers, computed without engine and plan, while no engine is at work."""
    lm = make_model("llama")
    prompt = lm.encode_chat([{"role": "user", "content": content}])
    edits = profile.applied() if profile else ()
    found = greedy(lm, prompt, edits, tokens)
    return str(lm.tokenizer.decode(found, skip_special_tokens=True))


def content(response: httpx2.Response) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def test_an_uploaded_profile_is_served_like_the_others(tmp_path: Path) -> None:
    profile = make(card={"summary": "Test."}, provenance={"seed": 3}, red_team=True)

    async def run() -> None:
        async with client_of(real_host()) as client:
            created = await client.upload(file_of(profile, tmp_path))
            assert created.status_code == 201, created.text
            card = created.json()
            assert (card["fingerprint"], card["method"]) == (profile.fingerprint, "llm_va")
            assert card["card"] == {"summary": "Test."} and card["provenance"] == {"seed": 3}
            assert card["red_team"] is True and len(card["edits"]) == 2
            assert card == (await client.http.get(f"{URL}/new")).json()
            assert await client.names() == ["raw", "bold", "shy", "new"]
            models = (await client.http.get("/v1/models")).json()["data"]
            assert "tiny:new" in [model["id"] for model in models]
            assert (await client.http.get("/v1/models/tiny:new")).json()["profile"] == "new"
            assert content(await client.ask(model="tiny:new")) == text(profile)
            assert content(await client.ask()) == text(None)
            again = await client.upload(file_of(profile, tmp_path), "?name=other")
            assert again.status_code == 201 and again.json()["name"] == "other"

    asyncio.run(run())


def test_a_removed_profile_is_gone_with_hooks_tensors_and_series(tmp_path: Path) -> None:
    async def run() -> None:
        async with client_of(real_host()) as client:
            before = client.hooked
            await client.upload(file_of(make(), tmp_path))
            assert client.hooked - before == {"2.attn_out", "3.resid_pre", "1.resid_pre"}
            profile = weakref.ref(client.host.profiles.resolve("new").edits[0])
            await client.ask(model="tiny:new")
            assert await series(client, "new")
            removed = await client.http.delete(f"{URL}/new")
            assert removed.status_code == 200
            assert removed.json() == {
                "name": "new",
                "object": "steering.profile.deleted",
                "deleted": True,
            }
            for gone in (
                await client.ask(model="tiny:new"),
                await client.http.get(f"{URL}/new"),
                await client.http.delete(f"{URL}/new"),
            ):
                assert gone.status_code == 404
            assert client.hooked == before
            gc.collect()
            assert profile() is None
            assert not await series(client, "new")
            assert await series(client, "bold")
            assert (await client.upload(file_of(make(), tmp_path))).status_code == 201
            assert content(await client.ask(model="tiny:new")) == text(make())

    asyncio.run(run())


async def series(client: Client, profile: str) -> list[str]:
    page = (await client.http.get("/metrics")).text
    return [
        sample.name
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.labels.get("profile") == profile
    ]


def test_series_of_a_new_profile_exist_before_its_first_request(tmp_path: Path) -> None:
    async def run() -> None:
        async with client_of(real_host()) as client:
            await client.upload(file_of(make(), tmp_path))
            assert sorted(await series(client, "new")) == sorted(await series(client, "bold"))
            assert "steering_profile_info" in await series(client, "new")

    asyncio.run(run())


def test_requests_under_way_and_queued_finish_with_the_profile_they_started_with(
    tmp_path: Path,
) -> None:
    profile, tokens = make(), 60
    expected = text(profile, tokens=tokens)

    async def run() -> None:
        async with client_of(real_host()) as client:
            before = client.hooked
            await client.upload(file_of(profile, tmp_path))
            asked = [
                asyncio.create_task(client.ask(model="tiny:new", max_tokens=tokens))
                for _ in range(6)  # of which four have a slot
            ]
            while client.host.engine.stats().running + client.host.engine.stats().waiting < 6:
                await asyncio.sleep(0.001)
            assert (await client.http.delete(f"{URL}/new")).status_code == 200
            assert (await client.ask(model="tiny:new")).status_code == 404
            other = make("new", strength=-0.5)
            assert (await client.upload(file_of(other, tmp_path))).status_code == 201
            for response in await asyncio.gather(*asked):
                assert content(response) == expected
                assert response.json()["steering"]["fingerprint"] == profile.fingerprint
            assert content(await client.ask(model="tiny:new")) == text(other)
            await client.http.delete(f"{URL}/new")
            assert client.hooked == before
            assert not await series(client, "new")

    asyncio.run(run())


@pytest.mark.parametrize("name", ["raw", "bold", "none"])
def test_the_default_profile_and_raw_stay(name: str) -> None:
    async def run() -> None:
        async with client_of(real_host(default="bold")) as client:
            response = await client.http.delete(f"{URL}/{name}")
            assert response.status_code == (404 if name == "none" else 409)
            assert error_of(response)["param"] == "name"
            assert await client.names() == ["raw", "bold", "shy"]

    asyncio.run(run())


@pytest.mark.parametrize("name", ["raw", "bold"])
def test_a_name_that_is_taken_is_a_409(name: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with client_of(real_host()) as client:
            response = await client.upload(file_of(make(), tmp_path), f"?name={name}")
            assert response.status_code == 409
            assert error_of(response)["param"] == "name"
            identity = Profile("raw", "raw", card={"summary": "Mine."})
            assert (await client.upload(file_of(identity, tmp_path))).status_code == 409
            assert client.host.profiles.resolve("raw").card != {"summary": "Mine."}

    asyncio.run(run())


@pytest.mark.parametrize(
    "name", ["", "../x", "a/b", "A", "a b", "a+b", "x" * 65, "composed", "restricted", "%00", "a:b"]
)
def test_a_name_that_would_mislead_is_a_400(name: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with client_of(real_host()) as client:
            response = await client.http.post(
                URL, params={"name": name}, content=file_of(make(), tmp_path), headers=BINARY
            )
            assert response.status_code == 400, response.text
            assert await client.names() == ["raw", "bold", "shy"]

    asyncio.run(run())


def nan_weights(data: bytes) -> bytes:
    return data[:-4] + b"\xff\xff\xff\xff"


def pickled(data: bytes) -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(3)}, buffer)
    return buffer.getvalue()


def with_summary(data: bytes, json_text: bytes) -> bytes:
    """The same file with other JSON for its card's summary, which was "a test"."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    meta = header["__metadata__"]["pilothouse"].replace('"a test"', json_text.decode())
    header["__metadata__"]["pilothouse"] = meta
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "truncated": lambda data: data[:-10],
    "a header alone": lambda data: data[:200],
    "NaN weights": nan_weights,
    "pickle": pickled,
    "another method": lambda data: data.replace(b"llm_va", b"llm_vb"),
    "another base": lambda data: data.replace(b"llama", b"qwen2"),
    "other weights": lambda data: data.replace(
        make_model("llama").fingerprint.weights.encode(), b"0" * 64
    ),
    "no profile": lambda data: save({"x": torch.zeros(3)}),
    "more after the end": lambda data: data + b"x",
    "half a character": lambda data: with_summary(data, b'"\\ud800"'),
    "deep": lambda data: with_summary(data, b"[" * 99 + b"]" * 99),
    "deeper": lambda data: with_summary(data, b"[" * 99_999 + b"]" * 99_999),
    "a huge number": lambda data: with_summary(data, b"1" * 5000),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_no_sound_profile_of_this_model_is_a_400(
    damage: str, tmp_path: Path
) -> None:
    data = file_of(make(card={"summary": "a test"}), tmp_path)
    broken = DAMAGE[damage](data)
    assert broken != data

    async def run() -> None:
        async with client_of(real_host()) as client:
            before = client.hooked
            response = await client.upload(broken)
            assert response.status_code == 400, response.text
            error = error_of(response)
            assert error["code"] == "invalid_profile" and "\n" not in error["message"]
            assert await client.names() == ["raw", "bold", "shy"]
            assert client.hooked == before

    asyncio.run(run())


@pytest.mark.parametrize("dimension", [32, 128])
def test_another_hidden_size_is_a_400(dimension: int, tmp_path: Path) -> None:
    edit = random_edit("1.resid_post")
    wrong = replace(
        edit,
        read=torch.zeros(dimension, 1),
        write=torch.zeros(dimension, 1),
        shift=torch.zeros(dimension),
    )

    async def run() -> None:
        async with client_of(real_host()) as client:
            response = await client.upload(file_of(make(edits=(wrong,)), tmp_path))
            assert response.status_code == 400 and "hidden size" in error_of(response)["message"]
            wide = random_edit("1.resid_post", 65)
            response = await client.upload(file_of(make(edits=(wide,)), tmp_path))
            assert response.status_code == 400 and "rank" in error_of(response)["message"]

    asyncio.run(run())


def test_a_profile_that_overflows_the_model_or_is_not_applied_is_a_400(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = make(edits=(random_edit("1.resid_post", scale=1e25),), strength=1e10)

    async def run() -> None:
        async with client_of(real_host()) as client:
            before = client.hooked
            response = await client.upload(file_of(huge, tmp_path))
            assert response.status_code == 400
            assert "self-test" in error_of(response)["message"]
            edit = Step._edit
            with monkeypatch.context() as patched:

                def off(self: Step, stack: Any, x: Tensor) -> Tensor:
                    return x + (edit(self, stack, x) - x) * 1.01

                patched.setattr(Step, "_edit", off)
                response = await client.upload(file_of(make(), tmp_path))
            assert response.status_code == 400
            assert "is not the edit's" in error_of(response)["message"]
            assert await client.names() == ["raw", "bold", "shy"]
            assert client.hooked == before
            assert content(await client.ask()) == text(None)

    asyncio.run(run())


def test_a_profile_is_named_by_a_path_inside_the_folder_and_by_no_other(tmp_path: Path) -> None:
    folder, outside = tmp_path / "profiles", tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    outside.mkdir()
    make("fine").save(folder / "fine.safetensors")
    make("deep").save(folder / "sub" / "deep.safetensors")
    make("secret").save(outside / "secret.safetensors")
    make("secret").save(tmp_path / "profiles-secret.safetensors")
    (folder / "away.safetensors").symlink_to(outside / "secret.safetensors")
    (folder / "folder").symlink_to(outside)
    (folder / "alias.safetensors").symlink_to("sub/deep.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / "directory.safetensors").mkdir()
    os.mkfifo(folder / "pipe.safetensors")
    (folder / "fine.pt").write_bytes((folder / "fine.safetensors").read_bytes())

    async def run() -> None:
        async with client_of(real_host(RegistrationLimits(folder))) as client:
            for path in (
                "../outside/secret.safetensors",
                "sub/../../outside/secret.safetensors",
                "../profiles-secret.safetensors",
                "sub/../fine.safetensors",
                str(outside / "secret.safetensors"),
                str(folder / "fine.safetensors"),
                "away.safetensors",
                "folder/secret.safetensors",
                "loop.safetensors",
                "directory.safetensors",
                "pipe.safetensors",
                "none.safetensors",
                "fine.pt",
                "fine.safetensors\0",
                "a\0.safetensors",
                "x" * 1000 + ".safetensors",
                "fine.safetensors/",
                "fine.safetensors/x.safetensors",
                "",
                ".",
                "~/x.safetensors",
            ):
                response = await client.named(path=path)
                assert response.status_code == 400, (path, response.text)
                assert error_of(response)["param"] == "path"
                assert str(tmp_path) not in error_of(response)["message"].replace(path or " ", "")
            assert await client.names() == ["raw", "bold", "shy"]
            assert (await client.named(path="fine.safetensors")).json()["name"] == "fine"
            assert (await client.named(path="sub/deep.safetensors")).json()["name"] == "deep"
            linked = await client.named(path="alias.safetensors", name="linked")
            assert linked.json()["name"] == "linked"

    asyncio.run(run())


def test_paths_need_a_folder() -> None:
    async def run() -> None:
        async with client_of(real_host()) as client:
            response = await client.named(path="x.safetensors")
            assert response.status_code == 403
            assert "--profile-dir" in error_of(response)["message"]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("raw", "kind", "param"),
    [
        (b"{}", "application/json", "path"),
        (b'{"path": 3}', "application/json", "path"),
        (b'{"path": "a.safetensors", "x": 1}', "application/json", "x"),
        (b"[]", "application/json", None),
        (b"{", "application/json", None),
        (b"\xff", "application/json", None),
        (b"x", "text/plain", None),
        (b"x", "", None),
        (b"x", "multipart/form-data; boundary=x", None),
    ],
)
def test_a_body_of_another_kind_is_a_400_that_says_what_to_send(
    raw: bytes, kind: str, param: str | None
) -> None:
    async def run() -> None:
        async with client_of(real_host(RegistrationLimits(Path()))) as client:
            response = await client.http.post(URL, content=raw, headers={"Content-Type": kind})
            assert response.status_code == 400, response.text
            assert error_of(response)["param"] == param

    asyncio.run(run())


def test_size_and_number_are_limited_before_any_work(tmp_path: Path) -> None:
    data = file_of(make(), tmp_path)
    limits = RegistrationLimits(tmp_path, max_profiles=4, max_bytes=len(data) - 1)

    async def run() -> None:
        async with client_of(real_host(limits)) as client:
            for response in (
                await client.upload(data),
                await client.named(path="profile.safetensors"),
            ):
                assert response.status_code == 413
                assert "--max-profile-bytes" in error_of(response)["message"]
        host = replace(real_host(replace(limits, max_bytes=len(data))), max_body_bytes=len(data))
        async with client_of(host) as client:
            assert (await client.upload(data + b"x")).status_code == 413
            assert (await client.upload(data)).status_code == 201
            full = await client.upload(data, "?name=one-more")
            assert full.status_code == 409
            assert error_of(full)["code"] == "too_many_profiles"
            await client.http.delete(f"{URL}/bold")
            assert (await client.upload(data, "?name=one-more")).status_code == 201

    asyncio.run(run())


def test_nothing_is_registered_where_weights_are_folded(tmp_path: Path) -> None:
    data = file_of(make(), tmp_path)

    async def run() -> None:
        async with client_of(real_host(folded="bold")) as client:
            response = await client.upload(data)
            assert response.status_code == 409 and "--fold" in error_of(response)["message"]
            assert (await client.http.delete(f"{URL}/shy")).status_code == 409

    asyncio.run(run())


def test_an_engine_without_room_is_a_conflict_until_a_profile_is_removed(tmp_path: Path) -> None:
    data = file_of(make(), tmp_path)

    async def run() -> None:
        async with client_of(make_host(FakeEngine(room=1))) as client:
            assert (await client.upload(data, "?name=one")).status_code == 201
            full = await client.upload(data, "?name=two")
            assert (full.status_code, error_of(full)["code"]) == (409, "rank_limit")
            assert "registered already" in error_of(full)["message"]
            assert await client.names() == ["raw", "bold", "shy", "one"]
            assert (await client.http.delete(f"{URL}/one")).status_code == 200
            assert (await client.upload(data, "?name=two")).status_code == 201

    asyncio.run(run())


def test_many_at_once_are_told_to_come_back_and_none_is_lost(tmp_path: Path) -> None:
    data = file_of(make(), tmp_path)

    async def run() -> None:
        async with client_of(real_host()) as client:
            tasks = [client.upload(data, f"?name=new-{i}") for i in range(12)]
            responses = await asyncio.gather(*tasks)
            made = [r.json()["name"] for r in responses if r.status_code == 201]
            turned_down = [r for r in responses if r.status_code == 429]
            assert len(made) + len(turned_down) == 12 and made
            assert all(r.headers["Retry-After"] for r in turned_down)
            assert await client.names() == ["raw", "bold", "shy", *made]

    asyncio.run(run())


def test_the_store_shows_every_reader_a_whole_state() -> None:
    store = ProfileStore(make_model("llama"), "tiny", [make_profile("bold")])
    profiles = [make_profile(f"p{i}") for i in range(4)]
    stop, failures = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                names = store.names
                assert names[:2] == ["raw", "bold"] and len(set(names)) == len(names)
                [store.card(profile) for profile in store]
            except BaseException as error:
                failures.append(error)
                return

    def write(profile: Profile) -> None:
        for _ in range(200):
            store.add(profile)
            assert store.resolve(profile.name) is profile
            store.remove(profile.name)

    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [threading.Thread(target=write, args=(profile,)) for profile in profiles]
    for thread in readers + writers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    for thread in readers:
        thread.join()
    assert not failures and store.names == ["raw", "bold"]


def test_traffic_does_not_notice_profiles_that_come_and_go(tmp_path: Path) -> None:
    """Over sockets, with the official client: every reply is the one of the model alone."""
    data = file_of(make(), tmp_path)
    nan = nan_weights(data)
    asked = {f"{name}:{i}": (name, f"Question {i}") for name in ("raw", "bold") for i in range(4)}
    expected = {
        key: text(None if name == "raw" else make_profile("bold"), content, 24)
        for key, (name, content) in asked.items()
    }
    new = text(make(), tokens=24)
    host = real_host()
    failures: list[Any] = []
    stop = threading.Event()
    replies = [0]

    with live_server(host) as address:

        def traffic(offset: int) -> None:
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
            keys = list(asked)
            i = offset
            while not stop.is_set():
                key = keys[i % len(keys)]
                name, question = asked[key]
                try:
                    found = client.chat.completions.create(
                        model=f"tiny:{name}",
                        messages=[{"role": "user", "content": question}],
                        temperature=0,
                        max_tokens=24,
                    )
                    assert found.choices[0].message.content == expected[key]
                    replies[0] += 1
                except BaseException as error:
                    failures.append(error)
                    return
                i += 1

        threads = [threading.Thread(target=traffic, args=(k,)) for k in range(3)]
        for thread in threads:
            thread.start()
        with httpx2.Client(base_url=address, timeout=60) as admin:
            wait_until(lambda: replies[0] > 3 or bool(failures))
            for i in range(8):
                name = f"new-{i}"
                made = admin.post(f"{URL}?name={name}", content=data, headers=BINARY)
                assert made.status_code == 201, made.text
                assert admin.post(URL, content=nan, headers=BINARY).status_code == 400
                with admin.stream(
                    "POST",
                    "/v1/chat/completions",
                    json=body(model=f"tiny:{name}", stream=True, temperature=0, max_tokens=24),
                ) as stream:
                    lines = stream.iter_lines()
                    next(lines)
                    with httpx2.Client(base_url=address, timeout=60) as other:
                        assert other.delete(f"{URL}/{name}").status_code == 200
                    chunks = [json.loads(x[6:]) for x in lines if x.startswith("data: {")]
                told = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
                assert told == new
        count = replies[0]
        wait_until(lambda: replies[0] > count + 3 or bool(failures))
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures, failures


FUZZED = 600


@settings(
    max_examples=FUZZED,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def _fuzz(client: Client, loop: asyncio.AbstractEventLoop, whole: bytes, data: Any) -> None:
    broken = data.draw(_files(whole))
    response = loop.run_until_complete(client.upload(broken))
    assert response.status_code in (201, 400, 409), response.text
    if response.status_code == 201:
        name = response.json()["name"]
        assert loop.run_until_complete(client.http.get(URL)).status_code == 200
        answer = loop.run_until_complete(client.ask(model=f"tiny:{name}", max_tokens=2))
        assert answer.status_code == 200, answer.text
        assert loop.run_until_complete(client.http.delete(f"{URL}/{name}")).status_code == 200
    else:
        error_of(response)


@st.composite
def _files(draw: Any, whole: bytes) -> bytes:
    """A profile file with bytes changed, its JSON changed, or its tensors changed."""
    size = int.from_bytes(whole[:8], "little")
    header, tensors = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    kind = draw(st.sampled_from(("bytes", "noise", "outer", "inner")))
    if kind == "noise":
        return bytes(draw(st.binary(max_size=300)))
    if kind == "bytes":
        changed = bytearray(whole)
        for at in draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=8)):
            changed[at] = draw(st.integers(0, 255))
        return bytes(
            changed[: draw(st.integers(0, len(whole)))] if draw(st.booleans()) else changed
        )
    target = header
    if kind == "inner":
        target = json.loads(header["__metadata__"]["pilothouse"])
    _change(draw, target)
    if kind == "inner":
        header["__metadata__"]["pilothouse"] = json.dumps(target)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tensors


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(
        [0, -1, 2**63, 10**400, 1e308, "\ud800", "", "F64", "I64", "C64", "U8", "BOOL"]
    )
    | st.sampled_from(
        ["prompt", "0.resid_post", "99.resid_post", "1.attn_add", "last_prompt_token"]
    )
    | st.text(max_size=5),
    lambda child: st.lists(child, max_size=3) | st.dictionaries(st.text(max_size=3), child),
    max_leaves=5,
)


def _change(draw: Any, value: Any) -> None:
    """Replace, drop or add something somewhere below a dictionary."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        below = value[key]
        if isinstance(below, dict | list) and below and draw(st.integers(0, 3)):
            value = below
            continue
        if isinstance(value, dict) and not draw(st.integers(0, 4)):
            del value[key]
        else:
            value[key] = draw(_JSON)
        return


def test_no_profile_file_breaks_the_server(tmp_path: Path) -> None:
    whole = file_of(make(card={"held_out": {"f1": 0.5}}, provenance={"x": [1]}), tmp_path)
    with asyncio.Runner() as runner:
        context = client_of(real_host())
        client = runner.run(context.__aenter__())
        try:
            _fuzz(client, runner.get_loop(), whole)
            assert content(runner.run(client.ask())) == text(None)
            assert runner.run(client.names()) == ["raw", "bold", "shy"]
        finally:
            runner.run(context.__aexit__(None, None, None))


def test_a_composition_with_a_new_profile_is_its_edits_in_order(tmp_path: Path) -> None:
    async def run() -> None:
        async with client_of(real_host()) as client:
            await client.upload(file_of(make(), tmp_path))
            answer = await client.ask(steering={"profiles": [{"name": "new"}, {"name": "bold"}]})
            edits = [*make().applied(), *make_profile("bold").applied()]
            assert answer.json()["steering"]["fingerprint"] == edits_digest(edits)
            lm = make_model("llama")
            tokens = greedy(lm, lm.encode_chat(body()["messages"]), edits, 8)
            assert content(answer) == lm.tokenizer.decode(tokens, skip_special_tokens=True)

    asyncio.run(run())


def test_an_admin_key_changes_only_what_exists_for_it(tmp_path: Path) -> None:
    """And the audit log says who registered and removed what."""
    hidden = make("hidden", red_team=True)
    host = real_host(profiles=[hidden])
    keys = {"plain": ["*"], "red": ["*", "hidden", "mine"]}
    entries = [
        {
            "id": id,
            "sha256": hash_secret(f"ph-{id}"),
            "scopes": ["admin", "chat"],
            "profiles": names,
        }
        for id, names in keys.items()
    ]
    log = tmp_path / "audit.jsonl"
    host.access = Access(json.dumps(entries), audit=AuditLog(log))
    plain, red = ({"Authorization": f"Bearer ph-{id}"} for id in keys)
    mine = file_of(make("mine", red_team=True), tmp_path)
    taken = file_of(make("hidden"), tmp_path)

    async def run() -> None:
        async with http_client(host) as http:
            refused = await http.delete(f"{URL}/hidden", headers=plain)
            unknown = await http.delete(f"{URL}/nobody", headers=plain)
            for response in (refused, unknown):
                name = response.url.path.rpartition("/")[2]
                assert response.status_code == 404
                assert error_of(response)["message"] == (
                    f"There is no profile {name!r}. There is raw."
                )
            assert "hidden" in (await http.get(URL, headers=red)).text

            refused = await http.post(URL, content=mine, headers=plain | BINARY)
            assert (refused.status_code, error_of(refused)["param"]) == (403, "name")
            refused = await http.post(URL, content=taken, headers=plain | BINARY)
            assert refused.status_code == 409 and "remove" not in refused.text
            refused = await http.post(URL, content=taken, headers=red | BINARY)
            assert refused.status_code == 409 and "remove" in refused.text

            assert (await http.post(URL, content=mine, headers=red | BINARY)).status_code == 201
            assert "mine" not in (await http.get(URL, headers=plain)).text
            assert (await http.delete(f"{URL}/mine", headers=red)).status_code == 200

    asyncio.run(run())
    notes = [json.loads(line) for line in log.read_text().splitlines()]
    done = [note for note in notes if note["outcome"] != "rejected"]
    assert [(note["outcome"], note["key"], note["profile"]) for note in done] == [
        ("registered", "red", "mine"),
        ("removed", "red", "mine"),
    ]
    assert all(note["red_team"] and note["fingerprint"] for note in done)


def test_what_a_refused_registration_asked_for_is_in_the_audit_log(tmp_path: Path) -> None:
    host = real_host()
    log = tmp_path / "audit.jsonl"
    host.access = Access(audit=AuditLog(log))

    async def run() -> None:
        async with client_of(host) as client:
            await client.upload(b"", "?name=empty")
            await client.named(path="x.safetensors", name="y")

    asyncio.run(run())
    asked = [json.loads(line)["asked"] for line in log.read_text().splitlines()]
    assert asked == [{"profile": "empty"}, {"path": "x.safetensors", "name": "y"}]
