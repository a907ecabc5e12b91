"""A worker's side of steering: fills the buffers before a step, and reads them after it.

    begin(new, finished) -> fill(batch) -> [the model runs] -> collect(logits)

Knows nothing of vLLM: `worker` tells it what vLLM is about to do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from server.engine.vllm.columns import PlacedEdit
from server.engine.vllm.hooks import attach
from server.engine.vllm.layout import Layout
from server.engine.vllm.program import WATCHED, Needs, SiteProgram, TokenInputs
from server.engine.vllm.recipes import FIRST, PROMPT, REPLY, Recipe, Recipes
from server.engine.vllm.wire import AskedEdit, Report, RowSteering, unpack_edits, unpack_tensors
from steering.edit import AppliedEdit, Site
from steering.monitor import refusal_log_odds
from steering.selftest import check_change

logger = logging.getLogger(__name__)

Send = Callable[[list[Report]], None]
SPLIT = "split"
"""Why a row failed whose prompt was to be read in one step and was not."""
_WATCHED_EACH = WATCHED // 2


@dataclass
class _Row:
    """A request, from its first step to its last; preempted ones stay."""

    steering: RowSteering
    prompt_length: int
    recipe: Recipe | None
    latches: bool
    latch: int = 0
    """Its row in the buffers of latched gates, 0 for none."""
    latched: bool = False
    failed: bool = False


@dataclass
class _Read:
    """One token of the step under way whose readings are wanted."""

    row: _Row
    index: int
    """Of its request in the batch, and so of its logits."""
    token: int
    reply: int
    """Of the token that will be chosen, counted from 0 in the reply."""


@dataclass
class _Check:
    """Watched tokens of the step under way."""

    row: _Row
    watched: list[int]
    positions: list[int]


@dataclass
class _Step:
    reads: list[_Read] = field(default_factory=list)
    checks: list[_Check] = field(default_factory=list)
    failed: list[Report] = field(default_factory=list)


class Steerer:
    """The programs of the blocks that this worker has, and the requests it is running.

    Args:
        layers: the model's decoder blocks, by their number in the model; gets the programs.
        tokens: the most in one step, padding included.
        dtype: of the hidden states.
        reports: whether this worker tells what was read; of workers that hold the same states one
            does. All tell what they found in a check.
        eager: no graph is made of the programs, so that they may leave out what a step needs not.
    """

    send: Send
    """Takes reports to the server."""

    def __init__(
        self,
        layout: Layout,
        layers: Mapping[int, nn.Module],
        *,
        tokens: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        reports: bool = True,
        eager: bool = False,
    ) -> None:
        self.layout = layout
        self.eager = eager
        self.reports = reports
        self.dtype = dtype
        self.device = torch.device(device)
        self.inputs = TokenInputs(tokens, device)
        self.programs = self._make_programs(set(layers))
        for layer, block in layers.items():
            here = {site: p for site, p in self.programs.items() if site.layer == layer}
            if here:
                attach(block, here)
        self.send: Send = lambda reports: None
        self._placed: dict[int, PlacedEdit] = {}
        self._gates: dict[tuple[str, int], int] = {}
        """The number of the gate that is read there."""
        self._rows: dict[str, _Row] = {}
        self._free_latches = list(range(1, layout.latches))
        self._filled = [0] * len(self._per_token())
        """Of each input, the tokens from 0 on that may not be zero."""
        self._watching = False
        self._step: _Step | None = None
        self._later = ThreadPoolExecutor(1, thread_name_prefix="reports")

    def _make_programs(self, layers: set[int]) -> dict[Site, SiteProgram]:
        layout = self.layout
        sites = [site for site in layout.sites if site.layer in layers]
        edited = [str(site) for site in sites if str(site) in layout.edits]
        table = torch.zeros(max(1, len(edited)), layout.slots, layout.columns, device=self.device)
        places = {site: i for i, site in enumerate(edited)}
        self._recipes = Recipes(table, places)
        programs: dict[Site, SiteProgram] = {}
        for site in sites:
            name = str(site)
            empty = table.new_zeros(layout.slots, 0)
            programs[site] = SiteProgram(
                self.inputs,
                layout.hidden_size,
                table[places[name]] if name in places else empty,
                gates=layout.edits.get(name, 0),
                latches=layout.latches,
                probes=layout.probes.get(name, 0),
                sources=list(programs.values()),
            )
        return programs

    # Between two steps.

    @torch.inference_mode()
    def put_probes(self, data: bytes) -> None:
        """Take the monitor's probe directions `[D, P]`, by site."""
        for name, directions in unpack_tensors(data).items():
            if (program := self.programs.get(Site.parse(name))) is not None:
                program.probe.copy_(directions)

    @torch.inference_mode()
    def put_edits(self, data: bytes, drop: Sequence[int] = ()) -> None:
        """Write edits into their columns, and forget the edits numbered in `drop`.

        Raises ValueError where a gate is read on another pipeline stage than its edit's.
        """
        for number in drop:
            self._placed.pop(number, None)
        for placed in unpack_edits(data):
            edit, gate = placed.edit, placed.gate
            source = None if gate is None else self.programs.get(gate.gate.site)
            if gate is not None and source is not None:
                place = str(gate.gate.site), gate.index
                if self._gates.get(place) != gate.number:  # else requests may have latched it
                    source.put_gate(gate.gate, gate.index, gate.column)
                    self._gates[place] = gate.number
            program = self.programs.get(edit.site)
            if program is not None:
                if gate is not None and source is None:
                    raise ValueError(
                        f"the gate at {gate.gate.site} is read on another pipeline stage than its "
                        f"edit at {edit.site}; use tensor parallelism for this profile"
                    )
                shift = edit.shift if edit.has_shift else None
                program.put_columns(placed.columns, edit.read, edit.write, shift)
                program.drive(placed.columns, source, 0 if gate is None else gate.index)
            self._placed[placed.number] = placed

    # Each step.

    def begin(
        self, new: Iterable[tuple[str, int, Mapping[str, Any] | None]], finished: Iterable[str]
    ) -> None:
        """Take in requests (id, prompt length, `RowSteering` as JSON) and drop those that ended.

        A request that comes back after it was preempted is known already.
        """
        for request_id in finished:
            row = self._rows.pop(request_id, None)
            if row is not None and row.latch:
                self._free_latches.append(row.latch)
        for request_id, prompt_length, asked in new:
            if asked is not None and request_id not in self._rows:
                steering = RowSteering.from_json(asked)
                latches = any(self._latches(edit) for edit in steering.edits)
                recipe = self._recipes.recipe(steering.edits)
                self._rows[request_id] = _Row(steering, prompt_length, recipe, latches)

    def _latches(self, asked: AskedEdit) -> bool:
        placed = self._placed.get(asked.number)
        return placed is not None and placed.edit.needs_whole_prompt

    @torch.inference_mode()
    def clear(self) -> None:
        """No token of the next step is anybody's (a dummy run, which tells vLLM what a step takes:
        all of it is run)."""
        self._step = None
        self.inputs.needs = Needs()
        if any(self._filled):
            for buffer, filled in zip(self._per_token(), self._filled, strict=True):
                buffer[:filled] = 0
            self._filled = [0] * len(self._filled)
        if self._watching:
            self.inputs.watch.zero_()
            self._watching = False

    def _per_token(self) -> tuple[Tensor, ...]:
        inputs = self.inputs
        return inputs.slot, inputs.latch, inputs.last, inputs.mean, inputs.forced

    @torch.inference_mode()
    def fill(
        self, request_ids: Sequence[str], starts: Sequence[int], counts: Sequence[int]
    ) -> None:
        """Write the inputs of the step to come.

        Args:
            request_ids: in the order of the batch.
            starts: position of each one's first token in its sequence.
            counts: tokens of each, side by side.
        """
        rows = [self._rows.get(request_id) for request_id in request_ids]
        if not any(rows):
            self.clear()
            self._need(edits=False, readings=False, watched=False)
            return
        total = max(int(sum(counts)), *self._filled)
        slot, latch = (np.zeros(total, np.int64) for _ in range(2))
        last, mean, forced = (np.zeros(total, np.float32) for _ in range(3))
        watch: list[int] = []
        step = _Step()
        in_use = {row.recipe for row in rows if row is not None}
        at = 0
        for index, (row, start, count) in enumerate(zip(rows, starts, counts, strict=True)):
            start, count = int(start), int(count)
            end = at + count
            if row is not None:
                length = row.prompt_length
                if row.recipe is not None and not row.failed:
                    try:
                        base = self._recipes.slot(row.recipe, self._placed, in_use)
                    except KeyError as error:
                        self._fail(row, step, f"edit {error} is not registered")
                        at = end
                        continue
                    border = at + min(max(length - start, 0), count)
                    slot[at:border] = base + PROMPT
                    slot[border:end] = base + REPLY
                    if start == 0:
                        slot[at] = base + FIRST
                if row.latches and not row.failed and self._latch(row, start, count, step):
                    latch[at:end] = row.latch
                    if not row.latched:
                        row.latched = True
                        last[at + length - 1] = 1.0
                        mean[at : at + length] = 1.0 / length
                if row.steering.check:
                    forced[at:end] = 1.0
                    if len(watch) <= WATCHED - _WATCHED_EACH:
                        chosen = sorted({0, min(1, count - 1), count // 2, count - 1})
                        places = list(range(len(watch), len(watch) + len(chosen)))
                        step.checks.append(_Check(row, places, [start + i for i in chosen]))
                        watch += [at + i for i in chosen]
                if (row.steering.report and start < length == start + count) or (
                    row.steering.trace and start + count >= length
                ):
                    step.reads.append(_Read(row, index, end - 1, start + count - length))
            at = end
        inputs: list[np.ndarray[Any, Any]] = [slot, latch, last, mean, forced]
        for i, (buffer, values) in enumerate(zip(self._per_token(), inputs, strict=True)):
            filled = at if values.any() else 0
            if filled or self._filled[i]:
                buffer[:total] = self._on_device(values)
            self._filled[i] = filled
        if watch or self._watching:
            # All of them: what is left from a longer step would be out of this one's range.
            watched = np.array(watch + [0] * (WATCHED - len(watch)))
            self.inputs.watch.copy_(self._on_device(watched))
            self._watching = bool(watch)
        if watch:
            for program in self.programs.values():
                program.watched.fill_(torch.nan)  # what a graph without the hook leaves there
        edits = bool(self._filled[0] or self._filled[1])
        self._need(edits=edits, readings=bool(step.reads), watched=bool(watch))
        self._step = step

    def _need(self, **needs: bool) -> None:
        if self.eager:
            self.inputs.needs = Needs(**needs)

    def _on_device(self, values: np.ndarray[Any, Any]) -> Tensor:
        tensor = torch.from_numpy(values)
        if self.device.type == "cpu":
            return tensor
        # Pinned memory of its own each time: the step before may still be copying from its.
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _latch(self, row: _Row, start: int, count: int, step: _Step) -> bool:
        """Whether the row has its gates or gets them in this step."""
        if row.latched:
            return True
        if start or count < row.prompt_length:
            self._fail(row, step, SPLIT)
            return False
        if not self._free_latches:
            self._fail(row, step, "too many requests with gates over the prompt are under way")
            return False
        row.latch = self._free_latches.pop()
        for program in self.programs.values():
            if program.gates:
                program.latched[row.latch] = 0.0
        return True

    def _fail(self, row: _Row, step: _Step, reason: str) -> None:
        row.failed = True
        step.failed.append({"key": row.steering.key, "failed": reason})

    @torch.inference_mode()
    def collect(self, logits: Tensor | None) -> None:
        """Send what the step has read. Does nothing the second time.

        Args:
            logits: `[requests, V]` as the model gave them, None where this worker has none.
        """
        step, self._step = self._step, None
        if step is None:
            return
        if step.checks:
            self.send([self._check(check) for check in step.checks])
        if step.failed and self.reports:
            self.send(step.failed)
        if step.reads and self.reports:
            values, names = self._readings(step.reads, logits)
            self._deliver(step.reads, values, names)

    def _deliver(self, reads: list[_Read], values: Tensor, names: list[str]) -> None:
        if values.device.type == "cpu":
            self._tell(reads, values, names)
            return
        # Nobody waits here for the device, which is still at it; the next step can be prepared.
        arrived = torch.empty(values.shape, pin_memory=True)
        arrived.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()

        def tell() -> None:
            try:
                copied.synchronize()
                self._tell(reads, arrived, names)
            except Exception:  # nobody waits for this thread's result
                logger.exception("what a step has read could not be sent")

        self._later.submit(tell)

    def _tell(self, reads: list[_Read], values: Tensor, names: list[str]) -> None:
        reports: list[Report] = []
        for read, row in zip(reads, values.tolist(), strict=True):
            key = {"key": read.row.steering.key, "reply": read.reply}
            reports.append({**key, "read": dict(zip(names, row, strict=True))})
        self.send(reports)

    def _readings(self, reads: list[_Read], logits: Tensor | None) -> tuple[Tensor, list[str]]:
        """`[reads, values]` and what each column is called."""
        tokens = torch.tensor([read.token for read in reads], device=self.device)
        parts: list[Tensor] = []
        names: list[str] = []
        edited = [p for p in self.programs.values() if p.columns]
        norms = [p.norm.index_select(0, tokens) for p in edited]
        parts.append(torch.stack(norms).amax(0)[:, None] if norms else torch.zeros(len(reads), 1))
        names.append("norm")
        latches = torch.tensor([read.row.latch for read in reads], device=self.device)
        for site, program in self.programs.items():
            if program.probes:
                parts.append(program.probed.index_select(0, tokens))
                names += [f"probe.{site}.{i}" for i in range(program.probes)]
            if program.gates and any(read.row.latches for read in reads):
                parts.append(program.latched_values(latches))
                names += [f"gate.{site}.{i}" for i in range(program.gates)]
        if logits is not None and self.layout.refusal_token_ids:
            here = logits[torch.tensor([read.index for read in reads], device=logits.device)]
            parts.append(refusal_log_odds(here, self.layout.refusal_token_ids)[:, None])
            names.append("refusal")
        return torch.cat([part.to(self.device) for part in parts], dim=1), names

    def _check(self, check: _Check) -> Report:
        """Compare what was watched with the edits' definition, at every site of this worker."""
        row, problems = check.row, []
        edits = [
            AppliedEdit(self._placed[asked.number].edit.in_phase(asked.phase), asked.strength)
            for asked in row.steering.edits
        ]
        positions = torch.tensor(check.positions)
        for site, program in self.programs.items():
            if not program.columns:
                continue
            x, before, after = program.watched[check.watched].cpu().unbind(1)
            here = [applied for applied in edits if applied.edit.site == site]
            try:
                if not here and not torch.equal(before, after):
                    raise ValueError(f"tokens without edits are changed at {site}")
                check_change(
                    site, f"at positions {check.positions}", here, x, before, after, positions,
                    row.prompt_length, self.dtype,
                )  # fmt: skip
            except ValueError as error:
                problems.append(str(error))
        return {"key": row.steering.key, "positions": check.positions, "problems": problems}
