"""The worker's side, on a model of vLLM's form: what edits do, phases, gates, reports, checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.vllm.columns import Columns, PlacedEdit
from server.engine.vllm.hooks import decoder_layers
from server.engine.vllm.layout import plan_layout, probes_of
from server.engine.vllm.program import SiteProgram
from server.engine.vllm.steerer import SPLIT, Steerer
from server.engine.vllm.wire import AskedEdit, RowSteering, pack_edits, pack_tensors
from steering.edit import AppliedEdit, Edit, Site, effective_edits
from steering.monitor import Monitor, Probe, refusal_log_odds
from steering.plan import last_token
from tests.server.engine.vllm.blocks import FakeModel
from tests.steering.edits import SIZE, mixture, random_edit, random_gate

MIXTURE = mixture()
PROMPTS = {name: [(7 * i + k) % 50 for k in range(5 + i)] for i, name in enumerate(MIXTURE)}
REFUSALS = (3, 5)


class Rig:
    """A steered model and an unsteered one with the same weights."""

    def __init__(
        self,
        edits: Sequence[AppliedEdit],
        monitor: Monitor | None = None,
        *,
        eager: bool = False,
        **settings: Any,
    ) -> None:
        self.model, self.plain = FakeModel(), FakeModel()
        self.layout = plan_layout(
            [a.edit for a in edits], monitor, hidden_size=SIZE,
            **{"columns": 32, "max_num_seqs": 16, **settings},
        )  # fmt: skip
        self.columns = Columns(self.layout)
        self.steerer = Steerer(
            self.layout,
            dict(enumerate(decoder_layers(self.model))),
            tokens=256,
            dtype=torch.float32,
            eager=eager,
        )
        self.reports: list[dict[str, Any]] = []
        self.steerer.send = self.reports.extend
        self.steerer.put_edits(pack_edits(self.columns.place(a.edit for a in edits)))
        if monitor is not None:
            directions = {
                site: torch.stack(
                    [p.direction for p in probes_of(monitor).values() if str(p.site) == site], 1
                )
                for site in self.layout.probes
            }
            self.steerer.put_probes(pack_tensors(directions))

    def row(self, name: str, edits: Sequence[AppliedEdit], **flags: bool) -> Mapping[str, Any]:
        found = [(self.columns.find(a.edit), a) for a in effective_edits(edits)]
        asked = tuple(
            AskedEdit(p.number, a.strength, a.edit.phase) for p, a in found if p is not None
        )
        assert len(asked) == len(found)
        return RowSteering(name, asked, **flags).to_json()

    def step(self, names: Sequence[str], starts: Sequence[int], counts: Sequence[int]) -> Tensor:
        """The stream `[T, D]` after the next tokens of these requests."""
        tokens = [
            token
            for name, start, count in zip(names, starts, counts, strict=True)
            for token in PROMPTS[name][start : start + count]
        ]
        self.steerer.fill(names, starts, counts)
        ends = torch.tensor(counts).cumsum(0)
        borders = [0, *ends.tolist()]
        self.model.borders = self.plain.borders = borders
        with torch.inference_mode():
            hidden = self.model(torch.tensor(tokens))
            logits = self.model.compute_logits(hidden[ends - 1])
        self.steerer.collect(logits)
        return hidden


def expected(rig: Rig, name: str, edits: Sequence[AppliedEdit], prompt_length: int) -> Tensor:
    """The same computed alone, token sequence by token sequence, with the definition's formulas."""
    state: dict[int, Tensor] = {}
    h = rig.plain.embed(torch.tensor(PROMPTS[name]))
    rig.plain.borders = [0, len(h)]
    position = torch.arange(len(h))

    def at(site: str, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for i, applied in enumerate(edits):
            gate = applied.edit.gate
            if gate is not None and str(gate.site) == site:
                read = x @ gate.direction
                if gate.reduce == "last_prompt_token":
                    read = read[prompt_length - 1].expand(len(x))
                elif gate.reduce == "prompt_mean":
                    read = read[:prompt_length].mean().expand(len(x))
                state[i] = gate.value(read)[:, None]
        for i, applied in enumerate(edits):
            edit = applied.edit
            if str(edit.site) != site:
                continue
            met = {
                "prompt": position < prompt_length,
                "generation": position >= prompt_length,
                "all": position >= 0,
            }[edit.phase]
            met = met & (position > 0) if edit.skip_first_token else met
            scale = applied.strength * state.get(i, torch.ones(len(x), 1)) * met[:, None]
            total += scale * edit.change(x)
        return x + total

    for layer, block in enumerate(rig.plain.model.layers):  # type: ignore[arg-type]
        x = at(f"{layer}.resid_pre", h)
        attended = at(f"{layer}.attn_out", block.self_attn(position, x))
        x = x + attended
        h = at(f"{layer}.resid_post", x + at(f"{layer}.mlp_out", block.mlp(x)))
    return h


@pytest.fixture(params=["graph", "eager"])
def rig(request: pytest.FixtureRequest) -> Rig:
    edits = [a for edits in MIXTURE.values() for a in edits]
    return Rig(edits, eager=request.param == "eager")


@torch.inference_mode()
def test_each_row_of_a_mixed_step_is_edited_as_it_asks_and_no_other(rig: Rig) -> None:
    names = list(MIXTURE)
    rig.steerer.begin([(n, len(PROMPTS[n]), rig.row(n, MIXTURE[n])) for n in names], finished=())
    counts = [len(PROMPTS[n]) for n in names]
    hidden = rig.step(names, [0] * len(names), counts)
    for name, part in zip(names, hidden.split(counts), strict=True):
        alone = expected(rig, name, MIXTURE[name], len(PROMPTS[name]))
        assert torch.allclose(part, alone, atol=1e-4), name
    plain = rig.plain
    plain.borders = [0, counts[0]]
    assert torch.equal(hidden[: counts[0]], plain(torch.tensor(PROMPTS["raw"])))


@torch.inference_mode()
def test_phase_is_position_against_the_prompt_as_it_was_sent(rig: Rig) -> None:
    """A resumed request reads its prompt and its reply in one piece."""
    names = [n for n in MIXTURE if not any(a.edit.needs_whole_prompt for a in MIXTURE[n])]
    rig.steerer.begin([(n, 3, rig.row(n, MIXTURE[n])) for n in names], finished=())
    counts = [len(PROMPTS[n]) for n in names]
    hidden = rig.step(names, [0] * len(names), counts)
    for name, part in zip(names, hidden.split(counts), strict=True):
        alone = expected(rig, name, MIXTURE[name], 3)
        assert torch.allclose(part, alone, atol=1e-4), name


@torch.inference_mode()
@pytest.mark.parametrize("name", ["last-prompt-token gate", "gate of an earlier block"])
def test_a_gate_over_the_prompt_stays_what_it_was(rig: Rig, name: str) -> None:
    """Latched when the prompt was read, it holds for the reply and for a resumed request, whose
    prompt may then come in pieces."""
    prompt_length = len(PROMPTS[name]) - 1
    rig.steerer.begin([(name, prompt_length, rig.row(name, MIXTURE[name]))], finished=())
    rig.step([name], [0], [prompt_length])
    rig.steerer.begin([(name, prompt_length, rig.row(name, MIXTURE[name]))], finished=())
    resumed = rig.step([name], [0], [prompt_length + 1])
    alone = expected(rig, name, MIXTURE[name], prompt_length)
    assert torch.allclose(resumed, alone, atol=1e-4)
    piece = rig.step([name], [0], [4])
    assert torch.allclose(piece, alone[:4], atol=1e-4)
    assert not rig.reports


@torch.inference_mode()
@pytest.mark.parametrize("between", [1, 2])
def test_a_gate_that_comes_back_is_read_anew(between: int) -> None:
    """Its old column may be another edit's by now, or hold what that one has left."""
    gated = AppliedEdit(random_edit("2.resid_post", 1, gate=random_gate("1.resid_post", seed=1)))
    others = [random_edit("1.resid_post", 1, seed=seed) for seed in (2, 3)]
    rig = Rig([gated, AppliedEdit(others[0])])

    def serve(*edits: Edit) -> None:
        rig.columns.keep_only(edits)
        rig.steerer.put_edits(pack_edits(rig.columns.place(edits)), rig.columns.removed)

    serve()
    serve(*others)
    serve(*others[between:])
    serve(*others[between:], gated.edit)
    rig.steerer.begin([("sublayers", 7, rig.row("key", [gated]))], finished=())
    hidden = rig.step(["sublayers"], [0], [7])
    assert torch.allclose(hidden, expected(rig, "sublayers", [gated], 7), atol=1e-4)


def test_a_split_prompt_is_reported_where_a_gate_needs_it_whole(rig: Rig) -> None:
    name = "last-prompt-token gate"
    rig.steerer.begin([(name, 10, rig.row(name, MIXTURE[name]))], finished=())
    rig.step([name], [0], [4])
    rig.step([name], [4], [6])
    assert rig.reports == [{"key": name, "failed": SPLIT}]


def test_rows_for_latched_gates_come_back_when_requests_end(rig: Rig) -> None:
    name = "last-prompt-token gate"
    for i in range(3 * rig.layout.latches):
        asked = rig.row(name, MIXTURE[name])
        rig.steerer.begin([(f"{i}", len(PROMPTS[name]), asked)], finished=[f"{i - 1}"])
        PROMPTS[f"{i}"] = PROMPTS[name]
        rig.step([f"{i}"], [0], [len(PROMPTS[name])])
    assert not rig.reports


@torch.inference_mode()
def test_more_recipes_than_there_are_slots_take_turns(rig: Rig) -> None:
    edits = MIXTURE["sublayers"]
    for i in range(2 * rig.layout.slots):
        changed = [AppliedEdit(a.edit, 0.01 * (i + 1)) for a in edits]
        rig.steerer.begin([("raw", 5, rig.row("raw", changed))], finished=["raw"])
        rig.steerer.begin([("raw", 5, rig.row("raw", changed))], finished=[])
        hidden = rig.step(["raw"], [0], [5])
    assert torch.allclose(hidden, expected(rig, "raw", changed, 5), atol=1e-4)


@torch.inference_mode()
def test_nothing_of_a_step_is_left_for_the_next(rig: Rig) -> None:
    rig.steerer.begin([("sublayers", 7, rig.row("sublayers", MIXTURE["sublayers"]))], finished=())
    rig.step(["sublayers"], [0], [7])
    steered = rig.model(torch.tensor(PROMPTS["raw"] * 2)[:7])
    rig.steerer.clear()  # as before a dummy run
    cleared = rig.model(torch.tensor(PROMPTS["raw"] * 2)[:7])
    assert not torch.equal(cleared, steered)
    assert torch.equal(cleared, rig.plain(torch.tensor(PROMPTS["raw"] * 2)[:7]))


@torch.inference_mode()
def test_eager_steps_leave_out_what_nobody_needs_and_graphs_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran: list[SiteProgram] = []
    edit = SiteProgram._change
    monkeypatch.setattr(
        SiteProgram, "_change", lambda self, *args: ran.append(self) or edit(self, *args)
    )
    edits = MIXTURE["sublayers"]
    for eager in (True, False):
        rig = Rig(edits, eager=eager)
        begun = [("raw", 5, rig.row("raw", ())), ("sublayers", 7, rig.row("sublayers", edits))]
        rig.steerer.begin(begun, finished=())
        for names, counts, all_needed in (
            (["raw"], [5], False),
            (["raw", "sublayers"], [5, 7], True),
            (["nobody"], [3], False),
        ):
            PROMPTS["nobody"] = PROMPTS["raw"]
            ran.clear()
            for program in rig.steerer.programs.values():
                program.norm.fill_(-1.0)
            rig.step(names, [0] * len(names), counts)
            assert len(ran) == (len(rig.steerer.programs) if all_needed or not eager else 0)
            measured = [bool((p.norm >= 0).any()) for p in rig.steerer.programs.values()]
            assert not any(measured) if eager else all(measured)
        rig.steerer.clear()  # a dummy run shows vLLM what a whole step takes
        ran.clear()
        rig.model(torch.tensor(PROMPTS["raw"]))
        assert len(ran) == len(rig.steerer.programs)


def probe(site: str, seed: int) -> Probe:
    direction = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)) * 0.1
    return Probe(Site.parse(site), direction, 0.0, 0.9, 0.0)


