"""The command line: what it does, and that every mistake is one line that says what to do."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest
import torch

from server.cli import main, make_parser
from server.engine.local import LocalEngine
from server.hosting import open_host
from server.settings import Settings, flag, load_settings
from steering.edit import Edit, Site
from steering.judge import JUDGE_VERSION
from steering.models import LanguageModel
from steering.profile import Profile, ProfileError
from tests.conftest import make_model
from tests.server.fakes import make_profile


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("PILOTHOUSE_")]:
        monkeypatch.delenv(name)
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def rank_one(lm: LanguageModel, name: str) -> Profile:
    """A profile that can be folded."""
    d = lm.sites.hidden_size
    generator = torch.Generator().manual_seed(3)
    read, write = torch.randn(2, d, 1, generator=generator)
    edit = Edit(Site(1, "mlp_out"), read / read.norm(), write / 4, torch.zeros(d))
    return Profile(name, "llm_va", edits=(edit,), base=lm.fingerprint)


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a failing command prints."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "pilothouse: error: " in line]
    assert len(lines) == 1 and "Traceback" not in captured.err
    return lines[0]


def test_every_setting_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["serve", "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for name in Settings.model_fields:
        assert flag(name) in text


def test_flags_become_settings() -> None:
    arguments = make_parser().parse_args(
        ["serve", "--profile", "a", "--profile", "b", "--port", "5", "--insecure"]
    )
    given = {k: v for k, v in vars(arguments).items() if k in Settings.model_fields}
    assert given == {"profile": ["a", "b"], "port": "5", "insecure": True}
    assert load_settings(given).profile == [Path("a"), Path("b")]


def test_serving_refuses_what_cannot_work(
    capsys: pytest.CaptureFixture[str], model_path: Path, saved: LanguageModel, tmp_path: Path
) -> None:
    serve = ("serve", "--port", 0)
    model = (*serve, "--model", model_path)
    profile = rank_one(saved, "bold").save(tmp_path / "bold.safetensors")
    foreign = make_profile("bold", make_model("qwen2")).save(tmp_path / "other.safetensors")
    for arguments, says in (
        ((*serve, "--model", tmp_path / "none"), "there is no directory"),
        ((*model, "--profile", tmp_path / "none"), "no profile file at"),
        ((*model, "--profile", foreign), "does not fit"),
        ((*model, "--profile", profile, "--profile", profile), "already"),
        ((*model, "--profile", profile, "--default-profile", "x"), "only raw, bold"),
        ((*model, "--profile", profile, "--fold", "x"), "only raw, bold"),
        ((*model, "--device", "quantum"), "--device quantum"),
        ((*model, "--max-model-len", 10**6), "--max-model-len"),
        (("serve", "--host", "0.0.0.0"), "--insecure"),
        (("serve", "--port", "x"), "valid integer"),
        (("serve", "--config", tmp_path / "none.toml"), "cannot read"),
    ):
        assert says in fails(capsys, *arguments), arguments


def test_a_port_in_use_is_found_before_the_model_is_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = fails(capsys, "serve", "--model", "/no/such/model", "--port", port)
    assert f"127.0.0.1:{port}" in line and "another --port" in line


def test_a_fold_is_exact_and_its_host_serves_that_profile_only(
    model_path: Path, saved: LanguageModel, tmp_path: Path
) -> None:
    profile = rank_one(saved, "bold")
    file = profile.save(tmp_path / "bold.safetensors")
    host = open_host(
        load_settings({"model": str(model_path), "profile": [str(file)], "fold": "bold"})
    )
    assert host.profiles.names == ["bold"]
    assert isinstance(host.engine, LocalEngine)
    weight = saved.sites.last_linear(Site(1, "mlp_out")).weight
    folded = host.lm.sites.last_linear(Site(1, "mlp_out")).weight
    (edit,) = profile.edits
    torch.testing.assert_close(folded, weight + edit.write @ (edit.read.mT @ weight))


def test_a_profile_that_is_no_weight_delta_cannot_be_folded(
    model_path: Path, saved: LanguageModel, tmp_path: Path
) -> None:
    file = make_profile("bold", saved).save(tmp_path / "bold.safetensors")
    with pytest.raises(ProfileError, match="fold"):
        open_host(load_settings({"model": str(model_path), "profile": [str(file)], "fold": "bold"}))


def test_profiles_are_listed_shown_and_verified(
    capsys: pytest.CaptureFixture[str], model_path: Path, saved: LanguageModel, tmp_path: Path
) -> None:
    for name in ("bold", "shy"):
        rank_one(saved, name).save(tmp_path / f"{name}.safetensors")
    assert main(["profiles", "list", str(tmp_path)]) == 0
    bold, shy = capsys.readouterr().out.splitlines()
    assert bold.split()[:2] == ["bold", "llm_va"] and shy.startswith("shy")
    assert main(["profiles", "show", str(tmp_path / "bold.safetensors")]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["fingerprint"] == rank_one(saved, "bold").fingerprint
    assert shown["edits"][0]["site"] == "1.mlp_out"
    assert main(["profiles", "verify", str(tmp_path), "--model", str(model_path)]) == 0
    assert capsys.readouterr().out.count("is sound and fits") == 2


def test_verifying_names_every_unsound_file_and_fails(
    capsys: pytest.CaptureFixture[str], model_path: Path, saved: LanguageModel, tmp_path: Path
) -> None:
    sound = rank_one(saved, "bold").save(tmp_path / "a.safetensors")
    shutil.copy(sound, tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").write_bytes(sound.read_bytes()[:100])
    make_profile("c", make_model("qwen2")).save(tmp_path / "c.safetensors")
    assert main(["profiles", "verify", str(tmp_path), "--model", str(model_path)]) == 1
    a, b, c = capsys.readouterr().out.splitlines()
    assert "bold is sound" in a
    assert "not a whole safetensors file" in b
    assert "does not fit" in c


def test_commands_on_profiles_that_are_not_there_fail(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for verb in ("list", "show"):
        assert "no profile" in fails(capsys, "profiles", verb, tmp_path / "none")
        assert "no profile" in fails(capsys, "profiles", verb, tmp_path)


def test_fitting_says_what_is_wrong_before_it_loads_the_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"prompt {i}" for i in range(10)))
    common = ("--model", "/none", "--harmful", prompts, "--harmless", prompts, "--out", tmp_path)
    assert "unknown method" in fails(capsys, "fit", "magic", *common)
    assert "no hyper-parameter 'x'" in fails(capsys, "fit", "raw", *common, "--set", "x=1")
    assert "KEY=VALUE" in fails(capsys, "fit", "raw", *common, "--set", "x")
    assert "hf:ID" in fails(capsys, "fit", "raw", *common, "--judge", "magic")
    missing = ("--model", "/none", "--harmful", "/none.txt", "--harmless", prompts)
    assert "/none.txt" in fails(capsys, "fit", "raw", *missing, "--out", tmp_path)


def test_fitting_saves_a_profile_that_serving_takes(
    capsys: pytest.CaptureFixture[str], model_path: Path, tmp_path: Path
) -> None:
    for name in ("harmful", "harmless"):
        lines = "\n".join(f"{name} prompt {i}" for i in range(10))
        (tmp_path / f"{name}.txt").write_text(lines)
    arguments = [
        "fit", "raw", "--model", str(model_path), "--name", "plain", "--out", str(tmp_path / "out"),
        "--harmful", str(tmp_path / "harmful.txt"), "--harmless", str(tmp_path / "harmless.txt"),
    ]  # fmt: skip
    assert main(arguments) == 0
    file = tmp_path / "out" / "plain.safetensors"
    assert str(file) in capsys.readouterr().out
    host = open_host(load_settings({"model": str(model_path), "profile": [str(file)]}))
    assert host.profiles.names == ["raw", "plain"]
    assert Profile.load(file).provenance["judge"] == JUDGE_VERSION


def test_the_judge_is_measured_and_judges_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["judge", "--part", "development"]) == 0
    assert "| Japanese |" in capsys.readouterr().out
    replies, out = tmp_path / "replies.jsonl", tmp_path / "judged.jsonl"
    records = [
        {"prompt": "Hi", "reply": "I can't help with that."},
        {"response": "Paris.", "id": 7},
    ]
    replies.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert main(["judge", str(replies), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "2 replies" in printed and "corrected" in printed and "sensitivity" in printed
    judged = [json.loads(line) for line in out.read_text().splitlines()]
    assert [record["outcome"] for record in judged] == ["refusal", "answer"]
    assert judged[1]["id"] == 7


def test_judging_says_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"reply": "Paris."}\n{"text": "Rome."}\n')
    (tmp_path / "b.jsonl").write_text("")
    assert "a.jsonl:2:1" in fails(capsys, "judge", tmp_path / "a.jsonl")
    assert "no replies" in fails(capsys, "judge", tmp_path / "b.jsonl")
    assert "needs a file" in fails(capsys, "judge", "--out", tmp_path / "c.jsonl")
    assert "hf:ID" in fails(capsys, "judge", "--judge", "magic")
    assert "cannot use '/none'" in fails(capsys, "judge", "--judge", "hf:wildguard=/none")


def test_a_server_process_answers_the_official_client_and_stops_on_sigterm(
    model_path: Path, saved: LanguageModel, tmp_path: Path
) -> None:
    file = rank_one(saved, "bold").save(tmp_path / "bold.safetensors")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "server.cli", "serve", "--model", str(model_path),
            "--profile", str(file), "--port", "0", "--threads", "1", "--max-num-seqs", "2",
        ],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"serves (\S+) at (\S+)/v1 with the profiles raw, bold", line):
                break
        else:
            pytest.fail("".join(lines))
        name, address = found.groups()
        assert name == "tiny"
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        completion = client.chat.completions.create(
            model="tiny:bold", messages=[{"role": "user", "content": "Hi"}], max_tokens=5
        )
        assert completion.steering["profile"] == "bold"  # type: ignore[attr-defined]
        assert httpx2.get(f"{address}/health").json() == {"status": "ok", "records": "off"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def test_help_is_quick_because_nothing_heavy_is_imported() -> None:
    program = (
        "import sys; from server.cli import make_parser; make_parser();"
        "heavy = {'torch', 'transformers', 'fastapi', 'sklearn'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
