"""The benchmark that a machine with a GPU can run, on what there is here."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks.bench_hook import LLAMA_8B, SMALL, Decoder, Edits, main


def test_it_runs_small_on_a_processor_and_compares_every_arm(
    capsys: pytest.CaptureFixture[str],
) -> None:
    if torch.cuda.is_available():
        pytest.skip("it would run at full size")
    main(["--quick", "--columns", "16"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[4:]]
    # Batches of 1 and 16, two sets of layers, 1 profile or as many as rows.
    assert [row[0] for row in rows] == ["1", "1", "16", "16", "16", "16"]
    assert all(float(row[-3]) > 0 and 0 < float(row[-2]) <= 1 for row in rows)


def test_edits_change_what_is_decoded_where_a_row_has_a_profile_only() -> None:
    decoder = Decoder(SMALL, "cpu", torch.float32)
    edits = Edits(SMALL, range(SMALL.layers), 8, 4, "cpu")
    for program in edits.programs.values():
        program.write.mul_(1000)
    cache = torch.randn(SMALL.layers, 2, 4, SMALL.kv_heads, SMALL.context, SMALL.head)
    ids = torch.arange(4)
    register, fill = edits.for_profiles(4, 2)
    plain = decoder(ids, cache, {})
    assert torch.equal(decoder(ids, cache, edits.programs), plain), "nobody has a profile yet"
    register()
    fill()
    edits.inputs.slot[0] = 0
    edited = decoder(ids, cache, edits.programs)
    assert edited[0] == plain[0] and (edited[1:] != plain[1:]).any()


def test_the_bytes_of_a_step_are_the_weights_and_the_cache() -> None:
    assert LLAMA_8B.step_bytes(0, 2) == pytest.approx(2 * (8.03e9 - 128256 * 4096), rel=0.001)
    one = LLAMA_8B.step_bytes(1, 2) - LLAMA_8B.step_bytes(0, 2)
    assert one == 512 * 128 * 1024  # 128 KiB per token of context