@torch.inference_mode()
@pytest.mark.parametrize("eager", [False, True])
def test_reports_hold_what_the_edited_model_shows_at_the_last_prompt_token(eager: bool) -> None:
    monitor = Monitor(
        base=None,  # type: ignore[arg-type]
        benign=(probe("3.resid_post", 1),),
        answer={"x": probe("3.resid_post", 2)},
        refusal_token_ids=REFUSALS,
    )
    edits = [AppliedEdit(random_edit("1.resid_pre", 2, seed=4), 0.5)]
    rig = Rig(edits, monitor, eager=eager)
    rig.steerer.begin([("raw", 5, rig.row("key", edits, report=True))], finished=())
    rig.step(["raw"], [0], [3])
    assert not rig.reports
    hidden = rig.step(["raw"], [0], [5])  # in one piece, so that the reference sees the same
    [report] = rig.reports
    x = last_token(expected(rig, "raw", edits, 5)[None], torch.tensor([5]))[0]
    assert (report["key"], report["reply"]) == ("key", 0)
    read = report["read"]
    for i, found in enumerate(probes_of(monitor).values()):
        value = float(x @ found.direction)
        assert read[f"probe.3.resid_post.{i}"] == pytest.approx(value, abs=1e-4)
    logits = rig.plain.compute_logits(hidden[-1])
    assert read["refusal"] == pytest.approx(float(refusal_log_odds(logits, REFUSALS)), abs=1e-4)
    assert read["norm"] > 0.01


