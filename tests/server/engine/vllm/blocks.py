"""A model built as vLLM's are: flat tokens, and blocks that pass on a state and a residual."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tests.steering.edits import SIZE


class Mix(nn.Module):
    """Stands in for attention: a token sees the mean of the tokens of its request up to itself."""

    def __init__(self, model: FakeModel) -> None:
        super().__init__()
        self.__dict__["model"] = model
        self.linear = nn.Linear(SIZE, SIZE, bias=False)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        parts = []
        for start, end in pairwise(self.model.borders):
            part = hidden_states[start:end]
            parts.append(part.cumsum(0) / torch.arange(1, len(part) + 1)[:, None])
        rest = hidden_states[self.model.borders[-1] :]
        return self.linear(torch.cat([*parts, rest]))


class Block(nn.Module):
    def __init__(self, model: FakeModel) -> None:
        super().__init__()
        self.self_attn = Mix(model)
        self.mlp = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False), nn.Tanh())

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        residual = hidden_states if residual is None else hidden_states + residual
        hidden_states = self.self_attn(positions=positions, hidden_states=residual)
        residual = residual + hidden_states
        return self.mlp(residual), residual


class FakeModel(nn.Module):
    """`borders`: where each request's tokens begin in a call, and where the last one's end."""

    def __init__(self, layers: int = 4, vocabulary: int = 50) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.borders: Sequence[int] = [0]
        self.embed = nn.Embedding(vocabulary, SIZE)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Block(self) for _ in range(layers))
        self.head = nn.Linear(SIZE, vocabulary, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[T, D]`, the stream after the last block."""
        hidden, residual = self.embed(tokens), None
        for block in self.model.layers:  # type: ignore[union-attr]
            hidden, residual = block(tokens, hidden, residual)
        return hidden + residual

    def compute_logits(self, hidden: Tensor) -> Any:
        return self.head(hidden)
