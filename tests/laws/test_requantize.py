"""``requantize``: codes made of accumulators, and of codes; the same in training, deployed, and in onnxruntime."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qat
from qat import targets
from qat.errors import RecipeError
from qat.kernels import requantize, ste
from qat.numerics import affine
from qat.numerics.formats import TensorSpec
from qat.numerics.tensor import QuantizedTensor
from qat.rewriter import quantized_modules
from tests import zoo

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")


class Residual(nn.Module):
    """Convolutions of all kinds, batch norms of any sign and zero, sums, a ReLU6, a concatenation, linear layers."""

    def __init__(self, groups: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=bias), nn.BatchNorm2d(12), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=bias), nn.BatchNorm2d(12), nn.ReLU6())
        self.wide = nn.Sequential(nn.Conv2d(12, 12, 1, groups=groups, bias=bias), nn.BatchNorm2d(12))
        self.add, self.relu = qat.Add(), nn.ReLU()
        self.down = nn.Conv2d(12, 8, 3, stride=2, dilation=2, bias=bias)
        self.flat = nn.Flatten()
        self.head = nn.Sequential(nn.Linear(8 * 2 * 2, 20, bias=bias), nn.ReLU(), nn.Linear(20, 5, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.relu(self.add(self.wide(self.deep(x)), x))
        return self.head(self.flat(self.down(x)))


def shaken(model: nn.Module, seed: int) -> nn.Module:
    """The model anew, with batch norms as training leaves them, one dead channel and one whose gain is zero."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.normal_()
                module.weight[0] = 0.0
                module.bias.normal_()
                module.running_mean.normal_()                   # type: ignore[union-attr]
                module.running_var.uniform_(0.5, 2.0)           # type: ignore[union-attr]
        if isinstance(module, nn.Conv2d):
            with torch.no_grad():
                module.weight[1] = 0.0
    return model.eval()


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def recipe(**changes: Any) -> qat.Recipe:
    spec = {"format": "int8", **changes}
    made = qat.Recipe.preset("w8a8", weight={"format": changes.pop("weight", "int8")})
    return targets.adjust(made, "onnxruntime")[0] if not changes else qat.Recipe.from_dict({
        "requantize": True, "rules": [{"match": {"type": "Add"}, "input": spec, "output": spec, "optional": True},
                                      {"weight": {"format": "int8"}, "input": spec, "output": spec}]})


CASES: dict[str, tuple[nn.Module, qat.Recipe]] = {
    "adjusted": (Residual(), recipe()),
    "groups": (Residual(groups=3), recipe()),
    "no bias": (Residual(bias=False), recipe()),
    "4-bit weights": (Residual(), recipe(weight="int4")),
    "2-bit weights": (Residual(), recipe(weight="int2_midrise")),
    "learned": (Residual(), recipe(learned="lsq", observer="mse")),
    "powers of two": (Residual(), recipe(power_of_two=True)),
    "asymmetric": (Residual(), recipe(format="uint8", symmetric=False)),
}


def prepared(name: str) -> nn.Module:
    model, chosen = CASES[name]
    made = qat.prepare(shaken(copy.deepcopy(model), len(name)), chosen, images(2))
    qat.calibrate(made, [images(32)])
    return made.eval()


