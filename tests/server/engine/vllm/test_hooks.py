"""Where a site is in a block of vLLM's form, and which blocks are refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from server.engine.vllm.hooks import attach
from server.engine.vllm.program import SiteProgram, TokenInputs
from steering.edit import Point, Site
from tests.server.engine.vllm.blocks import Block, FakeModel
from tests.steering.edits import SIZE

TOKENS = 3


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class PostNorms(Block):
    """As Gemma-2 and GLM-4: what a sublayer gives goes through a norm before it is added."""

    def __init__(self, model: FakeModel, after_attention: str, after_mlp: str) -> None:
        super().__init__(model)
        self.names = after_attention, after_mlp
        for name in self.names:
            self.add_module(name, Doubling())

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        residual = hidden_states if residual is None else hidden_states + residual
        after_attention, after_mlp = (getattr(self, name) for name in self.names)
        added = after_attention(self.self_attn(positions=positions, hidden_states=residual))
        residual = residual + added
        return after_mlp(self.mlp(residual)), residual


class Adding(Block):
    """As Cohere's: it passes on the whole stream, and a residual that nobody is to add."""

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        residual = hidden_states
        return residual + self.mlp(hidden_states), residual


class Scaling(Block):
    """As DeepSeek-V2's, in float16."""

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        residual = hidden_states if residual is None else hidden_states + residual
        if residual.dtype == torch.float16:
            residual *= 0.5
        return self.mlp(residual), residual


class Experts(Block):
    """As Mixtral's: no `mlp`."""

    def __init__(self, model: FakeModel) -> None:
        super().__init__(model)
        self.block_sparse_moe = self.mlp
        del self.mlp

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        residual = hidden_states if residual is None else hidden_states + residual
        return self.block_sparse_moe(residual), residual


def shifting(point: Point) -> dict[Site, SiteProgram]:
    """A program that adds 1 to every component of every token."""
    inputs = TokenInputs(TOKENS)
    inputs.slot.fill_(1)
    program = SiteProgram(inputs, SIZE, torch.tensor([[0.0], [1.0]]))
    program.put_columns([0], torch.zeros(SIZE, 0), torch.zeros(SIZE, 0), torch.ones(SIZE))
    return {Site(0, point): program}


@torch.inference_mode()
def added(block: Block) -> Tensor:
    """What the block's second sublayer adds to the stream."""
    x = torch.linspace(-1, 1, TOKENS * SIZE).reshape(TOKENS, SIZE)
    return block(torch.arange(TOKENS), x, None)[0]


@pytest.mark.parametrize(
    "names",
    [
        ("post_attention_layernorm", "post_feedforward_layernorm"),
        ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ],
)
@pytest.mark.parametrize(("point", "by"), [("mlp_out", 2.0), ("mlp_add", 1.0)])
def test_an_edit_of_what_is_added_acts_after_the_norm(
    names: tuple[str, str], point: Point, by: float
) -> None:
    block = PostNorms(FakeModel(), *names)
    before = added(block)
    attach(block, shifting(point))
    torch.testing.assert_close(added(block), before + by)


@pytest.mark.parametrize("point", ["resid_pre", "attn_out", "mlp_add", "resid_post"])
def test_a_block_that_adds_the_residual_itself_is_refused(point: Point) -> None:
    with pytest.raises(ValueError, match="Adding does not leave the residual"):
        attach(Adding(FakeModel()), shifting(point))


def test_a_block_with_unknown_sublayers_is_edited_beside_them_only() -> None:
    block = Experts(FakeModel())
    before = added(block)
    attach(block, shifting("resid_post"))
    torch.testing.assert_close(added(block), before + 1)
    with pytest.raises(ValueError, match="Experts has no self_attn and mlp"):
        attach(Experts(FakeModel()), shifting("mlp_out"))


def test_a_block_that_scales_the_stream_in_float16_is_refused_there_only() -> None:
    attach(Scaling(FakeModel()), shifting("resid_post"))
    with pytest.raises(ValueError, match="--dtype bfloat16"):
        attach(Scaling(FakeModel()).half(), shifting("resid_post"))
