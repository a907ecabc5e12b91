"""Which columns hold which edit, and what a layout is."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from server.engine.base import RankLimitError
from server.engine.vllm.columns import Columns
from server.engine.vllm.layout import Layout, plan_layout
from server.engine.vllm.wire import AskedEdit, RowSteering, pack_edits, unpack_edits
from steering.edit import Edit, Site
from tests.steering.edits import SIZE, mixture, random_edit, random_gate


def make_layout(*edits: Edit, columns: int = 8, more: tuple[str, ...] = ()) -> Layout:
    return plan_layout(
        edits, None, hidden_size=SIZE, columns=columns,
        more=[Site.parse(site) for site in more], max_num_seqs=4,
    )  # fmt: skip


A, B = random_edit("1.resid_post", 3, seed=1), random_edit("1.resid_post", 2, seed=2)


def test_edits_never_share_columns_and_leave_theirs_to_others() -> None:
    columns = Columns(make_layout(A, B))
    [a], [b] = columns.place([A]), columns.place([B])
    assert len(a.columns) == 4 and len(b.columns) == 3  # a rank each, and a shift
    assert not set(a.columns) & set(b.columns)
    with pytest.raises(RankLimitError, match=r"2 more columns .* 1 of 8 are free"):
        columns.place([random_edit("1.resid_post", 1, seed=3)])
    columns.keep_only([B])
    [c] = columns.place([random_edit("1.resid_post", 4, seed=4)])  # in what is not one piece
    assert not set(c.columns) & set(b.columns)
    assert len({a.number, b.number, c.number}) == 3


def test_an_edit_in_another_phase_is_the_same_edit_and_an_equal_one_is_not() -> None:
    columns = Columns(make_layout(A))
    [placed] = columns.place([A])
    assert columns.find(A.in_phase("generation")) is placed
    assert columns.place([A]) == []
    assert columns.find(random_edit("1.resid_post", 3, seed=1)) is None


def test_columns_in_use_are_kept_until_the_request_ends() -> None:
    columns = Columns(make_layout(A))
    placed = columns.place([A])
    columns.use(placed)
    columns.keep_only([])
    assert columns.find(A) is placed[0]
    columns.release(placed)
    assert columns.find(A) is None and columns.removed == [placed[0].number]


def test_what_does_not_fit_leaves_nothing_behind() -> None:
    big = random_edit("2.resid_post", 20)
    columns = Columns(make_layout(A, big))
    with pytest.raises(RankLimitError, match="--max-site-rank"):
        columns.place([A, big])
    assert columns.find(A) is None and len(columns.place([A, B])) == 2


def test_equal_gates_share_a_column_where_they_are_read() -> None:
    gate = random_gate("1.resid_pre", seed=1)
    edits = [random_edit("2.resid_post", 1, seed=s, gate=gate) for s in (1, 2)]
    columns = Columns(make_layout(*edits))
    one, two = columns.place(edits)
    assert one.gate is two.gate is not None
    columns.keep_only(edits[:1])
    [again] = columns.place([random_edit("2.resid_post", 1, seed=3, gate=gate)])
    assert again.gate is one.gate
    columns.keep_only([])
    other = random_gate("1.resid_pre", seed=9)
    [fresh] = columns.place([random_edit("2.resid_post", 1, seed=4, gate=other)])
    assert fresh.gate is not None and fresh.gate.index == 0


def test_sites_without_columns_name_the_flag() -> None:
    columns = Columns(make_layout(A))
    elsewhere = random_edit("3.mlp_out")
    with pytest.raises(RankLimitError, match=r"--steer-site 3\.mlp_out"):
        columns.place([elsewhere])
    gated = random_edit("1.resid_post", gate=random_gate("1.resid_post"))
    with pytest.raises(RankLimitError, match="gate"):
        columns.place([gated])
    spare = Columns(make_layout(A, more=("3.mlp_out", "1.resid_post")))
    assert len(spare.place([elsewhere, gated])) == 2


def test_a_layout_is_what_a_graph_depends_on_and_no_values() -> None:
    layout = make_layout(A)
    same = make_layout(random_edit("1.resid_post", 7, seed=99))
    assert layout.to_json() == same.to_json()
    others = [
        make_layout(random_edit("1.resid_pre")),
        make_layout(A, columns=9),
        make_layout(A, more=("1.mlp_out",)),
        make_layout(random_edit("1.resid_post", gate=random_gate("1.resid_post"))),
        replace(layout, probes={"1.resid_post": 1}),
        replace(layout, slots=5),
    ]
    told = {json.dumps(one.to_json(), sort_keys=True) for one in (layout, *others)}
    assert len(told) == 7


def test_a_layout_survives_json_and_refuses_another_versions() -> None:
    layout = make_layout(A, more=("0.attn_out",))
    data = json.loads(json.dumps(layout.to_json()))
    assert Layout.from_json(data) == layout
    with pytest.raises(ValueError, match="same release"):
        Layout.from_json({**data, "version": -1})


def test_edits_arrive_at_workers_as_they_are() -> None:
    edits = [applied.edit for found in mixture().values() for applied in found]
    placed = Columns(make_layout(*edits, columns=32)).place(edits)
    for sent, received in zip(placed, unpack_edits(pack_edits(placed)), strict=True):
        assert received.edit.fingerprint == sent.edit.fingerprint
        assert (received.number, received.columns) == (sent.number, sent.columns)
        assert (received.gate is None) == (sent.gate is None)


def test_what_a_request_asks_survives_json() -> None:
    row = RowSteering("7", (AskedEdit(3, -0.25, "prompt"), AskedEdit(4, 1e-9, "all")), trace=True)
    assert RowSteering.from_json(json.loads(json.dumps(row.to_json()))) == row