@pytest.mark.parametrize("name", CASES)
def test_trained_deployed_and_onnxruntime_are_equal(name: str, tmp_path: Path) -> None:
    model, x = prepared(name), images(64, 1)
    assert any(m.plan.codes_from_sums for m in quantized_modules(model).values() if m.plan.weight)
    with torch.no_grad():
        expected = model(x)
    assert torch.equal(model(x), expected), "with and without gradients"
    deployed, certificate = qat.convert(model, [x])
    assert certificate.equal
    with torch.no_grad():
        assert torch.equal(deployed(x), expected)
        assert torch.equal(deployed(x[:1]), expected[:1])
    qat.save(deployed, tmp_path / "saved")
    again = qat.load(tmp_path / "saved", copy.deepcopy(CASES[name][0]))
    with torch.no_grad():
        assert torch.equal(again(x), expected)
    if name == "adjusted":
        qat.export(deployed, tmp_path / "m.pt2", format="torch-export", example_inputs=x)
        program = torch.export.load(tmp_path / "m.pt2").module()
        with torch.no_grad():
            assert torch.equal(program(x), expected)
    for form in (None, "integer"):
        session, operators = onnxruntime(deployed, tmp_path / "m.onnx", x[:2], form)
        np.testing.assert_array_equal(session.run(None, {"x": x.numpy()})[0], expected.numpy())
        if form is None:
            assert operators["QLinearConv"] == 4 and operators["QLinearAdd"] == 1, operators     # noqa: PT018
            assert not {"Conv", "Gemm", "MatMul", "ConvInteger"} & set(operators)


def onnxruntime(deployed: nn.Module, path: Path, x: Tensor, form: str | None) -> tuple[Any, Counter[str]]:
    qat.export(deployed, path, format="onnx", example_inputs=x, target="onnxruntime", form=form)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session, Counter(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node)


def test_gradients_are_those_of_the_plain_expression() -> None:
    model = shaken(Residual(), 3)
    plain, whole = (qat.prepare(model, qat.Recipe.from_dict({**recipe().to_dict(), "requantize": on}), images(2))
                    for on in (False, True))
    gradients = []
    for model in (plain, whole):
        qat.calibrate(model, [images(32)])
        model.eval()(images(16, 2)).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=0.1, atol=0.02 * float(expected.abs().max()))


def test_training_moves_the_ranges_and_stays_equal() -> None:
    model = qat.prepare(shaken(Residual(), 4).train(), recipe(), images(2))
    qat.calibrate(model, [images(32)])
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    for step in range(4):
        optimizer.zero_grad()
        model(images(16, step)).square().mean().backward()
        optimizer.step()
    deployed, certificate = qat.convert(model.eval(), [images(32, 9)])
    assert certificate.equal
    assert any(m.bias is not None for m in quantized_modules(deployed).values() if m.plan.weight)


@pytest.mark.parametrize("scale", [1e-12, 1e-20, 1e-38])
def test_a_bias_beyond_int32_stays_what_it_is(scale: float, tmp_path: Path) -> None:
    """Its channel hardly sees its inputs; runtimes with int32 biases get the layer as integer operators."""
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    with torch.no_grad():
        model[0].weight[2] *= scale                             # type: ignore[index]
        model[0].bias[2] = 1.5                                  # type: ignore[index]
    x = torch.randn(32, 8)
    made = qat.prepare(model, recipe(format="int8"), x)
    qat.calibrate(made, [x])
    deployed, certificate = qat.convert(made.eval(), [x])
    assert certificate.equal
    with torch.no_grad():
        expected = deployed(x)
    torch.testing.assert_close(expected, model(x).detach(), rtol=0, atol=0.05)
    session, operators = onnxruntime(deployed, tmp_path / "m.onnx", x[:2], None)
    assert scale == 1e-38 or operators["MatMulInteger"] or operators["MatMulIntegerToFloat"]
    np.testing.assert_array_equal(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0], expected.numpy())