def test_traced_requests_report_every_token_and_others_none(rig: Rig) -> None:
    traced = rig.row("traced", MIXTURE["sublayers"], trace=True)
    silent = rig.row("silent", MIXTURE["sublayers"], report=True)
    rig.steerer.begin([("sublayers", 4, traced), ("raw", 4, silent)], finished=())
    rig.step(["raw", "sublayers"], [0, 0], [4, 4])
    rig.step(["raw", "sublayers"], [4, 4], [1, 1])
    rig.step(["sublayers"], [5], [1])
    told = [(report["key"], report["reply"]) for report in rig.reports]
    assert told == [("silent", 0), ("traced", 0), ("traced", 1), ("traced", 2)]


def checked(rig: Rig) -> list[str]:
    rig.steerer.begin(
        [(name, 4, rig.row(name, MIXTURE[name], check=True)) for name in ("per-token gate", "raw")],
        finished=["per-token gate", "raw"],
    )
    rig.steerer.begin(
        [(name, 4, rig.row(name, MIXTURE[name], check=True)) for name in ("per-token gate", "raw")],
        finished=[],
    )
    rig.reports.clear()
    rig.step(["per-token gate", "raw"], [0, 0], [4, 4])
    rig.step(["raw", "per-token gate"], [4, 4], [1, 1])
    assert len(rig.reports) == 4
    return [problem for report in rig.reports for problem in report["problems"]]


