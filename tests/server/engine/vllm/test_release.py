"""A vLLM that is not the one this server knows, or does not work, is refused before it is used."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from server.engine.vllm.release import check_version, import_engine


def test_only_the_vllm_that_is_known_is_used() -> None:
    check_version("0.32.0")
    check_version("0.32.7.post1+cpu")
    for version in ("0.31.9", "0.33.0", "0.33.0rc1", "1.0.0", "dev"):
        with pytest.raises(ValueError, match=r"knows those of 0\.32: pip install 'vllm>=0\.32,"):
            check_version(version)


@pytest.mark.parametrize(
    ("version", "told"), [("0.99.0", "vLLM 0.99.0 is installed"), ("0.32.0", "cannot be imported")]
)
def test_another_vllm_is_refused_whatever_its_modules_are_called(
    version: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = ModuleType("vllm")
    installed.__version__ = version  # type: ignore[attr-defined]
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("engine", "client", "replies", "selftest", "sampling", "reads"):
        monkeypatch.delitem(sys.modules, f"server.engine.vllm.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "vllm", installed)
    with pytest.raises(ValueError, match=told):
        import_engine()
