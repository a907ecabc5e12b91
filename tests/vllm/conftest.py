"""Tests on stock vLLM: its CPU build, tiny models, an engine per module.

A start takes half a minute to minutes, so that modules share one where they can. What takes longer
than a CI run should is marked `matrix`: `make test-vllm ARGS="-m matrix"`.
"""

from __future__ import annotations

import gc
import os
import warnings

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("vllm")
    import server.engine.vllm.engine  # noqa: F401  here, where its warnings are no errors

_MATRIX = "takes minutes; run it with -m matrix"


def pytest_configure(config: pytest.Config) -> None:
    # vLLM's warnings are its own.
    config.addinivalue_line("filterwarnings", "ignore")


def pytest_sessionfinish() -> None:
    # So is the ZMQ context that its client leaves open when its processes are killed; pytest would
    # find that later, and call it an error.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("matrix") and "matrix" not in config.getoption("markexpr"):
            item.add_marker(pytest.mark.skip(reason=_MATRIX))
