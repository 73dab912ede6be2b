"""Prepare: what it keeps (law 6) and what it refuses (faults 1, 9, 15, 16)."""

from __future__ import annotations

import itertools

import pytest
import torch
import zoo
from torch import nn

import qat
from qat.errors import PrepareError
from qat.modules.base import LayerPlan, QuantizedModule
from qat.numerics.formats import TensorSpec
from qat.planning import Plan
from qat.rewriter import carry_out, is_prepared


def test_prepare_twice_is_an_error() -> None:
    model = zoo.build("mlp")
    prepared = qat.prepare(model, "w8a8")
    x = zoo.inputs("mlp", 2)
    deployed, _ = qat.convert(qat.calibrate(prepared, [x]), [x])
    for twice in (prepared, deployed, nn.Sequential(prepared)):
        with pytest.raises(PrepareError, match="prepared already"):
            qat.prepare(twice, "w8a8")
    assert not is_prepared(model)
    qat.prepare(model, "w8a8", inplace=True)
    with pytest.raises(PrepareError, match="prepared already"):
        qat.prepare(model, "w8a8", inplace=True)


def test_groups_that_do_not_divide_are_all_named() -> None:
    model = nn.Sequential(nn.Linear(12, 6), nn.Linear(6, 10), nn.Linear(10, 4))
    weight = {"format": "int4", "granularity": "per_group", "group_size": 4}
    with pytest.raises(PrepareError, match=r"1 \(6 inputs\), 2 \(10 inputs\).*group_fallback") as caught:
        qat.prepare(model, zoo.every_layer(weight, None))
    assert "0 (" not in str(caught.value)
    rows = qat.coverage(qat.prepare(model, zoo.every_layer({**weight, "group_fallback": "divisor"}, None))).rows
    assert [r.weight for r in rows if r.kind == "Linear"] == [f"int4 per_group({n})" for n in (4, 2, 2)]
    assert "group_size 4 does not divide 6 inputs: 2" in rows[1].reason


def test_groups_on_integer_convolutions_are_refused() -> None:
    weight = {"format": "int4", "granularity": "per_group", "group_size": 3}
    with pytest.raises(PrepareError, match=r"0: per_group.*per_channel"):
        qat.prepare(nn.Sequential(nn.Conv2d(3, 4, 3)), zoo.every_layer(weight, "int8"))
    zoo.assert_parity(nn.Sequential(nn.Conv2d(3, 4, 3)), zoo.every_layer(weight, None), torch.randn(2, 3, 5, 5))


def test_tied_weights_stay_tied_and_are_quantized_once() -> None:
    x = zoo.inputs("tied", 4)
    for preset in ("w8a8", "w4a4", "w8a16"):
        model = qat.calibrate(qat.prepare(zoo.build("tied"), preset, example_inputs=x), [x])
        assert model.head.weight is model.table.weight
        assert model.head.weight_quantizer is model.table.weight_quantizer
        model(x).square().sum().backward()
        with torch.no_grad():
            model.table.weight -= 0.1 * model.table.weight.grad
        deployed, _ = qat.convert(model, [x])
        assert torch.equal(deployed(x), model.eval()(x))
        assert deployed.head.weight_codes is deployed.table.weight_codes


def test_a_tie_to_a_float_module_keeps_both_float() -> None:
    recipe = {"rules": [{"match": {"name": "table"}, "keep": "float32"}, {"weight": "int8", "input": "int8"}]}
    model = qat.prepare(zoo.build("tied"), recipe)
    rows = {r.name: r for r in qat.coverage(model).rows}
    assert not isinstance(model.head, QuantizedModule)
    assert rows["body"].status == "quantized"
    assert model.head.weight is model.table.weight


def test_a_tie_under_two_rules_is_an_error() -> None:
    recipe = {"rules": [{"match": {"name": "table"}, "weight": "int8"}, {"match": {"name": "head"}, "weight": "int4"}]}
    with pytest.raises(PrepareError, match=r"shared weight.*table.*head"):
        qat.prepare(zoo.build("tied"), recipe)


def test_a_module_under_two_names_is_one_module() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.tanh(self.a(x)))

    before, after = zoo.assert_parity(Twice(), zoo.every_layer("int8", {"format": "int8", "observer": "minmax"}),
                                      torch.randn(5, 4))
    assert before.a is before.b
    assert after.a is after.b
    with_rule = qat.prepare(Twice(), {"rules": [{"match": {"name": "b"}, "weight": "int8"}]})
    assert isinstance(with_rule.a, QuantizedModule)


@pytest.mark.parametrize(("dtype", "training"),
                         list(itertools.product([torch.float32, torch.float16, torch.bfloat16], [True, False])))
@pytest.mark.parametrize("model", zoo.ZOO)
def test_dtype_device_mode_and_gradients_are_kept(model: str, dtype: torch.dtype, training: bool) -> None:
    float_model = zoo.build(model, dtype).train(training)
    next(iter(float_model.parameters())).requires_grad_(False)
    prepared = qat.prepare(float_model, "w8a8", example_inputs=zoo.inputs(model, 2, dtype))
    own = dict(prepared.named_parameters())
    for name, p in float_model.named_parameters():
        assert (own[name].dtype, own[name].device, own[name].requires_grad) == (p.dtype, p.device, p.requires_grad)
        assert torch.equal(own[name], p)
    assert all(m.training is training for m in prepared.modules())
    assert set(float_model.state_dict()) <= set(prepared.state_dict())
    assert float_model.training is training


@pytest.mark.parametrize("preset", ["w8a8", "w8a8_dynamic", "w4a16"])
def test_memory_format_is_kept(preset: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(3, 4, 9, 9).to(memory_format=torch.channels_last)
    before, after = zoo.assert_parity(model, preset, x)
    assert model(x).is_contiguous(memory_format=torch.channels_last)
    for m in (before, after):
        assert m(x).is_contiguous(memory_format=torch.channels_last)
    assert before[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_the_random_state_and_the_statistics_are_left_alone() -> None:
    model = zoo.build("conv").train()
    statistics = model[1].running_mean.clone()
    state = torch.get_rng_state()
    prepared = qat.prepare(model, "w8a8", example_inputs=zoo.inputs("conv", 2) * 0 + 1)
    torch.set_rng_state(state)
    expected = torch.rand(1)
    torch.set_rng_state(state)
    x = torch.ones(2, 3, 8, 8)
    qat.prepare(model, "w8a8", example_inputs=x)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(prepared[1].running_mean, statistics)
    assert torch.equal(model[1].running_mean, statistics)


def test_a_prepared_model_trains() -> None:
    x, y = torch.randn(256, 12), torch.randint(0, 3, (256,))
    y = (x[:, :3]).argmax(1)
    for preset in ("w8a8", "w4a4", "w2a8", "w158a8"):
        torch.manual_seed(0)
        model = qat.calibrate(qat.prepare(zoo.build("mlp"), preset, example_inputs=x), [x])
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        losses = []
        for _ in range(40):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.75 * losses[0], preset


def test_quantizers_of_functions_live_where_the_model_does() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.add, self.product = nn.Linear(3, 3, device="meta"), qat.Add(), qat.MatMul()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.product(self.add(x, self.one(x)), x)

    plan = Plan({"add": LayerPlan("Add", input=TensorSpec("int8").for_activation()),
                 "product": LayerPlan("MatMul", input=TensorSpec("int8").for_activation())})
    model = carry_out(Net(), plan)
    for module in (model.add, model.product):
        assert module.activation_quantizers()
        for quantizer in module.activation_quantizers().values():
            assert {b.device.type for b in quantizer.buffers()} == {"meta"}
