"""Keys: what they permit, how they are found, kept and counted."""

from __future__ import annotations

import json
import secrets
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.auth import Key, KeyRing, KeysError, bearer, hash_secret, new_secret, parse_keys
from server.cli import main
from server.errors import RateLimitError
from server.keyfile import create_key, make_key, read_keys, revoke_key
from server.quota import Quota, TokenBucket, duration
from tests.server.fakes import make_profile

BOLD = make_profile("bold")
RED = make_profile("unbound", red_team=True)


def key(id: str = "ci", secret: str = "ph-x", **fields: Any) -> Key:
    return Key(id=id, sha256=hash_secret(secret), **fields)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("profiles", "bold", "red"),
    [
        (("*",), True, False),
        (("*", "unbound"), True, True),
        (("unbound",), False, True),
        (("bold",), True, False),
        ((), False, False),
    ],
)
def test_a_red_team_profile_is_permitted_only_by_name(
    profiles: tuple[str, ...], bold: bool, red: bool
) -> None:
    it = key(profiles=profiles)
    assert it.permits((BOLD,)) is bold and it.permits((RED,)) is red
    assert it.permits((BOLD, RED)) is (bold and red)
    assert it.permits(())


def test_secrets_are_long_random_and_found_by_their_hash() -> None:
    drawn = {new_secret() for _ in range(50)}
    assert len(drawn) == 50 and all(s.startswith("ph-") and len(s) >= 3 + 43 for s in drawn)
    ring = KeyRing([key("a", "ph-a"), key("b", "ph-b")])
    assert ring.find(b"ph-b") is ring.keys[1]
    for wrong in (b"", b"ph-", b"ph-c", b"ph-a ", hash_secret("ph-a").encode()):
        assert ring.find(wrong) is None


@pytest.mark.parametrize("token", [b"ph-0", b"ph-4", b"ph-none"])
def test_every_key_is_compared_in_constant_time_found_or_not(
    token: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []

    def compare(a: str, b: str) -> bool:
        compared.append(b)
        return real(a, b)

    real = secrets.compare_digest
    monkeypatch.setattr(secrets, "compare_digest", compare)
    ring = KeyRing([key(str(i), f"ph-{i}") for i in range(5)])
    ring.find(token)
    assert compared == [k.sha256 for k in ring.keys]


def test_an_expired_key_is_as_good_as_none() -> None:
    end = datetime(2030, 1, 1, tzinfo=UTC)
    ring = KeyRing([key(expires=end)])
    assert ring.find(b"ph-x", end - timedelta(seconds=1)) is not None
    assert ring.find(b"ph-x", end) is None


def entry(**changes: Any) -> dict[str, Any]:
    return {"id": "ci", "sha256": hash_secret("x"), **changes}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", "keys create"),
        ('{"key": []}', "keys create"),
        (json.dumps([3]), "keys[0]"),
        (json.dumps([entry(scope=["chat"])]), "'keys[0].scope' is not a key"),
        (json.dumps([entry(scopes=["root"])]), "keys[0].scopes"),
        (json.dumps([entry(scopes=[])]), "must not be empty"),
        (json.dumps([entry(sha256="ph-secret")]), "keys[0].sha256"),
        (json.dumps([entry(id="a b")]), "keys[0].id"),
        (json.dumps([entry(expires="2030-01-01T00:00:00")]), "timezone"),
        (json.dumps([entry(requests_per_minute=0)]), "requests_per_minute"),
        (json.dumps([entry(profiles=["bold", "Bold"])]), "keys[0].profiles[1]"),
        (json.dumps([entry(profiles=[""])]), "keys[0].profiles[0]"),
        (json.dumps([entry(), entry(sha256=hash_secret("y"))]), "two keys have the id of 'ci'"),
        (json.dumps([entry(), entry(id="b")]), "two keys have the secret of 'b'"),
    ],
)
def test_keys_that_make_no_sense_are_refused_in_one_line(text: str, says: str) -> None:
    with pytest.raises(KeysError) as error:
        parse_keys(text, "here")
    assert says in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("here") and "ph-secret" not in str(error.value)


