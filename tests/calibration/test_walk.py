"""All batches walk through the model together."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import qat
from qat.calibration.walk import walk
from qat.errors import CalibrationError


class Experts(nn.Module):
    """The first expert takes rows with a positive sum, the second one the others; both come after a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.experts[0] if x.sum() > 0 else self.experts[1]
        return self.head(chosen(self.shared(x)))


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def test_every_batch_stops_at_every_layer_with_what_the_layers_before_it_make_of_it_by_then() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    batches, seen = [torch.randn(n, 3) for n in (1, 2, 5)], []

    def work(name, arrivals):
        seen.append(name)
        place = int(name)
        with torch.no_grad():
            for arrival, batch in zip(arrivals, batches, strict=True):
                assert torch.equal(arrival.args[0], model[:place](batch))    # by the changed layers before it
            model[place].weight.mul_(0.5)

    assert walk(model, batches, layers(model), work) == []
    assert seen == ["0", "2", "4"]


def test_batches_that_take_different_ways_meet_again() -> None:
    torch.manual_seed(0)
    model, seen = Experts(), {}
    batches = [torch.ones(2, 4), -torch.ones(3, 4), torch.ones(1, 4)]
    unused = walk(model, batches, layers(model), lambda name, arrivals: seen.update(
        {name: [a.batch for a in arrivals]}))
    assert unused == []
    assert seen == {"shared": [0, 1, 2], "experts.0": [0, 2], "experts.1": [1], "head": [0, 1, 2]}
    assert walk(model, batches[:1], layers(model), lambda *_: None) == ["experts.1"]


def test_a_layer_called_twice_is_worked_on_once() -> None:
    layer = nn.Linear(2, 2)
    model, seen = nn.Sequential(layer, layer), []
    walk(model, [torch.ones(1, 2)], {"0": layer}, lambda name, _: seen.append(name))
    assert seen == ["0"]


def test_a_second_model_walks_beside_with_inputs_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    twin, batches, seen = copy.deepcopy(model), [torch.randn(n, 3) for n in (1, 4)], []

    def work(name, arrivals):
        seen.append(name)
        for arrival, batch in zip(arrivals, batches, strict=True):
            assert torch.equal(arrival.args[0], model[: int(name)](batch))
            assert torch.equal(arrival.beside.args[0], twin[: int(name)](batch))
        with torch.no_grad():
            model[int(name)].weight.mul_(0.5)

    assert walk(model, batches, layers(model), work, beside=twin) == []
    assert seen == ["0", "2", "4"]
    assert not any(m._forward_pre_hooks for m in (*model.modules(), *twin.modules()))


def test_where_the_second_model_takes_another_way_nobody_is_beside() -> None:
    model, seen = Experts(), {}
    twin = copy.deepcopy(model)
    batches = [torch.ones(2, 4), -torch.ones(3, 4)]
    with torch.no_grad():
        twin.shared.weight.zero_()          # what the experts are chosen by is the input, so let that differ
    twin.forward = lambda x: Experts.forward(twin, x.abs())
    walk(model, batches, layers(model), lambda name, arrivals: seen.update(
        {name: [(a.batch, a.beside is not None) for a in arrivals]}), beside=twin)
    assert seen == {"shared": [(0, True), (1, True)], "experts.0": [(0, True)], "experts.1": [(1, False)],
                    "head": [(0, True), (1, True)]}


@pytest.mark.parametrize("where", ["work", "forward"])
def test_an_error_ends_all_forwards_and_leaves_no_hook_and_no_thread(where: str) -> None:
    import threading

    class Fails(nn.Module):
        def forward(self, x):
            if where == "forward" and len(x) == 2:
                raise CalibrationError("no such luck")
            return x

    model = nn.Sequential(nn.Linear(2, 2), Fails(), nn.Linear(2, 2)).train()
    before = threading.active_count()

    def work(name, arrivals):
        if where == "work" and name == "2":
            raise CalibrationError("no such luck")

    with pytest.raises(CalibrationError, match="no such luck" if where == "work" else "batch 1: no such luck"):
        walk(model, [torch.ones(1, 2), torch.ones(2, 2)], layers(model), work)
    assert threading.active_count() == before
    assert model.training
    assert not model[0]._forward_pre_hooks


def test_gradients_are_off_on_the_way_and_batches_are_needed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    walk(model, [torch.ones(1, 2)], layers(model), lambda _, arrivals: None if not arrivals[0].args[0].requires_grad
         else pytest.fail("a gradient is on its way"))
    with pytest.raises(CalibrationError, match="at least one batch"):
        walk(model, [], layers(model), lambda *_: None)