def test_the_check_passes_sound_edits(rig: Rig) -> None:
    assert checked(rig) == []


def test_the_check_finds_a_wrong_column_a_leak_and_a_graph_without_the_hook(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site.parse("1.resid_pre")
    program = rig.steerer.programs[site]
    [edit] = [a.edit for a in MIXTURE["per-token gate"]]
    placed = rig.columns.find(edit)
    assert isinstance(placed, PlacedEdit)
    program.write[placed.columns[0]] *= 1.01
    assert "not the edit's" in checked(rig)[0]
    program.write[placed.columns[0]] /= 1.01
    program.coefficient[0, placed.columns[0]] = 0.5
    assert any("without edits" in problem for problem in checked(rig))
    program.coefficient[0] = 0.0
    monkeypatch.setattr(SiteProgram, "forward", lambda self, h, residual=None: h)
    assert len(checked(rig)) == 4 * len(rig.layout.edits)


def test_an_edit_that_is_not_there_fails_its_request(rig: Rig) -> None:
    asked = RowSteering("key", (AskedEdit(999, 1.0, "all"),)).to_json()
    rig.steerer.begin([("raw", 5, asked)], finished=())
    rig.step(["raw"], [0], [5])
    assert rig.reports == [{"key": "key", "failed": "edit 999 is not registered"}]


def test_one_profiles_overflow_stays_its_own() -> None:
    huge = random_edit("1.resid_post", 1, scale=1e19)
    rig = Rig([AppliedEdit(huge)])
    rig.steerer.begin([("sublayers", 7, rig.row("k", [AppliedEdit(huge, 1e19)]))], finished=())
    hidden = rig.step(["sublayers", "raw"], [0, 0], [7, 5])
    assert not hidden[:7].isfinite().all()
    with torch.inference_mode():
        rig.plain.borders = [0, 5]
        assert torch.equal(hidden[7:], rig.plain(torch.tensor(PROMPTS["raw"])))


def test_gates_must_be_read_on_the_stage_of_their_edit() -> None:
    gate = random_gate("0.resid_post", seed=1)
    edit = random_edit("2.resid_post", gate=gate)
    layout = plan_layout([edit], None, hidden_size=SIZE, columns=8, max_num_seqs=2)
    blocks = decoder_layers(FakeModel())
    stage = Steerer(layout, {i: blocks[i] for i in (2, 3)}, tokens=8, dtype=torch.float32)
    with pytest.raises(ValueError, match="pipeline stage"):
        stage.put_edits(pack_edits(Columns(layout).place([edit])))