def test_keys_survive_being_written_and_read() -> None:
    whole = key(
        scopes=frozenset({"chat", "admin"}),
        profiles=("*", "unbound"),
        expires=datetime(2030, 1, 1, tzinfo=UTC),
        tokens_per_minute=5,
    )
    for it in (whole, key()):
        assert parse_keys(json.dumps([it.to_json()]), "here").keys == (it,)


def test_a_file_holds_the_hash_only_and_is_its_owners(tmp_path: Path) -> None:
    file = tmp_path / "sub" / "keys.json"
    secret = create_key(file, "ci", scopes=["chat"])
    assert secret not in file.read_text() and hash_secret(secret) in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_keys(file).find(secret.encode()) is not None
    before = file.read_bytes()
    with pytest.raises(KeysError, match="already"):
        create_key(file, "ci")
    with pytest.raises(KeysError, match="there is ci"):
        revoke_key(file, "other")
    assert file.read_bytes() == before
    revoke_key(file, "ci")
    assert read_keys(file).keys == ()
    assert {path.name for path in file.parent.iterdir()} <= {"keys.json", "keys.json.lock"}


def test_a_broken_file_is_never_written_over(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    file.write_text("{")
    with pytest.raises(KeysError, match="not JSON"):
        create_key(file, "ci")
    assert file.read_text() == "{"


def test_keys_created_and_revoked_at_once_are_all_there(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    for i in range(5):
        create_key(file, f"old-{i}")

    def work(i: int) -> None:
        create_key(file, f"new-{i}")
        revoke_key(file, f"old-{i}")

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(work, range(5)))
    assert {key.id for key in read_keys(file).keys} == {f"new-{i}" for i in range(5)}


def test_processes_that_create_keys_at_once_lose_none(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    program = (
        "import sys; from pathlib import Path; from server.keyfile import create_key;"
        "[create_key(Path(sys.argv[1]), f'{sys.argv[2]}-{i}') for i in range(10)]"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(file), str(n)]) for n in range(3)
    ]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert len(read_keys(file).keys) == 30


def test_the_command_creates_lists_and_revokes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "keys.json"
    arguments = (
        "--scope chat --scope metrics --profile * --profile unbound --expires 90d "
        "--requests-per-minute 60 --tokens-per-minute 1000"
    ).split()
    assert main(["keys", "create", "ci", "--keys", str(file), *arguments]) == 0
    secret = capsys.readouterr().out.strip()
    made = read_keys(file).find(secret.encode())
    assert made is not None and made.scopes == {"chat", "metrics"}
    assert made.profiles == ("*", "unbound") and made.requests_per_minute == 60
    assert made.expires is not None
    assert timedelta(days=89) < made.expires - datetime.now(UTC) <= timedelta(days=90)
    create_key(file, "old", expires="2020-01-01T00:00:00Z")
    capsys.readouterr()
    assert main(["keys", "list", "--keys", str(file)]) == 0
    ci, old = capsys.readouterr().out.splitlines()
    assert "chat,metrics" in ci and "*,unbound" in ci and "1000 tokens/min" in ci
    assert "expired" in old and "expired" not in ci and secret not in ci
    assert main(["keys", "revoke", "old", "--keys", str(file)]) == 0
    assert [key.id for key in read_keys(file).keys] == ["ci"]
    capsys.readouterr()
    for arguments in (
        ["create", "a b", "--keys", str(file)],
        ["create", "b", "--keys", str(file), "--expires", "soon"],
        ["create", "b", "--keys", str(file), "--expires", "2020-01-01"],
        ["create", "b", "--keys", str(file), "--expires", "0d"],
        ["create", "b", "--keys", str(file), "--tokens-per-minute", "0"],
        ["revoke", "none", "--keys", str(file)],
        ["list", "--keys", str(tmp_path / "none.json")],
    ):
        assert main(["keys", *arguments]) == 2
        assert "pilothouse: error: " in capsys.readouterr().err


