"""Observers of several processes, merged: the algebra alone, without processes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from qat.numerics.formats import TensorSpec
from qat.quantizers.observers import Observer, make_observer
from qat.quantizers.quantizer import make_quantizer

KINDS = {
    "minmax": {"format": "int8"},
    "moving_average": {"format": "int8", "observer": "moving_average"},
    "percentile": {"format": "uint8", "observer": "percentile", "symmetric": False},
    "mse": {"format": "int4", "observer": "mse"},
    "entropy": {"format": "int8", "observer": "entropy"},
    "mean magnitude": {"format": "binary"},
    "mean": {"format": "int4", "observer": "mean", "learned": "lsq"},
    "moments of channels": {"format": "binary", "learned": "rsign"},
}


def observer(kind: str) -> Observer:
    return make_observer(TensorSpec.from_dict(KINDS[kind]).for_activation())


def batches(count: int = 7) -> list[Tensor]:
    """Of very different magnitudes, so that histograms widen late and unevenly."""
    return [torch.randn(5, 3) * 10.0 ** ((i * 5) % 7 - 3) - i for i in range(count)]


def merged(observers: list[Observer], own: bool = True) -> None:
    """What the all-reduces of `qat.calibration.processes.merge` do."""
    rounds = max(o.rounds for o in observers)
    places = [(r, len(observers)) if own else (0, 1) for r in range(len(observers))]
    extremes = torch.stack([o.extremes(rounds, *place) for o, place in zip(observers, places)]).amin(0)
    additions = torch.stack([o.additions(extremes) for o in observers]).sum(0)
    for o in observers:
        o.merge(extremes, additions)


def state(o: Observer) -> dict[str, Tensor]:
    scale, zero_point = o.qparams()
    return {**{k: v.clone() for k, v in o.state_dict().items()}, "scale": scale,
            "zero_point": torch.zeros(()) if zero_point is None else zero_point}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 3, 9], ids=lambda w: f"{w} processes")
def test_dealt_out_batches_give_the_ranges_of_one_process(kind: str, world: int) -> None:
    """With 9 processes some see nothing, with 2 and 3 they see different numbers of batches."""
    data = batches()
    alone = observer(kind)
    ranks = [observer(kind) for _ in range(world)]
    for rank in ranks:
        rank.mark()
    for index, batch in enumerate(data):
        alone.observe(batch)
        ranks[index % world].observe(batch)
    merged(ranks)
    for rank in ranks:
        assert_same(state(rank), state(ranks[0]))
    expected, actual = state(alone), state(ranks[0])
    if kind == "mean magnitude":  # a float64 sum in another order; the float32 scale is equal all the same
        torch.testing.assert_close(actual.pop("high"), expected.pop("high"), rtol=1e-14, atol=0)
    assert_same(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_again_and_again_counts_everything_once(kind: str) -> None:
    data = batches(8)
    alone, ranks = observer(kind), [observer(kind), observer(kind)]
    for rank in ranks:
        rank.mark()
    for step in range(4):
        parts = data[2 * step : 2 * step + 2]
        alone.observe(torch.cat(parts))
        for rank, part in zip(ranks, parts):
            rank.observe(part)
        merged(ranks, own=False)
        merged(ranks, own=False)  # nothing new: nothing changes
        assert_same(state(ranks[0]), state(ranks[1]))
        assert_same({"scale": state(ranks[0])["scale"]}, {"scale": state(alone)["scale"]})


@pytest.mark.parametrize("kind", KINDS)
def test_where_nobody_saw_anything_nothing_changes(kind: str) -> None:
    ranks = [observer(kind), observer(kind)]
    for rank in ranks:
        rank.mark()
    merged(ranks)
    assert ranks[0].empty
    ranks[1].observe(torch.randn(4))
    before = state(ranks[1])
    merged(ranks)
    assert_same(state(ranks[0]), before)
    merged(ranks)
    assert_same(state(ranks[0]), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_snapshot_brings_everything_back(kind: str) -> None:
    one = observer(kind)
    one.mark()
    one.observe(torch.randn(6))
    before, kept = copy.deepcopy(one), one.snapshot()
    one.observe(torch.randn(6) * 100)
    one.restore(kept)
    assert_same(state(one), state(before))
    assert one.rounds == before.rounds
    assert_same({"news": one.extremes(one.rounds)}, {"news": before.extremes(before.rounds)})


def test_signs_are_merged() -> None:
    ranks = [observer("mean magnitude"), observer("mean magnitude")]
    for rank, sign in zip(ranks, (1.0, -1.0)):
        rank.mark()
        rank.observe(torch.rand(5) * sign)
        assert rank.one_sided
    merged(ranks)
    assert not ranks[0].one_sided
    assert not ranks[1].one_sided


def test_moving_averages_keep_no_history_when_alone() -> None:
    one = observer("moving_average")
    one.observe(torch.randn(5))
    assert one.rounds == 0
    one.mark()
    one.observe(torch.randn(5))
    assert one.rounds == 1
    one.unmark()
    one.observe(torch.randn(5))
    assert one.rounds == 0


@pytest.mark.parametrize("kind", KINDS)
def test_casting_a_model_rounds_no_statistic(kind: str) -> None:
    one = observer(kind)
    one.observe(torch.randn(9))
    before = {name: value.clone() for name, value in one.state_dict().items()}
    one.to(torch.bfloat16)
    assert {name: value.dtype for name, value in one.state_dict().items()} == {n: v.dtype for n, v in before.items()}
    assert_same(dict(one.state_dict()), before)


def test_statistics_are_float32_whatever_the_default_dtype() -> None:
    """Lightning's bf16-true builds the model under a bfloat16 default."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = [make_quantizer(TensorSpec.from_dict({"format": "int4", "learned": "lsq"}), torch.Size((3, 4))),
                make_quantizer(TensorSpec.from_dict({"format": "int8", "observer": "percentile"}))]
    finally:
        torch.set_default_dtype(torch.float32)
    narrow = {torch.bfloat16, torch.float16}
    assert not any(value.dtype in narrow for one in made for value in one.state_dict().values())