def test_biases_near_the_middle_between_two_steps(tmp_path: Path) -> None:
    """Which of them is nearer depends on whether the quotient is rounded to float32, as it is in the layer."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 3000, 1)).eval(), images(8)
    with torch.no_grad():
        model[0].weight.mul_(0.01)
        model[0].bias.mul_(20.0)
    model = qat.prepare(model, recipe(format="int8"), x)
    deployed, _ = qat.convert(qat.calibrate(model, [x]), [x])
    layer = quantized_modules(deployed)["0"]
    step = layer.input_quantizer.scale * layer.quantized_weight().scale
    exact = (layer.bias.double() / step.double()).round()
    assert int(((layer.bias / step).round() != exact).sum()) > 2
    for form in (None, "integer"):
        session, _ = onnxruntime(deployed, tmp_path / "m.onnx", x[:2], form)
        np.testing.assert_array_equal(session.run(None, {"input": x.numpy()})[0], deployed(x).numpy())


def test_a_bias_is_split_into_steps_and_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(4096, generator=generator) * 10.0 ** torch.randint(-6, 6, (4096,), generator=generator)
    step = torch.rand(4096, generator=generator) * 10.0 ** torch.randint(-8, 1, (4096,), generator=generator)
    step[::64] = 0.0
    dead = torch.arange(4096) % 7 == 0
    steps, outside = affine.whole_steps(bias, step, dead)
    assert torch.equal(steps, steps.round())
    within = ((bias / step).abs() < 2.0**30) & ~dead
    assert torch.equal(steps != 0, within & (steps != 0))
    assert torch.equal(outside[~within], bias[~within])
    error = (steps * step + outside - bias).abs()
    assert (error <= step / 2 + bias.abs() * 2.0**-22).all()


@pytest.mark.parametrize("seed", range(8))
def test_sums_of_codes_are_those_of_onnxruntime(seed: int) -> None:
    """All pairs of codes, with scales that make ties too."""
    generator = np.random.default_rng(seed)
    scales = generator.uniform(0.005, 0.06, 3).astype(np.float32)
    scales = np.float32([0.02, 0.02, 0.04]) if seed % 4 == 0 else scales
    points = generator.integers(-128, 128, 3)
    codes = [np.repeat(np.arange(-128, 128), 256), np.tile(np.arange(-128, 128), 256)]
    helper, kinds = onnx.helper, onnx.TensorProto
    held = [onnx.numpy_helper.from_array(np.array(v, t), n) for t, names, values in (
        (np.float32, ("sa", "sb", "sc"), scales), (np.uint8, ("za", "zb", "zc"), points + 128))
        for n, v in zip(names, values)]
    graph = helper.make_graph(
        [helper.make_node("QLinearAdd", ["a", "sa", "za", "b", "sb", "zb", "sc", "zc"], ["c"], domain="com.microsoft")],
        "sum", [helper.make_tensor_value_info(n, kinds.UINT8, [65536]) for n in "ab"],
        [helper.make_tensor_value_info("c", kinds.UINT8, [65536])], held)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21),
                                                                   helper.make_opsetid("com.microsoft", 1)])
    theirs, = ort.InferenceSession(model.SerializeToString()).run(
        None, {n: (c + 128).astype(np.uint8) for n, c in zip("ab", codes)})
    for formats in (("int8", "int8", "int8"), ("uint8", "int8", "uint8")):
        specs = [TensorSpec(f, "per_tensor", symmetric=False) for f in formats]
        shifts = [128 * (f == "uint8") for f in formats]
        a, b = (QuantizedTensor(torch.from_numpy(c + k).to(s.fmt.dtype), torch.tensor(v), int(p) + k, s)
                for c, v, p, s, k in zip(codes, scales, points, specs, shifts))
        assert requantize.adds_codes(a, b, specs[2])
        ours = requantize.addition(a, b, torch.tensor(scales[2]), int(points[2]) + shifts[2], ste.Grid(specs[2]))
        np.testing.assert_array_equal(ours.numpy().astype(int) + 128 - shifts[2], theirs)


def test_the_switch_is_off_unless_a_recipe_or_target_wants_it() -> None:
    assert not qat.Recipe.preset("w8a8").requantize
    assert targets.default_recipe("onnxruntime").requantize
    assert not targets.default_recipe("openvino").requantize
    again = qat.Recipe.from_dict(targets.default_recipe("onnxruntime").to_dict())
    assert again.requantize
    with pytest.raises(RecipeError, match="requantize: is true or false"):
        qat.Recipe(requantize="yes")                            # type: ignore[arg-type]
    model = qat.prepare(zoo.build("conv"), "w8a8", zoo.inputs("conv", 2))
    assert not any(m.plan.requantize for m in quantized_modules(model).values())
