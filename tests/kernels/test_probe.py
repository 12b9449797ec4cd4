"""The probes: rates a computer can have, and the work that is counted is done."""

from __future__ import annotations

import pytest
import torch
from llmopt import _C
from llmopt.native import probe as probe_module
from llmopt.native.probe import CHAINS, LANE_OPS, TILE_FLOPS, TILE_OPS, Probe, measure
from llmopt.program import OneOp, run_op

TIERS = _C.tiers()
BYTE_TIERS = [t for t in TIERS if t != "scalar"]
WORD_TIERS = [t for t in TIERS if t in ("amx", "avx512_vnni")]
NIBBLE_TIERS = [t for t in TIERS if t in ("avx2", "avx512")]
TILE_TIERS = [t for t in TIERS if "probe_tile_bf16" in _C.tier_ops(t)]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tier", TIERS)
def test_rates_are_those_of_a_computer(tier, threads):
    probe = measure(threads, tier)
    lanes = _C.panel_width(tier) // 2
    clock = 10e9  # no CPU issues more than four vectors in one of these cycles
    assert 1e7 < probe.fma_flops < threads * clock * 4 * 2 * lanes
    assert 1e7 < probe.read_bytes < 1e13
    rates = (
        (probe.byte_ops, BYTE_TIERS),
        (probe.nibble_ops, NIBBLE_TIERS),
        (probe.word_ops, WORD_TIERS),
    )
    for rate, tiers in rates:
        if tier in tiers:
            assert 1e7 < rate < threads * clock * 4 * lanes * LANE_OPS
        else:
            assert rate == 0.0
    if tier in TILE_TIERS:
        assert 1e9 < probe.tile_flops < threads * clock * TILE_FLOPS
        assert 1e9 < probe.tile_ops < threads * clock * TILE_OPS
    else:
        assert probe.tile_flops == probe.tile_ops == 0.0


@pytest.mark.parametrize("tier", TIERS)
def test_fma_probe_computes_its_recurrence(tier):
    """x → x/2 + 1 from 0..11, three times: the work that is counted is done."""
    sink = torch.zeros(5)
    run_op("probe_fma", [sink], [3], tier=tier, threads=2)
    lanes = _C.panel_width(tier) // 2
    want = sum(lanes * (start / 8 + 1.75) for start in range(CHAINS))
    assert torch.equal(sink, torch.full((5,), want))


@pytest.mark.parametrize(
    ("tier", "op", "products"),
    [(t, "probe_bytes", 4) for t in BYTE_TIERS] + [(t, "probe_words", 2) for t in WORD_TIERS],
)
def test_integer_probes_compute_their_sums(tier, op, products):
    """Of a lane: so many products of ones an iteration."""
    sink, lanes = torch.zeros(4), _C.panel_width(tier) // 2
    run_op(op, [sink], [7], tier=tier, threads=2)
    want = float(lanes * sum(7 * products + i for i in range(CHAINS)))
    assert torch.equal(sink, torch.full((4,), want))


@pytest.mark.parametrize("tier", NIBBLE_TIERS)
def test_nibble_probe_computes_its_sums(tier):
    """Two sums of 16 bits in each lane, of two products an iteration each."""
    sink, lanes = torch.zeros(4), _C.panel_width(tier) // 2
    run_op("probe_nibbles", [sink], [7], tier=tier, threads=2)
    want = float(lanes * sum(7 * 2 * (1 + (1 << 16)) + i for i in range(CHAINS)))
    assert torch.equal(sink, torch.full((4,), want))


@pytest.mark.parametrize(("op", "k"), [("probe_tile_bf16", 32), ("probe_tile_s8", 64)])
@pytest.mark.parametrize("tier", TILE_TIERS)
def test_tile_probes_compute_their_sums(tier, op, k):
    sink = torch.zeros(4)
    run_op(op, [sink], [7], tier=tier, threads=2)
    assert torch.equal(sink, torch.full((4,), 7.0 * k))


def test_the_peak_of_a_linear_is_that_of_the_best_unit():
    plain = Probe(fma_flops=4.0, byte_ops=0.0, read_bytes=1.0)
    assert [plain.linear_peak(d) for d in ("f32", "f16", "bf16", "s8", "s4")] == [4.0] * 5
    pairs = Probe(fma_flops=4.0, byte_ops=6.0, read_bytes=1.0, nibble_ops=12.0)
    assert [pairs.linear_peak(d) for d in ("f32", "s8", "s4")] == [4.0, 6.0, 12.0]
    assert [pairs.linear_peak(d, products=2) for d in ("s8", "s4")] == [4.0, 6.0]
    vnni = Probe(fma_flops=4.0, byte_ops=16.0, read_bytes=1.0)
    assert [vnni.linear_peak(d) for d in ("f32", "s8", "s4")] == [4.0, 16.0, 16.0]
    words = Probe(fma_flops=4.0, byte_ops=16.0, read_bytes=1.0, word_ops=8.0)
    assert [words.linear_peak(d) for d in ("f32", "f16", "bf16", "s8")] == [4.0, 8.0, 8.0, 16.0]
    assert [words.linear_peak(d, products=3) for d in ("s8", "s4")] == [8.0, 8.0]
    tiles = Probe(fma_flops=4.0, byte_ops=16.0, read_bytes=1.0, tile_flops=60.0, tile_ops=120.0)
    assert [tiles.linear_peak(d) for d in ("f32", "f16", "bf16", "s8")] == [10.0, 20.0, 60.0, 120.0]


@pytest.mark.parametrize("tier", TIERS)
def test_read_probe_reads_everything(tier):
    """Every float of the buffer is in exactly one chunk's sum."""
    buffer, sink = torch.ones(1 << 16).view(torch.uint8), torch.zeros(8)
    run_op("probe_read", [buffer, sink], tier=tier, threads=2)
    assert torch.equal(sink, torch.full((8,), (1 << 16) / 8))


def test_the_read_probe_reads_as_much_as_the_work(monkeypatch):
    """Within bounds; memory for more than usual is given back when asked for."""
    read = []

    def one_op(name, tensors, *args, **kwargs):
        if name == "probe_read":
            read.append(tensors[0].numel())
        return lambda: None

    monkeypatch.setattr(probe_module, "OneOp", one_op)
    most, usual = probe_module.MOST_READ_BYTES, probe_module.READ_BYTES
    for wanted in (0, 1, usual + 3, 1e12):
        assert (measure(1, read_bytes=wanted).read_bytes > 0) == (wanted > 0)
    assert read == [probe_module.LEAST_READ_BYTES, usual + 3, most]
    memory = probe_module._READ_MEMORY
    assert memory._memory.bytes >= most
    probe_module.give_back()
    assert memory._memory is None
    measure(1)
    probe_module.give_back()
    assert memory._memory.bytes == usual


def test_a_missing_probe_is_refused():
    with pytest.raises(ValueError, match="probe_bytes"):
        OneOp("probe_bytes", [torch.zeros(1)], [1], tier="scalar")
