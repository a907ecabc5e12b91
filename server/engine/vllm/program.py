"""What the model computes at an edited site: tensor operations on fixed buffers, and nothing else.

A compiled graph, and a captured one even more, holds no Python and no addresses but those it was
made with. So everything that changes from step to step is the content of buffers that are there
before: which tokens belong to which edits (`TokenInputs`, written before each step), the edits
themselves (a `SiteProgram`'s columns, written when profiles are registered), and what is read.

    x      = h + residual                          the state, float32
    inner  = x @ read.T + constant                 [T, C], one column per rank and one per shift
    amount = coefficient[slot] * gate              [T, C], 0 where a token has no such edit
    h'     = h + (inner * amount) @ write

A *slot* is a row of coefficients, one per column, that any number of tokens share: a request has
three of them (its first token, the rest of its prompt, its reply), which is how phases and
strengths come in. Slot 0 is all zeros, and a token that points at it is not changed.

Shapes: T tokens of the step, D hidden size, C columns, S slots, K gates, N latches (places that
hold one request's gates over its prompt).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from steering.edit import Gate

WATCHED = 8
"""Tokens per step whose states the self-test can look at."""


@dataclass(frozen=True)
class Needs:
    """What a step is run for. A graph is always run whole; where Python runs in each step
    (`--enforce-eager`), what nobody needs is left out.

    Args:
        edits: some token is edited.
        readings: norms and probes of some token are wanted.
        watched: some token is watched.
    """

    edits: bool = True
    readings: bool = True
    watched: bool = True

    @property
    def nothing(self) -> bool:
        return not (self.edits or self.readings or self.watched)


class TokenInputs(nn.Module):
    """What each token of a step is, for all sites alike. Zero for a token that nobody steers.

    Buffers:
        slot: `[T]`, the row of coefficients.
        latch: `[T]`, where its request latches gates; 0 is nobody's.
        last, mean: `[T]`, a token's weight in gates read at the last prompt token, and in those
            over the mean of the prompt; sum to 1 over the request when its prompt is read.
        forced: `[T]`, 1 where all gates count as 1 (self-test).
        watch: `[WATCHED]`, the tokens whose states are kept.

    `needs` is no buffer: it may change only where no graph is made of the programs.
    """

    slot: Tensor
    latch: Tensor
    last: Tensor
    mean: Tensor
    forced: Tensor
    watch: Tensor

    def __init__(self, tokens: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        for name in ("slot", "latch"):
            self.register_buffer(
                name, torch.zeros(tokens, dtype=torch.long, device=device), persistent=False
            )
        for name in ("last", "mean", "forced"):
            self.register_buffer(name, torch.zeros(tokens, device=device), persistent=False)
        self.needs = Needs()
        watch = torch.zeros(WATCHED, dtype=torch.long, device=device)
        self.register_buffer("watch", watch, persistent=False)

    @property
    def capacity(self) -> int:
        return len(self.slot)


class SiteProgram(nn.Module):
    """One site's edits, gates and probes.

    Args:
        coefficient: `[S, C]` float32, zeros; a view of the worker's table will do. C = 0 where
            the site is only read.
        gates: how many gates can be read here.
        latches: N.
        probes: how many probes can be read here, after the edits.
        sources: the programs before this one, in the order of the forward pass, whose gates its
            edits may use; its own come last.

    Buffers:
        read, write: `[C, D]`, a row per column: few columns are read twice as fast so.
        constant: `[C]`, added to what is read: 1 in a shift's column, which reads nothing.
        gate_of_column: `[C]`, 0 for no gate, else 1 + its place among the gates of the sources.
        gate_column: `[K]`, the column that reads it.
        gate_linear, gate_above, gate_threshold, gate_last, gate_mean: `[K]`, the gate's definition.
        latched: `[N, K]`, the projection that a latched gate holds.
        gate: `[T, K]`, gates as they scale edits in this step.
        probe, probed: `[D, P]` directions, `[T, P]` projections on them, without bias.
        norm: `[T]`, |change| / |x|.
        watched: `[WATCHED, 3, D]`, of a watched token: x, h before, h after.
    """

    read: Tensor
    write: Tensor
    constant: Tensor
    coefficient: Tensor
    gate_of_column: Tensor
    gate_column: Tensor
    gate_linear: Tensor
    gate_above: Tensor
    gate_threshold: Tensor
    gate_last: Tensor
    gate_mean: Tensor
    latched: Tensor
    gate: Tensor
    probe: Tensor
    probed: Tensor
    norm: Tensor
    watched: Tensor

    def __init__(
        self,
        inputs: TokenInputs,
        hidden_size: int,
        coefficient: Tensor,
        *,
        gates: int = 0,
        latches: int = 1,
        probes: int = 0,
        sources: Sequence[SiteProgram] = (),
    ) -> None:
        super().__init__()
        device, tokens = inputs.slot.device, inputs.capacity
        self.inputs = inputs
        self.columns = coefficient.shape[1]
        self.gates = gates
        self.probes = probes
        # Not registered: they are submodules of other blocks.
        self._sources: tuple[SiteProgram, ...] = tuple(s for s in sources if s.gates)

        def buffer(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> None:
            tensor = torch.zeros(shape, dtype=dtype, device=device)
            self.register_buffer(name, tensor, persistent=False)

        self.register_buffer("coefficient", coefficient, persistent=False)
        buffer("read", self.columns, hidden_size)
        buffer("write", self.columns, hidden_size)
        buffer("constant", self.columns)
        buffer("gate_of_column", self.columns, dtype=torch.long)
        buffer("gate_column", gates, dtype=torch.long)
        buffer("gate_linear", gates, dtype=torch.bool)
        buffer("gate_above", gates, dtype=torch.bool)
        buffer("gate_threshold", gates)
        buffer("gate_last", gates)
        buffer("gate_mean", gates)
        buffer("latched", latches, gates)
        buffer("gate", tokens, gates)
        buffer("probe", hidden_size, probes)
        buffer("probed", tokens, probes)
        buffer("norm", tokens)
        buffer("watched", WATCHED, 3, hidden_size)

    def forward(self, h: Tensor, residual: Tensor | None = None) -> Tensor:
        """`h` `[T, D]` after the edits of this site, in its own dtype.

        `residual` `[T, D]` is what is yet to be added to it, None where that is nothing. What the
        call reads (gates, probes, norms, watched states) is left in the buffers.
        """
        needs, count = self.inputs.needs, h.shape[0]
        if needs.nothing:
            return h
        if self.columns:
            x = _state(h, residual)
            change = self._change(x, count)
            if needs.readings:
                self.norm[:count] = change.norm(dim=-1) / x.norm(dim=-1).clamp_min(1e-12)
            # In place, as in `_state`: where this runs eagerly, what costs most in a long prompt is
            # the fresh memory of each intermediate result.
            edited = change.add_(h).to(h.dtype)
            if needs.watched:
                watch = self.inputs.watch
                self.watched[:, 0] = x.index_select(0, watch)
                self.watched[:, 1] = h.index_select(0, watch).float()
                self.watched[:, 2] = edited.index_select(0, watch).float()
            h = edited
        if self.probes and needs.readings:
            self.probed[:count] = _state(h, residual) @ self.probe
        return h

    def _change(self, x: Tensor, count: int) -> Tensor:
        inner = linear(x, self.read)
        if self.gates:
            self.gate[:count] = self._gates(inner, count)
        coefficient = self.coefficient.index_select(0, self.inputs.slot[:count])
        amount = coefficient
        if sources := [*self._sources, *([self] if self.gates else [])]:
            table = [x.new_ones(count, 1), *(source.gate[:count] for source in sources)]
            amount = amount * torch.cat(table, dim=1).index_select(1, self.gate_of_column)
        # Not a product with 0: one profile's overflow is no other request's trouble.
        scaled = torch.where(coefficient == 0, 0.0, (inner + self.constant) * amount)
        return scaled @ self.write

    def _gates(self, inner: Tensor, count: int) -> Tensor:
        """Values `[T, K]` of this site's gates."""
        inputs = self.inputs
        projection = inner.index_select(1, self.gate_column)
        weight = inputs.last[:count, None] * self.gate_last
        weight = weight + inputs.mean[:count, None] * self.gate_mean
        # What a row's prompt adds in this call to what it has latched, which is 0 before. No
        # product with 0 here either.
        part = torch.where(weight == 0, 0.0, projection * weight)
        latched = self.latched.index_add(0, inputs.latch[:count], part)
        self.latched.copy_(latched)
        latches = (self.gate_last + self.gate_mean) > 0
        kept = latched.index_select(0, inputs.latch[:count])
        value = self._value(torch.where(latches, kept, projection))
        return torch.where(inputs.forced[:count, None] > 0, 1.0, value)

    def _value(self, projection: Tensor) -> Tensor:
        opened = (projection > self.gate_threshold) == self.gate_above
        return torch.where(self.gate_linear, projection, opened.float())

    def latched_values(self, latches: Tensor) -> Tensor:
        """`[n, K]`: what these latches `[n]` hold, as it scales edits."""
        return self._value(self.latched.index_select(0, latches))

    # Written between two steps; what is there already keeps its place.

    def put_columns(
        self, columns: Sequence[int], read: Tensor, write: Tensor, shift: Tensor | None = None
    ) -> None:
        """Write an edit's `[D, r]` matrices into its columns, and a shift `[D]` into the last."""
        ranks = list(columns[: read.shape[1]])
        self.read[ranks] = read.mT.to(self.read)
        self.write[ranks] = write.mT.to(self.write)
        self.constant[ranks] = 0.0
        if shift is not None:
            self.read[columns[-1]] = 0.0
            self.write[columns[-1]] = shift.to(self.write)
            self.constant[columns[-1]] = 1.0

    def put_gate(self, gate: Gate, index: int, column: int) -> None:
        """Read a gate in a column of its own, as number `index`."""
        direction = gate.direction[:, None]
        self.put_columns([column], direction, torch.zeros_like(direction))
        self.gate_column[index] = column
        self.gate_linear[index] = gate.comparator == "linear"
        self.gate_above[index] = gate.comparator == ">"
        self.gate_threshold[index] = gate.threshold
        self.gate_last[index] = float(gate.reduce == "last_prompt_token")
        self.gate_mean[index] = float(gate.reduce == "prompt_mean")
        self.latched[:, index] = 0.0

    def drive(
        self, columns: Sequence[int], source: SiteProgram | None = None, index: int = 0
    ) -> None:
        """Let a gate of `source` scale these columns, or none."""
        self.gate_of_column[list(columns)] = 0 if source is None else self._place(source) + index

    def _place(self, source: SiteProgram) -> int:
        at = 1
        for program in (*self._sources, self):
            if program is source:
                return at
            at += program.gates
        raise AssertionError("an edit's gate is read at or before its site")


def _state(h: Tensor, residual: Tensor | None) -> Tensor:
    """`[T, D]` in float32, a tensor of its own."""
    x = h.to(torch.float32, copy=True)
    return x if residual is None else x.add_(residual)