def test_without_a_file_the_entry_is_for_the_variable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "create", "ci"]) == 0
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("PILOTHOUSE_KEYS=")]
    value = line.removeprefix("PILOTHOUSE_KEYS='").removesuffix("'")
    assert parse_keys(value, "variable").find(captured.out.strip().encode()) is not None


@pytest.mark.parametrize(
    ("headers", "token"),
    [
        ([], None),
        ([(b"authorization", b"Bearer ph-x")], b"ph-x"),
        ([(b"Authorization", b"bearer   ph-x ")], b"ph-x"),
        ([(b"authorization", b"Basic ph-x")], b""),
        ([(b"authorization", b"ph-x")], b""),
        ([(b"authorization", b"Bearer ph-x")] * 2, b""),
    ],
)
def test_only_one_bearer_header_is_a_token(
    headers: list[tuple[bytes, bytes]], token: bytes | None
) -> None:
    assert bearer(headers) == token


@given(st.lists(st.binary(max_size=80), max_size=3))
def test_no_header_opens_the_door_that_is_not_the_key(values: list[bytes]) -> None:
    it, secret = make_key("ci")
    token = bearer([(b"authorization", value) for value in values])
    assert token is None or KeyRing([it]).find(token) is None
    assert KeyRing([it]).find(secret.encode()) == it


def test_a_bucket_holds_a_minute_and_refills_evenly() -> None:
    clock = Clock()
    bucket = TokenBucket(60, clock)
    assert [bucket.take(20) for _ in range(3)] == [0, 0, 0]
    assert bucket.take(5) == pytest.approx(5)
    clock.now += 5
    assert bucket.take(5) == 0
    clock.now += 1000
    assert bucket.level == 60


def test_what_is_larger_than_a_bucket_needs_a_full_one_and_leaves_a_debt() -> None:
    clock = Clock()
    bucket = TokenBucket(60, clock)
    assert bucket.take(1) == 0
    assert bucket.take(180) == pytest.approx(1)
    clock.now += 1
    assert bucket.take(180) == 0
    assert bucket.level == -120 and bucket.take(1) == pytest.approx(121)


@given(st.lists(st.tuples(st.integers(1, 200), st.floats(0, 30), st.floats(0, 1)), max_size=40))
def test_the_rate_holds_whatever_is_asked_when(asked: list[tuple[int, float, float]]) -> None:
    clock = Clock()
    quota = Quota(key(tokens_per_minute=60), clock)
    spent, largest = 0, 0
    for tokens, pause, share in asked:
        clock.now += pause
        try:
            charge = quota.reserve(tokens)
        except RateLimitError as error:
            wait = int(error.headers["Retry-After"])
            assert wait >= 1
            clock.now += wait
            charge = quota.reserve(tokens)  # what it says is enough
        used = int(tokens * share)
        charge.settle(used)
        charge.settle(0)  # only the first one counts
        spent, largest = spent + used, max(largest, tokens)
        assert spent <= 60 + (clock.now - 100) + max(0, largest - 60) + 1e-6


def test_a_key_without_limits_has_no_headers_and_no_end() -> None:
    quota = Quota(key())
    for _ in range(1000):
        quota.take_request()
        quota.reserve(10**6)
    assert quota.headers == {}


@pytest.mark.parametrize(
    ("seconds", "written"), [(0, "0ms"), (0.25, "250ms"), (1, "1s"), (1.5, "1.5s"), (360, "6m0s")]
)
def test_durations_are_written_as_openai_does(seconds: float, written: str) -> None:
    assert duration(seconds) == written


@pytest.mark.parametrize(
    "name", ["a", "0", "llm-va", "a.b_c", "a" * 64, "A", "", "-a", "a" * 65, "a b"]
)
def test_a_key_may_name_just_what_a_profile_may_be_called(name: str) -> None:
    def sound(make: Callable[[], object]) -> bool:
        try:
            make()
        except ValueError:
            return False
        return True

    assert sound(lambda: key(profiles=(name,))) == sound(lambda: make_profile(name))
