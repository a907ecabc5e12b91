"""Files of tensors: whole or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from steering import storage
from steering.storage import read_safetensors, write_safetensors

TENSORS = {"x": torch.arange(6.0).view(2, 3)}


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "deep" / "it.safetensors", "key", {"a": 1}, TENSORS)
    header, tensors = read_safetensors(path, "key", "thing", ValueError)
    assert header["a"] == 1 and torch.equal(tensors["x"], TENSORS["x"])
    assert [file.name for file in path.parent.iterdir()] == ["it.safetensors"]


def test_two_writers_of_one_file_do_not_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, original = tmp_path / "it.safetensors", storage.save

    def meanwhile(*arguments: Any) -> bytes:
        monkeypatch.setattr(storage, "save", original)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        write_safetensors(path, "key", {}, TENSORS)  # another process
        return original(*arguments)

    monkeypatch.setattr(storage, "save", meanwhile)
    write_safetensors(path, "key", {}, TENSORS)
    assert [file.name for file in tmp_path.iterdir()] == ["it.safetensors"]


def test_what_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "it.safetensors"
    path.mkdir()
    with pytest.raises(OSError, match=r"it\.safetensors"):
        write_safetensors(path, "key", {}, TENSORS)
    assert [file.name for file in tmp_path.iterdir()] == ["it.safetensors"]
    not_rows = {"x": torch.eye(2).to_sparse()}
    with pytest.raises(ValueError, match="sparse"):
        write_safetensors(tmp_path / "other.safetensors", "key", {}, not_rows)
    assert [file.name for file in tmp_path.iterdir()] == ["it.safetensors"]
