"""Apply many requests' edits in one forward pass. The only code that touches hooks.

`Steering` hooks a model's sites once. `BatchPlan` stacks the edits of a batch's rows into thin
tensors per site, and is rebuilt only when the batch's composition changes. `Steering.step` is one
forward call under a plan:

    with Steering(lm.sites) as steering:
        steering.attach(sites_of(edits))
        plan = BatchPlan([RowEdits(edits, prompt_length), ...], device=..., hidden_size=...)
        with steering.step(plan, starts=[0, ...], lengths=[n, ...]):
            model(input_ids, ...)

Rows are right-padded: row `i`'s tokens sit at columns `0 .. lengths[i] - 1` of the call and at
positions `starts[i] ..` of its sequence. Phase is position against the original prompt length,
never "is this a prefill step". Rows without edits at a site are not touched there, bit for bit.

Shapes: B rows, T columns, D hidden size, N rows with an edit at the site, C columns of the stack.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from steering.edit import AppliedEdit, Edit, Phase, Site, edits_digest, effective_edits
from steering.models import ModelSites

_PHASES: tuple[Phase, ...] = ("prompt", "generation", "all")


class RowEdits:
    """One request's effective edits, and the gate values latched for it so far.

    Args:
        edits: in any order; those of strength 0 are dropped.
        prompt_length: tokens in the original prompt, which decides the phase of every position.
    """

    def __init__(self, edits: Iterable[AppliedEdit], prompt_length: int) -> None:
        if prompt_length < 1:
            raise ValueError("a row needs at least one prompt token")
        self.edits = effective_edits(edits)
        self.prompt_length = prompt_length
        self.latched: dict[int, Tensor] = {}
        """Gate values by index into `edits`, each a scalar, for gates that are not per token."""

    @cached_property
    def digest(self) -> str:
        """Cached keys and values of this row are valid for it only; see `edits_digest`."""
        return edits_digest(self.edits)

    @property
    def needs_whole_prompt(self) -> bool:
        """True when the prompt must be processed in one forward call."""
        return any(applied.edit.needs_whole_prompt for applied in self.edits)


def sites_of(edits: Iterable[Edit]) -> set[Site]:
    """Every site at which these edits act or their gates read."""
    edits = list(edits)
    return {e.site for e in edits} | {e.gate.site for e in edits if e.gate is not None}


@dataclass
class _SiteStack:
    """All edits at one site, one matrix column per rank plus one per shift."""

    rows: Tensor | None  # [N] row indices, None when it is all of them in order
    read: Tensor  # [N, D, C]
    write: Tensor  # [N, C, D], strength included
    constant: Tensor  # [N, 1, C]: 1 on shift columns, else 0
    phase: Tensor  # [N, C]: index into the step's phase table
    gated: tuple[Tensor, Tensor, Tensor] | None  # (n, column, gate entry) of gated columns


@dataclass
class _GateStack:
    """All gates read at one site."""

    entries: Tensor  # [K] rows of the step's gate table
    rows: Tensor  # [K]
    direction: Tensor  # [K, D]
    linear: Tensor  # [K, 1] bool
    above: Tensor  # [K, 1] bool: open above the threshold
    threshold: Tensor  # [K, 1]
    keys: list[tuple[int, int]]  # (row, edit index)
    mean: Tensor  # [K, 1] bool
    latches: list[bool]


Pool = Callable[[Tensor, Tensor], Tensor]
"""From a captured state `[B, T, D]` and the rows' lengths `[B]` to what is kept of it, `[B, ...]`.

Columns past a row's length hold padding."""


def last_token(x: Tensor, lengths: Tensor) -> Tensor:
    """`[B, D]`: each row's last column."""
    return x[torch.arange(len(lengths), device=x.device), lengths - 1]


_Stacks = tuple[dict[Site, _SiteStack], dict[Site, _GateStack], int]
"""Edits by site, gates by the site they are read at, and the number of gates."""


