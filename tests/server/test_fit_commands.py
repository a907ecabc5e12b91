"""`fit`, `fit monitor`, `export` and `import`, as people type them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from server.cli import main
from server.engine.offline import OfflineGenerator
from steering.edit import Edit, Site
from steering.models import LanguageModel
from steering.monitor import MONITOR_FILE, Monitor
from steering.profile import Profile
from steering.template import FIXED_DATE, TemplateForm
from tests.conftest import DATED_TEMPLATE, make_model, with_template

OT = ("--set", "judged_per_kind=2", "--set", "windows=1", "--set", "components=1")


@pytest.fixture
def prompts(tmp_path: Path) -> list[str]:
    """Flags that name a file of each label."""
    flags = []
    for flag, noun in (("--harmful", "bomb"), ("--harmless", "cake")):
        file = tmp_path / f"{noun}.txt"
        file.write_text("\n".join(f"make a {noun} {i}" for i in range(40)))
        flags += [flag, str(file)]
    return flags


def weight_delta(lm: LanguageModel, **kwargs: Any) -> Profile:
    d = lm.sites.hidden_size
    read, write = torch.randn(2, d, 2, generator=torch.Generator().manual_seed(3)) / 8
    edit = Edit(Site(1, "mlp_out"), read, write, torch.zeros(d))
    return Profile("bold", "llm_va", (edit,), base=lm.fingerprint, **kwargs)


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("pilothouse: error: ") == 1 and "Traceback" not in error
    return error


def succeeds(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out, captured.err


def test_a_fit_runs_on_the_engine_and_a_second_one_repeats_nothing(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model_path: Path,
    prompts: list[str],
    tmp_path: Path,
) -> None:
    fit = ("fit", "optimal_transport", "--model", model_path, *prompts, *OT, "--reply-tokens", 4)
    _, first = succeeds(capsys, *fit, "--out", tmp_path / "out")
    assert "s collecting" in first and "s selecting" in first and "peak memory" in first
    assert "resuming" not in first
    file = tmp_path / "out" / "optimal-transport.safetensors"
    profile = Profile.load(file)
    assert set(profile.provenance["seconds"]) == {
        *("collecting", "generating", "solving", "selecting"),
    }
    assert profile.provenance["overlaps"]["fit"]["exact"] == 0

    def never(self: OfflineGenerator, *args: Any, **kwargs: Any) -> list[list[int]]:
        raise AssertionError("a reply was generated again")

    monkeypatch.setattr(OfflineGenerator, "__call__", never)
    _, second = succeeds(capsys, *fit, "--out", tmp_path / "out")
    assert "resuming: 4 of 4 replies were there" in second
    assert Profile.load(file).fingerprint == profile.fingerprint


def test_labels_come_from_the_data_set_or_from_the_flag(
    capsys: pytest.CaptureFixture[str], model_path: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.jsonl"
    rows = [{"prompt": f"make {i}", "harmful": bool(i % 2)} for i in range(40)]
    # Said again, in other words and with the other label.
    rows.append({"prompt": "MAKE 3!", "harmful": False})
    file.write_text("\n".join(json.dumps(row) for row in rows))
    fit = ("fit", "raw", "--model", model_path, "--out", tmp_path / "out")
    _, error = succeeds(capsys, *fit, "--prompts", file)
    assert "are repeated" in error and "1 of them with the other label" in error
    found = Profile.load(tmp_path / "out" / "raw.safetensors").provenance["overlaps"]
    assert sum(part["conflicts"] for part in found.values()) == 1
    safe = tmp_path / "safe.txt"
    safe.write_text("\n".join(f"bake {i}" for i in range(10)))
    _, error = succeeds(capsys, *fit, "--harmful", file, "--harmless", safe)
    assert "states that 21 of its 41 prompts are harmless" in error
    assert "no harmless prompts" in fails(capsys, *fit, "--harmful", file)
    both = ("--prompts", file, "--dataset")
    assert "unknown data set 'x'" in fails(capsys, *fit, *both, "x")
    assert "advbench has the columns" in fails(capsys, *fit, *both, f"{file}=advbench")
    assert "not one of the prompt files" in fails(capsys, *fit, *both, "y=advbench")


def scripted(
    self: OfflineGenerator,
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    **kwargs: Any,
) -> list[list[int]]:
    """Refuses what is harmful, and every fifth cake."""
    replies = []
    for ids in prompts:
        text = lm.decode(ids)
        refuses = "bomb" in text or text.endswith("5")
        reply = "I can't help with that." if refuses else "Sure, here is a recipe for you."
        replies.append(list(lm.tokenizer(reply, add_special_tokens=False)["input_ids"]))
    return replies


def test_a_monitor_is_fitted_with_a_probe_for_every_profile(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model_path: Path,
    saved: LanguageModel,
    prompts: list[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(OfflineGenerator, "__call__", scripted)
    profile = weight_delta(saved)
    profile.save(tmp_path / "out" / "bold.safetensors")
    fit = ("fit", "monitor", "--model", model_path, *prompts, "--out", tmp_path / "out")
    out, _ = succeeds(capsys, *fit, "--profile", tmp_path / "out")
    monitor = Monitor.load(tmp_path / "out" / MONITOR_FILE)
    monitor.check_base(saved)
    assert set(monitor.answer) == {"", profile.fingerprint}
    assert monitor.provenance["overlaps"]["fit"]["checked"] == 56
    assert MONITOR_FILE in out
    best = monitor.benign_probe
    assert f"{best.auroc:.3f}  {best.expected_calibration_error:.4f}  best" in out
    assert "held-out harmful prompts" in out and "answer, bold" in out
    assert "--name belongs to" in fails(capsys, *fit, "--name", "x")
    assert "no profile" in fails(capsys, *fit, "--profile", tmp_path / "none")
    other = ("fit", "raw", "--model", model_path, *prompts, "--out", tmp_path)
    assert "fit monitor" in fails(capsys, *other, "--profile", tmp_path / "out")


def test_the_form_of_prompts_is_told_by_flags_and_recorded(
    capsys: pytest.CaptureFixture[str], prompts: list[str], tmp_path: Path
) -> None:
    lm = with_template(make_model("llama"), DATED_TEMPLATE + "{{ enable_thinking }}")
    lm.model.save_pretrained(tmp_path / "model")
    lm.tokenizer.save_pretrained(tmp_path / "model")
    fit = ("fit", "raw", "--model", tmp_path / "model", *prompts, "--out", tmp_path / "out")
    file = tmp_path / "out" / "raw.safetensors"
    succeeds(capsys, *fit)
    by_default = TemplateForm({"enable_thinking": False}, None, FIXED_DATE)
    assert TemplateForm.from_json(Profile.load(file).provenance) == by_default
    told = ("--chat-template-kwargs", '{"enable_thinking": true}', "--system-prompt", "Be kind.")
    succeeds(capsys, *fit, *told, "--template-date", "2025-01-02")
    form = TemplateForm({"enable_thinking": True}, "Be kind.", "2025-01-02")
    assert TemplateForm.from_json(Profile.load(file).provenance) == form
    assert "write a JSON object" in fails(capsys, *fit, "--chat-template-kwargs", "{")
    assert "write a JSON object" in fails(capsys, *fit, "--chat-template-kwargs", '{"a": []}')
    assert "'style'; it takes" in fails(capsys, *fit, "--chat-template-kwargs", '{"style": 1}')
    assert "write YYYY-MM-DD" in fails(capsys, *fit, "--template-date", "today")


def test_a_date_for_a_template_that_prints_none_is_refused(
    capsys: pytest.CaptureFixture[str], model_path: Path, prompts: list[str], tmp_path: Path
) -> None:
    fit = ("fit", "raw", "--model", model_path, *prompts, "--out", tmp_path)
    assert "prints no date" in fails(capsys, *fit, "--template-date", "2025-01-02")


def test_a_fit_that_could_not_be_saved_does_not_begin(
    capsys: pytest.CaptureFixture[str], prompts: list[str], tmp_path: Path
) -> None:
    fit = ("fit", "raw", "--model", "/none", *prompts, "--out")
    for flags, message in (
        (("--name", "Up/and/away"), "is not a profile name"),
        (("--threads", 0), "--threads is at least 1"),
        (("--seed", -1), "--seed is at least 0"),
        (("--prompts", prompts[1]), "give the label, .* Flags for it: --harmful, --harmless"),
    ):
        assert re.search(message, fails(capsys, *fit, tmp_path / "out", *flags))
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "cannot be written to" in fails(capsys, *fit, out)


def test_an_exported_adapter_comes_back_as_a_profile(
    capsys: pytest.CaptureFixture[str], model_path: Path, saved: LanguageModel, tmp_path: Path
) -> None:
    profile = weight_delta(saved, red_team=True)
    file = profile.save(tmp_path / "bold.safetensors")
    export = ("export", file, "--model", model_path, "--format", "peft")
    out, error = succeeds(capsys, *export, "--out", tmp_path / "adapter")
    assert "adapter_config.json" in out and "against the hook form" in out
    assert "red-team" in error
    back = ("import", tmp_path / "adapter", "--model", model_path, "--name", "back")
    out, error = succeeds(capsys, *back, "--out", tmp_path / "back", "--no-red-team")
    assert "1.mlp_out" in out and "stays a red-team profile" in error
    imported = Profile.load(tmp_path / "back" / "back.safetensors")
    assert imported.red_team and imported.method == "imported"
    (ours,), (theirs,) = profile.edits, imported.edits
    torch.testing.assert_close(
        theirs.write @ theirs.read.mT, ours.write @ ours.read.mT, atol=1e-4, rtol=1e-3
    )


def test_exporting_refuses_what_cannot_work(
    capsys: pytest.CaptureFixture[str], model_path: Path, saved: LanguageModel, tmp_path: Path
) -> None:
    file = weight_delta(saved).save(tmp_path / "bold.safetensors")
    nowhere = ("export", file, "--model", "/none", "--out", tmp_path / "new", "--format")
    assert "there are gguf, hf, peft" in fails(capsys, *nowhere, "onnx")
    assert "--max-rank belongs to" in fails(capsys, *nowhere, "hf", "--max-rank", 2)
    assert "at least 1" in fails(capsys, *nowhere, "peft", "--max-rank", 0)
    export = ("export", file, "--model", model_path, "--format")
    error = fails(capsys, *export, "gguf", "--out", tmp_path / "new")
    assert "linear part" in error and "--format hf or peft can" in error
    assert "is not empty" in fails(capsys, *export, "peft", "--out", tmp_path)
    nothing = ("peft", "--strength", 0, "--out", tmp_path / "new")
    assert "changes nothing" in fails(capsys, *export, *nothing)
    assert not (tmp_path / "new").exists()


def test_importing_asks_whether_refusals_are_removed(
    capsys: pytest.CaptureFixture[str], model_path: Path, saved: LanguageModel, tmp_path: Path
) -> None:
    vector = tmp_path / "vector.safetensors"
    save_file({"direction.2": torch.ones(saved.sites.hidden_size)}, vector)
    arguments = ["import", str(vector), "--model", str(model_path), "--name", "sea"]
    arguments += ["--out", str(tmp_path / "out"), "--strength", "0.5"]
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2 and "--red-team" in capsys.readouterr().err
    succeeds(capsys, *arguments, "--red-team")
    profile = Profile.load(tmp_path / "out" / "sea.safetensors")
    assert profile.red_team and profile.strength == 0.5
    missing = ["import", "/none", *arguments[2:], "--red-team"]
    assert "nothing at /none" in fails(capsys, *missing)