@pytest.mark.parametrize(("layer", "shape"), [
    (nn.Linear(6, 4), (2, 3, 6)),
    (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2), (2, 4, 11)),
    (nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(1, 0), groups=2), (2, 4, 7, 9)),
    (nn.Conv2d(3, 5, (3, 4), dilation=(1, 2), padding="same"), (3, 6, 5)),
    (nn.Conv2d(2, 3, 3, padding=2, padding_mode="reflect"), (1, 2, 6, 7)),
    (nn.Conv3d(2, 4, 2, groups=2), (1, 2, 3, 4, 5)),
    (nn.ConvTranspose1d(4, 3, 3, stride=2, padding=1), (4, 9)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (3, 4, 5, 5)),
    (nn.ConvTranspose2d(6, 2, 2, padding=2, dilation=3), (2, 6, 7, 7)),
    (nn.ConvTranspose3d(4, 2, (1, 2, 3), stride=(1, 2, 1)), (2, 4, 3, 3, 3)),
], ids=lambda v: str(v)[:40])
@pytest.mark.parametrize("preset", ["w8a16", "w8a8"])
def test_input_rows_times_the_weight_is_the_layer(layer: nn.Module, shape: tuple[int, ...], preset: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = qat.prepare(nn.Sequential(layer), preset, x)
    qat.calibrate(model, [x])
    quantized = model[0]
    rows = quantized.input_rows(x)
    matrix = quantized.quantized_weight().dequantize().flatten(1).reshape(len(rows), -1, rows.shape[-1])
    made = (rows @ matrix.transpose(1, 2)).transpose(1, 2)                  # groups, outputs, rows
    expected = model(x)
    if isinstance(layer, nn.Linear):
        expected = expected.reshape(-1, 4).t().unsqueeze(0)
    else:
        expected = expected if len(shape) == layer.weight.dim() else expected.unsqueeze(0)
        expected = expected.transpose(0, 1).reshape(len(rows), -1, rows.shape[1])
    bias = layer.bias.detach().reshape(len(rows), -1, 1)
    torch.testing.assert_close(made + bias, expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("table", "shape", "read"), [
    ((5, 8), (3, 2, 8), lambda x, w: x @ w.t()), ((8, 5), (3, 2, 8), lambda x, w: x @ w),
    ((5, 8), (3, 8, 2), lambda x, w: (w @ x).mT), ((2, 5, 8), (4, 8), lambda x, w: x @ w[0].t())])
def test_input_rows_of_a_parameter_that_a_function_reads(table: tuple[int, ...], shape: tuple[int, ...], read) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(table))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return read(x, self.table)

    torch.manual_seed(0)
    x, seen = torch.randn(shape), []
    model: Any = qat.prepare(Reads(), "w8a8", x)
    qat.calibrate(model, [x])
    part = model.table_product
    part.register_forward_pre_hook(lambda module, args: seen.append(module.input_rows(args[0])))
    expected = model(x)
    made = seen[0] @ part.quantized_weight().dequantize().t()
    torch.testing.assert_close(made[..., :5].reshape(expected.shape), expected)


def test_a_placed_range_stands_still_and_codes_stay_what_they_were_chosen_to_be() -> None:
    torch.manual_seed(0)
    model = qat.prepare(nn.Sequential(nn.Linear(8, 4)), {"calibration": ["gptq"], "rules": [{"weight": "int4"}]})
    layer = model[0]
    scale, zero_point = layer.weight_quantizer.place(torch.full((4,), 0.1))
    codes = torch.randint(-8, 8, (4, 8), dtype=torch.int8)
    layer.write_weight(codes.float() * scale[:, None])
    assert zero_point is None
    assert torch.equal(layer.weight_quantizer.codes(layer.weight), codes)
    assert torch.equal(model(torch.eye(8)), torch.nn.functional.linear(
        torch.eye(8), codes.float() * 0.1, layer.bias))
    qat.calibrate(model, [torch.randn(2, 8)], algorithms=[])
    assert layer.weight_quantizer.scale.tolist() != pytest.approx([0.1] * 4)     # found anew


def test_algorithms_get_the_batches_that_are_good_for_ranges() -> None:
    model = qat.prepare(nn.Sequential(nn.Linear(8, 4)), {
        "calibration": ["gptq"], "rules": [{"weight": "int4", "input": "int8"}]}, torch.randn(2, 8))
    bad = torch.full((9, 8), torch.nan)
    with pytest.warns(UserWarning, match="batch 1 left out"):
        qat.calibrate(model, [torch.randn(20, 8), bad, torch.randn(20, 8)], ignore_nonfinite=True)
    assert torch.isfinite(model(torch.randn(2, 8))).all()
    with pytest.raises(CalibrationError, match="batch 1"):
        qat.calibrate(model, [torch.randn(20, 8), bad])


def test_an_algorithm_that_chooses_codes_must_be_known_to_prepare() -> None:
    model = qat.prepare(nn.Sequential(nn.Linear(8, 4)), "w8a8", torch.randn(2, 8))
    with pytest.raises(qat.errors.RecipeError, match="prepare"):
        qat.calibrate(model, [torch.randn(2, 8)], algorithms="gptq")
