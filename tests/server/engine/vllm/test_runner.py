"""Both of vLLM's model runners, played by stand-ins with the calls and fields of their sources."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from server.engine.vllm.columns import Columns
from server.engine.vllm.hooks import decoder_layers
from server.engine.vllm.layout import plan_layout
from server.engine.vllm.runner import steer
from server.engine.vllm.steerer import Steerer
from server.engine.vllm.wire import ARGUMENT, AskedEdit, RowSteering, pack_edits
from tests.server.engine.vllm.blocks import FakeModel
from tests.steering.edits import SIZE, random_edit

EDIT = random_edit("1.resid_post", 2, phase="prompt")
PROMPTS = {"a": [1, 2, 3, 4, 5], "b": [9, 8, 7]}


def scheduler_output(
    counts: dict[str, int], *, new: Sequence[str] = (), finished: Sequence[str] = ()
) -> Any:
    asked = {"a": RowSteering("a", (AskedEdit(1, 0.7, "prompt"),), report=True), "b": None}

    def params(name: str) -> Any:
        row = asked[name]
        return SimpleNamespace(extra_args=None if row is None else {ARGUMENT: row.to_json()})

    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(
                req_id=name, prompt_len=len(PROMPTS[name]), sampling_params=params(name)
            )
            for name in new
        ],
        finished_req_ids=set(finished),
        num_scheduled_tokens=counts,
    )


class Runner:
    """What both have in common: order of their own, dummy runs, logits of each one's last token."""

    def __init__(self, computed: dict[str, int]) -> None:
        self.model = FakeModel()
        self.computed = computed
        self.max_num_tokens = 16
        self.logits: torch.Tensor | None = None

    def get_model(self) -> FakeModel:
        return self.model

    def order(self, counts: dict[str, int]) -> list[str]:
        return sorted(counts, reverse=True)

    def forward(self, names: list[str], counts: dict[str, int], padded: int = 16) -> None:
        tokens, ends = [], []
        for name in names:
            start = self.computed.get(name, 0)
            tokens += (PROMPTS[name] + [6] * 9)[start : start + counts[name]]
            ends.append(len(tokens))
        self.model.borders = [0, *ends]
        tokens += [0] * (padded - len(tokens))
        self.hidden = self.model(torch.tensor(tokens))
        self.logits = self.model.compute_logits(self.hidden[torch.tensor(ends) - 1])
        for name in names:
            self.computed[name] = self.computed.get(name, 0) + counts[name]

    def _dummy_run(self, tokens: int, *args: Any, uniform_decode: bool = False) -> torch.Tensor:
        self.model.borders = [0, tokens]
        return self.model(torch.zeros(tokens, dtype=torch.long))


class FirstRunner(Runner):
    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> None:
        counts = scheduler_output.num_scheduled_tokens
        names = self.order(counts)
        computed = np.array([self.computed.get(n, 0) for n in names] + [77, 77])
        self.input_batch = SimpleNamespace(
            req_ids=names, num_reqs=len(names), num_computed_tokens_cpu=computed
        )
        self._prepare_inputs(scheduler_output, np.array([counts[n] for n in names]))
        self.forward(names, counts)

    def _prepare_inputs(self, scheduler_output: Any, num_scheduled_tokens: Any) -> None:
        pass


class SecondRunner(Runner):
    def execute_model(self, scheduler_output: Any, intermediate_tensors: Any = None) -> None:
        counts = scheduler_output.num_scheduled_tokens
        batch = self.prepare_inputs(scheduler_output, None, None, 0)
        self.forward(batch.req_ids, counts, batch.num_tokens_after_padding)

    def prepare_inputs(
        self, scheduler_output: Any, state: Any, desc: Any, num_active_loras: int
    ) -> Any:
        counts = scheduler_output.num_scheduled_tokens
        names = self.order(counts)
        return SimpleNamespace(
            req_ids=names,
            num_scheduled_tokens=np.array([counts[n] for n in names]),
            num_computed_tokens_np=np.array([self.computed.get(n, 0) for n in names]),
            num_tokens_after_padding=16,
        )


@pytest.fixture(params=[FirstRunner, SecondRunner], ids=["first", "second"])
def steered(request: pytest.FixtureRequest) -> tuple[Any, list[dict[str, Any]]]:
    layout = plan_layout([EDIT], None, hidden_size=SIZE, columns=8, max_num_seqs=4)
    runner = request.param({})
    steerer = Steerer(
        layout, dict(enumerate(decoder_layers(runner.model))), tokens=16, dtype=torch.float32
    )
    steerer.put_edits(pack_edits(Columns(layout).place([EDIT])))
    reports: list[dict[str, Any]] = []
    steerer.send = reports.extend
    steer(runner, steerer, last_stage=True)
    return runner, reports


@torch.inference_mode()
def plain(tokens: list[int]) -> torch.Tensor:
    model = FakeModel()
    model.borders = [0, len(tokens)]
    return model(torch.tensor(tokens))


@torch.inference_mode()
def test_tokens_meet_the_edits_of_their_request_in_the_runners_own_order(
    steered: tuple[Any, list[dict[str, Any]]],
) -> None:
    runner, reports = steered
    runner.execute_model(scheduler_output({"a": 5, "b": 3}, new=["a", "b"]))
    b, a = runner.hidden[:3], runner.hidden[3:8]
    assert torch.allclose(b, plain(PROMPTS["b"]), atol=1e-5)
    assert not torch.allclose(a, plain(PROMPTS["a"]), atol=1e-3)
    assert torch.allclose(runner.hidden[8:], plain([0] * 8), atol=1e-5), "padding was edited"
    assert [report["key"] for report in reports] == ["a"]


@torch.inference_mode()
def test_a_resumed_request_keeps_its_edits_and_reports_once(
    steered: tuple[Any, list[dict[str, Any]]],
) -> None:
    """The second runner is given resumed requests as new ones, with what they have generated."""
    runner, reports = steered
    runner.execute_model(scheduler_output({"a": 5}, new=["a"]))
    first = runner.hidden[:5].clone()
    runner.execute_model(scheduler_output({"a": 1}))
    runner.computed["a"] = 0
    again = ["a"] if isinstance(runner, SecondRunner) else []
    runner.execute_model(scheduler_output({"a": 6}, new=again))
    assert torch.allclose(runner.hidden[:5], first, atol=1e-5)
    assert len(reports) == 1


@torch.inference_mode()
def test_dummy_runs_are_nobodys(steered: tuple[Any, list[dict[str, Any]]]) -> None:
    runner, _ = steered
    runner.execute_model(scheduler_output({"a": 5}, new=["a"]))
    assert torch.equal(runner._dummy_run(5, uniform_decode=True), plain([0] * 5))


@torch.inference_mode()
def test_a_finished_requests_name_may_come_back_as_anothers(
    steered: tuple[Any, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, _ = steered
    runner.execute_model(scheduler_output({"a": 5}, new=["a"]))
    runner.computed.clear()
    unsteered = scheduler_output({"a": 5}, new=["a"], finished=["a"])
    unsteered.scheduled_new_reqs[0].sampling_params.extra_args = None
    runner.execute_model(unsteered)
    assert torch.allclose(runner.hidden[:5], plain(PROMPTS["a"]), atol=1e-5)


def test_another_runner_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no _prepare_inputs"):
        steer(SimpleNamespace(), None, last_stage=True)  # type: ignore[arg-type]