class BatchPlan:
    """The edits of a batch's rows, stacked per site.

    Args:
        rows: one per row of the forward calls to come, in their order.
        device: where the hidden states live.
        hidden_size: D, checked against every edit.
        dtype: of the arithmetic; float32 keeps gates, which must cancel, exact enough.

    Raises ValueError if an edit has another hidden size.
    """

    def __init__(
        self,
        rows: Sequence[RowEdits],
        *,
        hidden_size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.rows = list(rows)
        self.hidden_size = hidden_size
        self.device = torch.device(device)
        self.dtype = dtype
        self._stacks: dict[bool, _Stacks] = {}
        for row in self.rows:
            for applied in row.edits:
                if applied.edit.dimension != hidden_size:
                    raise ValueError(
                        f"an edit at {applied.edit.site} has hidden size {applied.edit.dimension}, "
                        f"the model {hidden_size}"
                    )

    @property
    def sites(self) -> set[Site]:
        """Every site the plan may touch."""
        return sites_of(applied.edit for row in self.rows for applied in row.edits)

    def stacks(self, generating: bool) -> _Stacks:
        """The stacks for a call in which every position is a generated one, or for any call.

        The first kind leaves out edits of phase `prompt`, which then cost nothing.
        """
        if generating not in self._stacks:
            self._stacks[generating] = self._gather(generating)
        return self._stacks[generating]

    def _gather(self, generating: bool) -> _Stacks:
        by_site: dict[Site, dict[int, list[tuple[AppliedEdit, int | None]]]] = {}
        gates: dict[Site, list[tuple[int, int, int, Edit]]] = {}
        entries = 0
        for i, row in enumerate(self.rows):
            for j, applied in enumerate(row.edits):
                edit = applied.edit
                if generating and edit.phase == "prompt":
                    continue
                entry = None
                if edit.gate is not None:
                    entry, entries = entries, entries + 1
                    gates.setdefault(edit.gate.site, []).append((entry, i, j, edit))
                by_site.setdefault(edit.site, {}).setdefault(i, []).append((applied, entry))
        return (
            {site: self._stack(rows) for site, rows in by_site.items()},
            {site: self._gate_stack(found) for site, found in gates.items()},
            entries,
        )

    def _stack(self, rows: dict[int, list[tuple[AppliedEdit, int | None]]]) -> _SiteStack:
        widths = {
            i: sum(a.edit.rank + a.edit.has_shift for a, _ in found) for i, found in rows.items()
        }
        n, columns = len(rows), max(widths.values())
        read = torch.zeros(n, self.hidden_size, columns, dtype=self.dtype)
        write = torch.zeros(n, columns, self.hidden_size, dtype=self.dtype)
        constant = torch.zeros(n, 1, columns, dtype=self.dtype)
        phase = torch.zeros(n, columns, dtype=torch.long)
        gated: list[tuple[int, int, int]] = []
        for k, found in enumerate(rows.values()):
            at = 0
            for applied, entry in found:
                edit = applied.edit
                end = at + edit.rank
                read[k, :, at:end] = edit.read
                write[k, at:end] = edit.write.mT * applied.strength
                if edit.has_shift:
                    write[k, end] = edit.shift * applied.strength
                    constant[k, 0, end] = 1.0
                    end += 1
                phase[k, at:end] = _phase_index(edit)
                if entry is not None:
                    gated += [(k, column, entry) for column in range(at, end)]
                at = end
        return _SiteStack(
            rows=None if list(rows) == list(range(len(self.rows))) else self._index(list(rows)),
            read=read.to(self.device),
            write=write.to(self.device),
            constant=constant.to(self.device),
            phase=phase.to(self.device),
            gated=tuple(self._index(c) for c in zip(*gated, strict=True)) if gated else None,  # type: ignore[arg-type]
        )

    def _gate_stack(self, found: list[tuple[int, int, int, Edit]]) -> _GateStack:
        gates = [edit.gate for _, _, _, edit in found]
        assert all(gate is not None for gate in gates)

        def column(values: Iterable[bool | float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(list(values), device=self.device, dtype=dtype)[:, None]

        known = [gate for gate in gates if gate is not None]
        return _GateStack(
            entries=self._index([entry for entry, _, _, _ in found]),
            rows=self._index([i for _, i, _, _ in found]),
            direction=torch.stack([g.direction for g in known]).to(self.device, self.dtype),
            linear=column((g.comparator == "linear" for g in known), torch.bool),
            above=column((g.comparator == ">" for g in known), torch.bool),
            threshold=column((g.threshold for g in known), self.dtype),
            keys=[(i, j) for _, i, j, _ in found],
            mean=column((g.reduce == "prompt_mean" for g in known), torch.bool),
            latches=[g.latches for g in known],
        )

    def _index(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def _phase_index(edit: Edit) -> int:
    return 2 * _PHASES.index(edit.phase) + int(edit.skip_first_token)


@dataclass
class Step:
    """One forward call under a plan, and what was read in it."""

    plan: BatchPlan
    starts: Sequence[int]
    lengths: Sequence[int]
    capture: Collection[Site] = ()
    measure: bool = False
    record: bool = False
    force_gates: float | None = None
    pool: Pool = last_token

    captured: dict[Site, Tensor] = field(default_factory=dict)
    """Float32 by site: the state after its edits, pooled; `[B, D]`, each row's last column, by
    default."""
    gates: Tensor | None = None
    """`[entries, T]` gate values of this call."""
    recorded: dict[Site, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """With `record`, the state before and after the edits of each edited site."""

    def __post_init__(self) -> None:
        rows, count = self.plan.rows, len(self.plan.rows)
        if len(self.starts) != count or len(self.lengths) != count:
            raise ValueError(f"the plan has {count} rows; give as many starts and lengths")
        for row, start, length in zip(rows, self.starts, self.lengths, strict=True):
            inside = start < row.prompt_length
            if inside and row.needs_whole_prompt and (start or length < row.prompt_length):
                raise ValueError(
                    "a gate over the prompt needs the whole prompt in one call; got positions "
                    f"{start} to {start + length} of {row.prompt_length}"
                )
        self.generating = all(
            start >= row.prompt_length for row, start in zip(rows, self.starts, strict=True)
        )
        self.stacks, self.gate_stacks, self._entries = self.plan.stacks(self.generating)
        self._pending = set(self.stacks)
        self._pending_gates = set(self.gate_stacks) if self.force_gates is None else set()
        self._wanted = {*self.stacks, *self.gate_stacks, *self.capture}
        self._reached: set[Site] = set()
        self._phase_table: Tensor | None = None
        self._norms: list[tuple[Tensor, Tensor, Tensor]] = []

    # What a hook does, in order: read gates, edit, capture.

    def at(self, sites: Sequence[Site], x: Tensor) -> Tensor:
        """The state `x` `[B, T, D]` at these sites, after this call's edits there."""
        for site in sites:
            if site not in self._wanted:
                continue
            if site in self._reached:
                raise RuntimeError(
                    f"{site} was reached twice in one step, which holds one forward call; a second "
                    "would run unedited"
                )
            self._reached.add(site)
            x = self._at(site, x)
        return x

    def _at(self, site: Site, x: Tensor) -> Tensor:
        if x.shape[:2] != (len(self.lengths), max(self.lengths)):
            raise ValueError(
                f"the step has {len(self.lengths)} rows of at most {max(self.lengths)} columns, "
                f"the forward call {tuple(x.shape[:2])}"
            )
        if site in self._pending_gates:
            self._read_gates(self.gate_stacks[site], x)
            self._pending_gates.discard(site)
        before = x
        if site in self._pending:
            x = self._edit(self.stacks[site], x)
            self._pending.discard(site)
            if self.record:
                self.recorded[site] = (before, x)
        if site in self.capture:
            lengths = torch.tensor(list(self.lengths), device=x.device)
            self.captured[site] = self.pool(x, lengths).float()
        return x

    def finish(self) -> None:
        """Check that every edit ran.

        Raises RuntimeError if a hook did not fire: an answer without its edits must not leave.
        """
        if self._pending or self._pending_gates:
            missing = sorted(map(str, self._pending | self._pending_gates))
            raise RuntimeError(f"the forward pass did not reach the sites {', '.join(missing)}")

    def _columns(self) -> Tensor:
        return torch.arange(max(self.lengths), device=self.plan.device)

    def _phases(self) -> Tensor:
        """`[B, T, 6]`: 1 where a column's position is in the phase, by `_phase_index`."""
        if self._phase_table is None:
            device, dtype = self.plan.device, self.plan.dtype
            starts = torch.tensor(list(self.starts), device=device)[:, None]
            positions = starts + self._columns()
            ends = torch.tensor([r.prompt_length for r in self.plan.rows], device=device)[:, None]
            phases = (
                positions < ends,
                positions >= ends,
                torch.ones_like(positions, dtype=torch.bool),
            )
            later = positions > 0
            masks = [mask for phase in phases for mask in (phase, phase & later)]
            self._phase_table = torch.stack(masks, -1).to(dtype)
        return self._phase_table

    def _gate_table(self, columns: int) -> Tensor:
        if self.gates is None:
            self.gates = torch.full(
                (self._entries, columns),
                1.0 if self.force_gates is None else self.force_gates,
                device=self.plan.device,
                dtype=self.plan.dtype,
            )
        return self.gates

    def _read_gates(self, stack: _GateStack, x: Tensor) -> None:
        table = self._gate_table(x.shape[1])
        projection = torch.einsum("ktd,kd->kt", x[stack.rows].to(self.plan.dtype), stack.direction)
        columns = torch.arange(x.shape[1], device=x.device)
        rows = self.plan.rows
        for k, (i, _) in enumerate(stack.keys):
            if not stack.latches[k]:
                continue
            if self.starts[i] < rows[i].prompt_length:
                inside = columns < rows[i].prompt_length
                if bool(stack.mean[k]):
                    projection[k] = projection[k][inside].mean()
                else:
                    projection[k] = projection[k, rows[i].prompt_length - 1].clone()
        open_ = (projection > stack.threshold) == stack.above
        values = torch.where(stack.linear, projection, open_.to(projection.dtype))
        for k, (i, j) in enumerate(stack.keys):
            if not stack.latches[k]:
                continue
            if self.starts[i] < rows[i].prompt_length:
                rows[i].latched[j] = values[k, 0].clone()
            else:
                values[k] = rows[i].latched[j]
        table[stack.entries] = values

    def _edit(self, stack: _SiteStack, x: Tensor) -> Tensor:
        selected = (x if stack.rows is None else x[stack.rows]).to(self.plan.dtype)
        inner = torch.baddbmm(stack.constant, selected, stack.read)  # [N, T, C]
        if not self.generating:
            table = self._phases() if stack.rows is None else self._phases()[stack.rows]
            inner = inner * table.gather(2, stack.phase[:, None].expand(-1, x.shape[1], -1))
        if stack.gated is not None:
            n, column, entry = stack.gated
            inner[n, :, column] *= self._gate_table(x.shape[1])[entry]
        change = torch.bmm(inner, stack.write)
        if self.measure:
            self._norms.append(self._measure(stack, selected, change))
        edited = (selected + change).to(x.dtype)
        if stack.rows is None:
            return edited
        out = x.clone()
        out[stack.rows] = edited
        return out

    def _measure(
        self, stack: _SiteStack, x: Tensor, change: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Row indices, norm of the state and norm of the change, each `[N]`."""
        rows, columns, _ = self._measured
        rows = rows if stack.rows is None else stack.rows
        if x.shape[1] == 1:
            x, change = x[:, 0], change[:, 0]
        else:
            each = torch.arange(len(x), device=x.device)
            x, change = x[each, columns[rows]], change[each, columns[rows]]
        norm = torch.linalg.vector_norm
        return rows, norm(x, dim=-1), norm(change, dim=-1)

    @cached_property
    def _measured(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row indices, the columns at which `edit_norm` is measured, and whether they are in this
        call, each `[B]`."""
        columns = [
            row.prompt_length - 1 - start if start < row.prompt_length else length - 1
            for row, start, length in zip(self.plan.rows, self.starts, self.lengths, strict=True)
        ]
        wanted = torch.tensor(columns)
        last = torch.tensor(list(self.lengths)) - 1
        device = self.plan.device
        rows = torch.arange(len(columns), device=device)
        return rows, wanted.minimum(last).to(device), (wanted <= last).to(device)

    @cached_property
    def edit_norm(self) -> Tensor | None:
        """`[B]` when the call is done: with `measure`, norm of the change over norm of the state,
        the largest over the sites. It is that of the last prompt token of a row that reads its
        prompt, 0 if this call does not reach it, and of the last column of a row that generates."""
        if not self.measure:
            return None
        largest = torch.zeros(len(self.plan.rows), device=self.plan.device)
        if self._norms:
            # All sites at once, since each operation on so little costs more than what it computes.
            rows, states, changes = map(torch.cat, zip(*self._norms, strict=True))
            ratios = torch.where(self._measured[2][rows], changes / states.clamp_min(1e-12), 0.0)
            largest.scatter_reduce_(0, rows, ratios.float(), "amax")
        return largest


class Steering:
    """The hooks of one model. A context manager: leaving it removes every hook.

    Hooks do nothing outside `step`, and inside one only at sites its plan or capture names. One
    model is steered by one thread at a time.
    """

    def __init__(self, sites: ModelSites) -> None:
        self.sites = sites
        # By module and whether at its input: the sites it serves, and the hook.
        self._sites_of_hook: dict[tuple[int, bool], list[Site]] = {}
        self._handles: dict[tuple[int, bool], torch.utils.hooks.RemovableHandle] = {}
        self._step: Step | None = None

    def __enter__(self) -> Steering:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.detach()

    @property
    def attached(self) -> frozenset[Site]:
        return frozenset(site for sites in self._sites_of_hook.values() for site in sites)

    def attach(self, sites: Iterable[Site]) -> None:
        """Hook these sites, those not hooked yet. ValueError if the model lacks one.

        Points that share a module (`attn_out` and `attn_add` without a post-norm) share a hook,
        which serves them in the order of the forward pass.
        """
        wanted = [(site, self.sites.module_at(site)) for site in set(sites) - self.attached]
        for site, module in wanted:
            at_input = site.point == "resid_pre"
            key = id(module), at_input
            served = self._sites_of_hook.setdefault(key, [])
            served.append(site)
            served.sort(key=lambda s: s.order)
            if len(served) == 1 and at_input:
                hook = self._pre_hook(served)
                self._handles[key] = module.register_forward_pre_hook(hook, with_kwargs=True)
            elif len(served) == 1:
                self._handles[key] = module.register_forward_hook(self._hook(served))

    def detach(self, sites: Collection[Site] | None = None) -> None:
        """Unhook these sites, all by default. Never inside a step."""
        for key, served in list(self._sites_of_hook.items()):
            served[:] = [site for site in served if sites is not None and site not in sites]
            if not served:
                self._handles.pop(key).remove()
                del self._sites_of_hook[key]

    @contextmanager
    def step(
        self,
        plan: BatchPlan,
        starts: Sequence[int],
        lengths: Sequence[int],
        *,
        capture: Collection[Site] = (),
        measure: bool = False,
        record: bool = False,
        force_gates: float | None = None,
        pool: Pool = last_token,
    ) -> Iterator[Step]:
        """Run exactly one forward call of the model under `plan` inside this block.

        Args:
            starts: position of each row's first column in its sequence.
            lengths: columns of each row that hold tokens.
            capture: sites whose state is wanted.
            pool: what to keep of it; each row's last column by default.
            measure: also measure `edit_norm`.
            record: also keep the whole state before and after each edit (self-test).
            force_gates: replace every gate's value (self-test).

        Raises:
            ValueError: if a site is not attached, a row's prompt is split that must not be, or
                the call's rows are not the plan's.
            RuntimeError: if the forward pass did not reach an edited site.
        """
        missing = (plan.sites | set(capture)) - self.attached
        if missing:
            raise ValueError(f"attach these sites first: {', '.join(sorted(map(str, missing)))}")
        if self._step is not None:
            raise RuntimeError("a step is already under way; one thread steers a model")
        self._step = Step(plan, starts, lengths, capture, measure, record, force_gates, pool)
        try:
            yield self._step
            self._step.finish()
        finally:
            self._step = None

    def _pre_hook(self, sites: list[Site]) -> Callable[..., Any]:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._step is None:
                return None
            if args:
                return (self._step.at(sites, args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": self._step.at(sites, kwargs["hidden_states"])}

        return hook

    def _hook(self, sites: list[Site]) -> Callable[..., Any]:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            if self._step is None:
                return None
            if isinstance(output, tuple):
                return (self._step.at(sites, output[0]), *output[1:])
            return self._step.at(sites, output)

        return hook
