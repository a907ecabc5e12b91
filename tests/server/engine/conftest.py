"""Fixtures of the engine's tests."""

from __future__ import annotations

import pytest

from steering.models import LanguageModel


@pytest.fixture
def endless_llama(tiny_llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> LanguageModel:
    """A model without an end token, whose replies last as long as was asked."""
    monkeypatch.setattr(tiny_llama.model.generation_config, "eos_token_id", [])
    return tiny_llama
