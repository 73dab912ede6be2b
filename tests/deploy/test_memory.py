"""The arithmetic of memory plans: figures that can be worked out by hand."""

from __future__ import annotations

import dataclasses

import pytest

from qat.deploy.memory import Contents, Transformer, Weight, Workload, fitting_group, plan_memory
from qat.deploy.shapes import from_count
from qat.errors import ConfigError

SMALL = Transformer(layers=3, hidden=32, heads=4, kv_heads=2, head_dim=8, value_dim=8, intermediate=64, vocabulary=100)


def rows(contents: Contents, work: Workload | None = None, **options):
    return {row.precision: row for row in plan_memory(contents, work or Workload(**options)).rows}


def test_175_billion_parameters() -> None:
    table = rows(from_count("175B", 175 * 10**9))
    assert [table[p].weights for p in ("FP32", "BF16", "INT8")] == [700 * 10**9, 350 * 10**9, 175 * 10**9]
    assert [table[p].weights for p in ("INT4", "INT2", "1 bit")] == [875 * 10**8, 4375 * 10**7, 21875 * 10**6]
    assert table["FP32"].scales == table["BF16"].scales == 0
    # one float32 for each 128 weights, and for each output channel: 9 * hidden of them in a layer of 12 * hidden**2
    assert table["INT4"].scales == table["1 bit"].scales == pytest.approx(175e9 / 128 * 4)
    assert table["INT8"].scales == pytest.approx(175e9 * 9 / (12 * 12288) * 4, rel=1e-3)
    assert table["FP32"].cache is None
    assert not table["FP32"].complete


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("role", ["matrix", "edge", "float"])
def test_one_weight_costs_codes_and_scales(bits: int, role: str) -> None:
    weight = Weight("w", 7 * 96, 96, role, value_bytes=2)
    width = {"matrix": bits, "edge": 8, "float": 16}[role]
    groups = 96 // 32 if role == "matrix" and bits < 8 else 1
    scales = 0 if role == "float" else 7 * groups
    assert weight.cost(bits, Workload()) == (-(-7 * 96 * width // 8), scales * 4)
    assert weight.cost(bits, Workload(scale_dtype="float16")) == (-(-7 * 96 * width // 8), scales * 2)
    assert weight.cost(bits, Workload(zero_points=True))[1] == scales * 8
    assert weight.cost(bits, Workload(group_size=None))[1] == (7 * 4 if role != "float" else 0)
    assert weight.cost(32, Workload()) == (7 * 96 * 4, 0)


def test_counters_keep_their_type() -> None:
    counter = Weight("num_batches_tracked", 1, 1, "float", 8, floating=False)
    assert [counter.cost(bits, Workload()) for bits in (32, 16, 8, 1)] == [(8, 0)] * 4
    assert Contents("", "", (counter,)).parameters == 0


def test_groups_fall_back_as_prepare_does() -> None:
    assert [fitting_group(n, 128) for n in (128, 384, 320, 48, 5)] == [128, 128, 64, 16, 1]
    assert [fitting_group(n, 48) for n in (96, 80)] == [48, 16]


def test_cache_by_hand() -> None:
    work = Workload(context=10, batch=2)
    values = 2 * 3 * 10 * 2 * 2 * 8
    assert SMALL.cache(16, work) == values * 2
    assert SMALL.cache(4, work) == values // 2 + 2 * 3 * 10 * (2 * 2) * 4
    assert dataclasses.replace(SMALL, windows=(4, None, 0)).cache(16, work) == values * 2 * (4 + 10) // 30
    assert dataclasses.replace(SMALL, latent=12).cache(16, work) == 2 * 3 * 10 * 12 * 2
    assert dataclasses.replace(SMALL, encoder_layers=5).cache(16, work) == 2 * values * 2
    assert dataclasses.replace(SMALL, caches=False).cache(16, work) == 0
    contents = Contents("", "", (Weight("w", 64, 8),), SMALL)
    widths = {p: row.cache for p, row in rows(contents, work).items()}
    assert widths == {"FP32": 4 * values, **dict.fromkeys(("BF16", "INT8", "INT4", "INT2", "1 bit"), 2 * values)}
    same = rows(contents, dataclasses.replace(work, kv_bits="same"))
    assert same["1 bit"].cache == values // 8 + 2 * 3 * 10 * 4 * 4
    assert rows(contents, dataclasses.replace(work, kv_bits=0))["BF16"].cache == 0


def test_activations_by_hand() -> None:
    work = Workload(context=10, batch=2)
    # the residual stream, and the widest of: attention; the feed-forward layer; the logits of the last positions
    attention, feed_forward, head = 32 + 2 * 32 + 32, 32 + 2 * 64, 2 * (32 + 100)
    assert SMALL.activations(20, 16, work) == 2 * (20 * 32 + 20 * max(attention, feed_forward))
    assert SMALL.activations(2, 32, work) == 4 * (2 * 32 + max(2 * feed_forward, head))
    gated = dataclasses.replace(SMALL, gated=True)
    assert gated.activations(20, 16, work) == 2 * (20 * 32 + 20 * (32 + 3 * 64))
    eager = dataclasses.replace(work, attention="eager")
    assert SMALL.activations(20, 16, eager) == 2 * (20 * 32 + 20 * max(attention + 4 * 10, feed_forward))
    mixture = dataclasses.replace(SMALL, experts=8, active_experts=2, expert_intermediate=50, shared_intermediate=7)
    assert mixture.activations(20, 16, work) == 2 * (20 * 32 + 20 * (32 + 2 * 107))
    row = rows(Contents("", "", (), SMALL), work)["INT4"]
    assert (row.prefill, row.decode) == (SMALL.activations(20, 16, work), SMALL.activations(2, 16, work))
    assert row.total == row.cache + row.prefill


def test_devices_hold_the_total_or_not() -> None:
    plan = plan_memory(Contents("", "", (Weight("w", 10**9, 1000),)), devices=(4 * 10**9, 10**9))
    assert plan.devices == (10**9, 4 * 10**9)
    fits = {row.precision: row.fits(plan.devices) for row in plan.rows}
    assert fits["FP32"] == [4 * 10**9]
    assert fits["INT8"] == [4 * 10**9]          # its scales are too much for the smaller one
    assert fits["INT4"] == [10**9, 4 * 10**9]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "context must be a whole number of at least 1"),
        ({"batch": -2}, "batch must be"),
        ({"batch": True}, "batch must be"),
        ({"group_size": 0}, "group_size must be"),
        ({"kv_bits": 64}, "kv_bits must be 0 to 32"),
        ({"kv_bits": "sane"}, "kv_bits must be"),
        ({"activation_bits": 0}, "activation_bits must be"),
        ({"scale_dtype": "float61"}, "did you mean 'float16'"),
        ({"attention": "eagre"}, "did you mean 'eager'"),
        ({"zero_points": 1}, "zero_points must be true or false"),
    ],
)
def test_a_workload_that_means_nothing(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        Workload(**options)
