"""Flags before variables before the file, and one line for every mistake."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
from pathlib import Path

import pytest

from server.settings import Settings, SettingsError, flag, load_settings


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PILOTHOUSE_")]:
        monkeypatch.delenv(name)


def test_flags_beat_variables_which_beat_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pilothouse.toml"
    file.write_text('port = 1\nmax_num_seqs = 1\nmax_waiting = 1\nprofile = ["a", "b"]\n')
    monkeypatch.setenv("PILOTHOUSE_PORT", "2")
    monkeypatch.setenv("PILOTHOUSE_MAX_NUM_SEQS", "2")
    settings = load_settings({"config": str(file), "port": "3"})
    assert (settings.port, settings.max_num_seqs, settings.max_waiting) == (3, 2, 1)
    assert settings.profile == [Path("a"), Path("b")]
    assert settings.host == "127.0.0.1"


def test_the_file_may_be_named_by_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "pilothouse.toml"
    file.write_text("port = 5\n")
    monkeypatch.setenv("PILOTHOUSE_CONFIG", str(file))
    assert load_settings().port == 5


def test_several_profiles_fit_in_one_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PILOTHOUSE_PROFILE", os.pathsep.join(["a.safetensors", "dir"]))
    assert load_settings().profile == [Path("a.safetensors"), Path("dir")]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"port": "x"}, "'--port' should be a valid integer"),
        ({"port": "70000"}, "'--port' should be less than or equal to 65535 (got \"70000\")"),
        ({"max_num_seqs": "0"}, "'--max-num-seqs' should be greater than or equal to 1"),
        ({"dtype": "int8"}, "'--dtype' should be 'auto', 'float32'"),
        ({"host": "0.0.0.0"}, "--host 0.0.0.0 can be reached by others"),
        ({"host": "example.org"}, "--insecure"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(flags: dict[str, str], says: str) -> None:
    with pytest.raises(SettingsError) as error:
        load_settings(flags)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_loopback_is_open_and_other_addresses_need_the_word() -> None:
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        assert load_settings({"host": host}).host == host
    assert load_settings({"host": "0.0.0.0", "insecure": True}).insecure


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prot = 1", "unknown setting 'prot'"),
        ("port = ", "is not TOML"),
        ("port = 'x'", "'--port' should be a valid integer"),
    ],
)
def test_a_file_with_a_mistake_is_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "pilothouse.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=says):
        load_settings({"config": str(file)})


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot read --config"):
        load_settings({"config": str(tmp_path / "none.toml")})


def test_every_setting_says_what_it_is_for() -> None:
    assert all(field.description for field in Settings.model_fields.values())


def with_vllm(monkeypatch: pytest.MonkeyPatch, *, installed: bool) -> None:
    spec = importlib.machinery.ModuleSpec("vllm", None) if installed else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"fold": "bold"}, "--fold is for the local engine: .*pilothouse export --format hf"),
        ({"threads": "2"}, "--threads is for the local engine"),
        ({"prefill_chunk": "64"}, "--prefill-chunk .*max_num_batched_tokens"),
        ({"device": "cuda"}, "--device is for the local engine"),
        ({"prefix_cache_mib": "64"}, "--prefix-cache-mib can only be 0"),
        ({"vllm_args": "{"}, "--vllm-args is not JSON"),
        ({"vllm_args": "[1]"}, "--vllm-args must be a JSON object"),
        ({"tensor_parallel_size": "0"}, "'--tensor-parallel-size' should be greater than or equal"),
        ({"gpu_memory_utilization": "1.5"}, "'--gpu-memory-utilization' should be less than"),
    ],
)
def test_vllm_refuses_what_only_the_local_engine_knows(
    flags: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_vllm(monkeypatch, installed=True)
    with pytest.raises(SettingsError, match=says):
        load_settings({"engine": "vllm", **flags})


@pytest.mark.parametrize(
    "flags",
    [
        {"tensor_parallel_size": "2"},
        {"pipeline_parallel_size": "2"},
        {"data_parallel_size": "2"},
        {"max_site_rank": "64"},
        {"steer_site": ["1.resid_post"]},
        {"gpu_memory_utilization": "0.5"},
        {"enforce_eager": True},
        {"vllm_args": '{"seed": 1}'},
    ],
)
def test_the_local_engine_refuses_what_only_vllm_knows(
    flags: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    [name] = flags
    with pytest.raises(SettingsError, match=f"{flag(name)} is for --engine vllm"):
        load_settings(flags)
    with_vllm(monkeypatch, installed=True)
    assert load_settings({"engine": "vllm", **flags}).engine == "vllm"


def test_what_is_the_default_is_no_contradiction(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings({"tensor_parallel_size": "1", "vllm_args": "{}"}).engine == "local"
    with_vllm(monkeypatch, installed=True)
    settings = load_settings({"engine": "vllm", "device": "auto", "prefix_cache_mib": "0"})
    assert settings.prefix_cache_mib == 0


def test_vllm_that_is_not_installed_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with_vllm(monkeypatch, installed=False)
    with pytest.raises(SettingsError, match=r"pip install 'pilothouse\[vllm\]'"):
        load_settings({"engine": "vllm"})


def test_vllms_arguments_come_as_json_or_as_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_vllm(monkeypatch, installed=True)
    monkeypatch.setenv("PILOTHOUSE_STEER_SITE", "1.attn_out *.resid_post")
    file = tmp_path / "pilothouse.toml"
    file.write_text('engine = "vllm"\n[vllm_args]\nseed = 1\n')
    settings = load_settings({"config": str(file)})
    assert settings.vllm_args == {"seed": 1}
    assert settings.steer_site == ["1.attn_out", "*.resid_post"]
    assert load_settings({"engine": "vllm", "vllm_args": '{"seed": 2}'}).vllm_args == {"seed": 2}
