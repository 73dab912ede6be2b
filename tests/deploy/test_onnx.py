"""ONNX files: the integers of the deployed model, read back with onnx and run by onnxruntime."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qat
from qat import targets
from qat.errors import OverflowBoundError, UnsupportedError
from qat.kernels import requantize, ste
from qat.modules.composite import Composite
from qat.rewriter import quantized_modules
from qat.training.models import MLP, RecurrentClassifier, ResidualNet
from tests import zoo
from tests.deploy.digits import images, trained

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
logging.getLogger("torch.onnx").setLevel(logging.ERROR)

from onnx import numpy_helper  # noqa: E402

from qat.deploy.onnx_rules import broken_rules  # noqa: E402

INTEGER_KERNELS = {"QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat",
                   "DynamicQuantizeMatMul", "MatMulNBits", "QAttention"}
FLOAT_PRODUCTS = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "NhwcFusedConv", "ConvTranspose"}


def deploy(model: nn.Module, recipe: Any, x: Any) -> nn.Module:
    prepared = qat.prepare(model.eval(), recipe, example_inputs=x)
    qat.calibrate(prepared, [x])
    return qat.convert(prepared, [x])[0]


def session(path: Path, codes: bool = False) -> tuple[Any, Counter[str]]:
    """A session of onnxruntime and the operators of its optimized graph; ``codes``: all codes are outputs too."""
    model = onnx.load(path)
    if codes:
        for node in [n for n in model.graph.node if n.op_type == "QuantizeLinear"]:     # read through a Cast: it is
            name = f"{node.output[0]}.codes"                                            # fused all the same
            model.graph.node.append(onnx.helper.make_node("Cast", [node.output[0]], [name], to=onnx.TensorProto.INT32))
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.INT32, None))
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    made = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return made, Counter(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node)


def outputs(made: Any, *inputs: Tensor) -> list[np.ndarray]:
    return made.run(None, {i.name: x.numpy() for i, x in zip(made.get_inputs(), inputs, strict=True)})


def written(deployed: nn.Module, path: Path, x: Any, **options: Any) -> tuple[Any, Counter[str]]:
    qat.export(deployed, path, format="onnx", example_inputs=x, **options)
    return session(path)


def values_in(path: Path, layer: str, shape: tuple[int, ...]) -> Tensor:
    """The weight of a layer, dequantized from nothing but the initializers of the file; output channels first."""
    held = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    codes = held[f"{layer}.weight_codes"].astype(np.float32)
    scale = held[f"{layer}.weight_scale"]
    point = held.get(f"{layer}.weight_zero_point", np.zeros(scale.shape, np.int8)).astype(np.float32)
    if codes.shape != shape:                                    # (in, out): weight-only layers, in blocks
        codes = codes.T
    if scale.ndim == 2:
        scale, point = (np.repeat(v.T, codes.shape[1] // len(v), 1) for v in (scale, point))
    else:
        scale, point = (v.reshape(-1, *[1] * (codes.ndim - 1)) if v.ndim else v for v in (scale, point))
    return torch.from_numpy((codes - point) * scale)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    return images()


@pytest.fixture(scope="module")
def network(digits: tuple[Tensor, Tensor]) -> nn.Module:
    torch.manual_seed(0)
    return trained(ResidualNet(), *digits)


def codes_of(deployed: nn.Module, x: Tensor) -> list[Tensor]:
    """What the model puts on a grid, in order, each once."""
    seen: list[Tensor] = []

    def watched(true: Any) -> Any:
        def made(*args: Any) -> Any:
            result = true(*args)
            codes = result if isinstance(result, Tensor) else result.codes
            if not any(s.shape == codes.shape and torch.equal(s, codes) for s in seen):
                seen.append(codes)
            return result
        return made

    with mock.patch.object(ste, "quantize", watched(ste.quantize)), torch.no_grad(), \
            mock.patch.object(requantize, "product", watched(requantize.product)), \
            mock.patch.object(requantize, "addition", watched(requantize.addition)):
        deployed(x)
    return [s.int() + 128 * (s.dtype == torch.int8) for s in seen]      # the file holds them as uint8


@pytest.mark.parametrize("recipe", ["w8a8", "onnxruntime"])
def test_codes_and_predictions_of_a_trained_network(network: nn.Module, digits: tuple[Tensor, Tensor], recipe: str,
                                                    tmp_path: Path) -> None:
    x, y = digits
    chosen = recipe if recipe == "w8a8" else targets.default_recipe(recipe)
    deployed = deploy(copy.deepcopy(network), chosen, x[:256])
    path = tmp_path / "m.onnx"
    with torch.no_grad():
        expected = deployed(x)
    assert (expected.argmax(-1) == y).float().mean() > 0.9
    ours = codes_of(deployed, x)
    for form in (None, "integer"):
        slow = recipe == "w8a8" and form is None
        with pytest.warns(UserWarning, match="9 convolutions become ConvInteger") if slow else nullcontext():
            made, operators = written(deployed, path, x[:8], target="onnxruntime", form=form)
        assert not FLOAT_PRODUCTS & set(operators)
        assert sum(n for k, n in operators.items() if k in INTEGER_KERNELS) == 10
        if recipe == "onnxruntime":
            assert operators["QLinearConv" if form is None else "ConvInteger"] == 9
            assert operators["QLinearAdd"] == 3
        np.testing.assert_array_equal(outputs(made, x)[0].argmax(-1), expected.argmax(-1).numpy())
        watching, fused = session(path, codes=True)
        assert not FLOAT_PRODUCTS & set(fused)
        theirs = outputs(watching, x)[1:]
        assert len(ours) == len(theirs)
        for a, b in zip(ours[:-1], theirs[:-1]):
            np.testing.assert_array_equal(a.numpy(), b)
        different = np.abs(ours[-1].numpy() - theirs[-1])       # behind a mean, which has other last bits there
        assert different.max() <= 1
        assert (different > 0).mean() <= 1e-4


@pytest.mark.parametrize("name", ["conv", "transposed", "3d", "tied"])
def test_every_layer_type_runs_on_integers(name: str, tmp_path: Path) -> None:
    x = zoo.inputs(name, 4)
    deployed = deploy(zoo.build(name), "w8a8", x)
    made, operators = written(deployed, tmp_path / "m.onnx", x)
    assert not FLOAT_PRODUCTS & set(operators)
    products = [m for m in quantized_modules(deployed).values() if m.plan.weight and m.plan.kind != "Embedding"]
    assert sum(n for k, n in operators.items() if k in INTEGER_KERNELS) == len(products)
    other = zoo.inputs(name, 7)                                 # the batch is open
    with torch.no_grad():
        expected = deployed(other)
    np.testing.assert_allclose(outputs(made, other)[0], expected.numpy(), atol=0.01 * float(expected.abs().max()))


@pytest.mark.parametrize(("weight", "given", "bits"), [
    ({"format": "int8"}, {"format": "int8"}, 8),
    ({"format": "uint8", "symmetric": False}, {"format": "uint8"}, 8),
    ({"format": "int4", "granularity": "per_group", "group_size": 16}, None, 4),
    ({"format": "uint4", "granularity": "per_group", "group_size": 32, "symmetric": False}, None, 4),
    ({"format": "int8", "granularity": "per_group", "group_size": 32}, None, 8),
    ({"format": "int2_midrise"}, None, 4),
    ({"format": "binary"}, {"format": "int8"}, 8),
    ({"format": "int4", "granularity": "per_group", "group_size": 16}, {"format": "int8"}, 8),
])
def test_initializers_are_the_weights(weight: dict[str, Any], given: Any, bits: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 24))
    x, path = torch.randn(9, 64), tmp_path / "m.onnx"
    deployed = deploy(model, zoo.every_layer(weight, given), x)
    made, operators = written(deployed, path, x)
    kinds = {t.name: t.data_type for t in onnx.load(path).graph.initializer}
    grouped = given is not None and "group_size" in weight
    for name, module in quantized_modules(deployed).items():
        kind = kinds[f"{name}.weight_codes"]
        assert onnx.TensorProto.DataType.Name(kind) == ("U" if "uint" in weight["format"] else "") + f"INT{bits}"
        if not grouped:
            assert torch.equal(values_in(path, name, tuple(module.weight_shape)), module.weight), name
    floats = [t for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert all(int(np.prod(t.dims)) < 32 * 24 / 4 for t in floats), "a float copy of a weight"
    assert sum(n for k, n in operators.items() if k in INTEGER_KERNELS) == 2
    with torch.no_grad():
        expected = deployed(x).numpy()
    np.testing.assert_allclose(outputs(made, x)[0], expected, atol=2e-6 if given is None or not grouped else 1e-5)
    if given is not None and not grouped:
        np.testing.assert_allclose(outputs(made, x)[0], expected, atol=1e-6)


@pytest.mark.parametrize("gain", [-1.0, 0.0])
def test_batch_norms_of_any_sign_become_positive_scales(gain: float, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, groups=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    with torch.no_grad():
        model[1].weight[:4] = gain                              # type: ignore[index]
        model[0].weight[:, 0, 0, 0] = 3.0                       # type: ignore[index]  so that no channel holds -128
        model[1].bias.normal_()                                 # type: ignore[union-attr]
    x, path = torch.randn(4, 3, 9, 9), tmp_path / "m.onnx"
    deployed = deploy(model, "w8a8", x)
    assert float(quantized_modules(deployed)["0"].weight_scale.min()) <= 0
    made, operators = written(deployed, path, x, form="qdq")
    held = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    assert (held["0.weight_scale"] > 0).all()
    assert torch.equal(values_in(path, "0", (8, 3, 3, 3)), quantized_modules(deployed)["0"].weight)
    assert operators["QLinearConv"] == 1
    with torch.no_grad():
        expected = deployed(x)
    np.testing.assert_allclose(outputs(made, x)[0], expected.numpy(), atol=0.01 * float(expected.abs().max()))


def test_a_scale_that_must_stay_negative_is_refused_where_the_target_minds(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        model[1].weight.fill_(-1.0)                             # type: ignore[union-attr]
        model[0].weight[:, 0, 0, 0] = -3.0                      # type: ignore[index]
    x = torch.randn(4, 3, 9, 9)
    deployed = deploy(model, "w8a8", x)
    made, operators = written(deployed, tmp_path / "m.onnx", x, form="qdq")
    assert operators["QLinearConv"] == 1
    with torch.no_grad():
        expected = deployed(x)
    np.testing.assert_allclose(outputs(made, x)[0], expected.numpy(), atol=0.01 * float(expected.abs().max()))
    with pytest.raises(UnsupportedError, match="0: a folded batch norm makes 4 scales negative"):
        qat.export(deployed, tmp_path / "no.onnx", format="onnx", example_inputs=x, target="openvino")
    assert not (tmp_path / "no.onnx").exists()


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


def integer_products(deployed: nn.Module, steps: int = 1) -> int:
    """How many products coverage calls quantized; those of recurrent weights once for each time step."""
    count = 0
    for name, module in quantized_modules(deployed).items():
        if isinstance(module, Composite) or module.plan.kind == "Embedding":
            continue
        count += steps if name.rpartition(".")[2].startswith(("hh_", "hr_")) else 1
    return count


@pytest.mark.parametrize("recipe", ["w8a8", "w4a16"])
def test_a_transformer_encoder_runs_on_integers(recipe: str, tmp_path: Path) -> None:
    x = torch.randint(0, 50, (6, 7))
    deployed = deploy(Encoder(), recipe, x)
    made, operators = written(deployed, tmp_path / "m.onnx", x)
    found = sum(n for k, n in operators.items() if k in INTEGER_KERNELS)
    products = [m for m in quantized_modules(deployed).values() if not isinstance(m, Composite)
                and m.plan.kind != "Embedding" and (m.plan.weight or m.plan.input)]
    assert found == len(products) == (17 if recipe != "w4a16" else 13)
    if recipe != "w4a16":
        assert not FLOAT_PRODUCTS & set(operators)
    with torch.no_grad():
        expected = deployed(x)
    got = outputs(made, x)[0]
    np.testing.assert_allclose(got, expected.numpy(), atol=0.02 * float(expected.abs().max()))
    np.testing.assert_array_equal(got.argmax(-1), expected.argmax(-1).numpy())


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_recurrent_layers_run_on_integers(cell: str, tmp_path: Path) -> None:
    x = torch.randint(0, 256, (4, 6)), torch.tensor([6, 2, 5, 1])
    deployed = deploy(RecurrentClassifier(cell=cell, width=16, hidden=24), "w8a8", x)
    made, operators = written(deployed, tmp_path / "m.onnx", x)
    assert not FLOAT_PRODUCTS & set(operators)
    assert sum(n for k, n in operators.items() if k in INTEGER_KERNELS) == integer_products(deployed, 6) == 8
    with torch.no_grad():
        expected = deployed(*x)
    np.testing.assert_allclose(outputs(made, *x)[0], expected.numpy(), atol=1e-3)


def test_dynamic_ranges_fuse_where_the_recipe_was_fitted(tmp_path: Path) -> None:
    recipe, changes = targets.adjust(qat.Recipe.preset("w8a8_dynamic"), "onnxruntime")
    assert any("DynamicQuantizeLinear" in c for c in changes)
    model, x = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 4)), torch.randn(5, 32)
    made, operators = written(deploy(model, recipe, x), tmp_path / "m.onnx", x, target="onnxruntime")
    assert operators["DynamicQuantizeMatMul"] + operators["MatMulIntegerToFloat"] == 2
    per_token = deploy(model, "w8a8_dynamic", x)
    with pytest.raises(UnsupportedError, match=r"0: its input .*per_token.* does not run on onnxruntime.*adjust"):
        qat.export(per_token, tmp_path / "no.onnx", format="onnx", example_inputs=x, target="onnxruntime")
    made, operators = written(per_token, tmp_path / "any.onnx", x)
    with torch.no_grad():
        np.testing.assert_array_equal(outputs(made, x)[0], per_token(x).numpy())


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    x = torch.randn(4, 12)
    deployed = deploy(zoo.mlp(), "w8a8", x)
    for name in ("a", "b"):
        qat.export(deployed, tmp_path / name / "m.onnx", format="onnx", example_inputs=x)
    first, second = ((tmp_path / n / "m.onnx").read_bytes() for n in "ab")
    assert first == second
    assert b"/" + Path(qat.__file__).parts[1].encode() + b"/" not in first, "a path of this machine"
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["README.md", "m.onnx", "m.onnx.json"]
    model = onnx.load(tmp_path / "a" / "m.onnx")
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]


def test_tensorrt_files_follow_the_rules_of_explicit_quantization(network: nn.Module, digits: Any,
                                                                  tmp_path: Path) -> None:
    x = digits[0][:64]
    deployed = deploy(copy.deepcopy(network), targets.default_recipe("tensorrt"), x)
    made, _ = written(deployed, tmp_path / "m.onnx", x, target="tensorrt")
    model = onnx.load(tmp_path / "m.onnx")
    assert broken_rules(model) == []
    assert sum(n.op_type == "Conv" for n in model.graph.node) == 9
    with torch.no_grad():
        expected = deployed(x)
    np.testing.assert_allclose(outputs(made, x)[0], expected.numpy(), atol=0.01 * float(expected.abs().max()))
    with pytest.raises(UnsupportedError, match="tensorrt"):
        qat.export(deploy(copy.deepcopy(network), "w8a8", x), tmp_path / "no.onnx", format="onnx", example_inputs=x,
                   target="tensorrt")
    assert not (tmp_path / "no.onnx").exists()


@pytest.mark.parametrize(("what", "broken"), [
    ("zero point", "zero point is not 0"), ("scale", "a scale is not positive"), ("uint8", "codes of type UINT8"),
    ("axis", "its scales lie along axis 1"), ("operand", "does not come out of a DequantizeLinear"),
    ("integer", "MatMulInteger is not explicit")])
def test_the_checker_sees_what_breaks_the_rules(what: str, broken: str) -> None:
    node, tensor = onnx.helper.make_node, numpy_helper.from_array
    kind = np.uint8 if what == "uint8" else np.int8
    point = np.array(3 if what == "zero point" else 0, kind)
    scale = np.array(-0.1 if what == "scale" else 0.1, np.float32)
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s", "z"], ["d"]),
             node("DequantizeLinear", ["w", "ws", "wz"], ["v"], axis=1 if what == "axis" else 0),
             node("MatMulInteger", ["q", "wt"], ["y"]) if what == "integer" else
             node("Gemm", ["x" if what == "operand" else "d", "v"], ["y"], transB=1)]
    held = {"s": scale, "z": point, "w": np.ones((4, 4), np.int8), "ws": np.ones(4, np.float32),
            "wz": np.zeros(4, np.int8), "wt": np.ones((4, 4), np.int8)}
    floats = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(nodes, "g", [onnx.helper.make_tensor_value_info("x", floats, [2, 4])],
                                   [onnx.helper.make_tensor_value_info("y", floats, [2, 4])],
                                   [tensor(v, k) for k, v in held.items()])
    found = broken_rules(onnx.helper.make_model(graph))
    assert any(broken in f for f in found), found


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(self.layer(x))


def test_refusals_name_what_they_are_about_and_leave_nothing(tmp_path: Path) -> None:
    x, path = torch.randn(4, 8), tmp_path / "m.onnx"
    unknown = deploy(Unknown(), "w8a8", x)
    with pytest.raises(UnsupportedError, match="bessel_j0"):
        qat.export(unknown, path, format="onnx", example_inputs=x)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    tiny = copy.deepcopy(model)
    with torch.no_grad():
        tiny[0].weight[3] = 1e-12                               # type: ignore[index]
        tiny[0].bias[3] = 1.0                                   # type: ignore[index]
    with pytest.raises(OverflowBoundError, match="0: the bias 1 of channel 3"):
        qat.export(deploy(tiny, "w8a8", x), path, format="onnx", example_inputs=x, form="qdq")
    qat.export(deploy(tiny, "w8a8", x), tmp_path / "integer.onnx", format="onnx", example_inputs=x)
    deployed = deploy(model, "w8a8", x)
    for options, text in (({"target": "tensorflow"}, "tensor"), ({"form": "qqdq"}, "did you mean 'qdq'"),
                          ({"example_inputs": None}, "example_inputs")):
        with pytest.raises(UnsupportedError, match=text):
            qat.export(deployed, path, format="onnx", **{"example_inputs": x, **options})
    with pytest.raises(UnsupportedError, match="float32 models"):
        qat.export(deployed.half(), path, format="onnx", example_inputs=x.half())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "integer.onnx", "integer.onnx.json"]


class Branches(nn.Module):
    """Sums, concatenations and products of activations that are modules, and pooling between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(4, 6, 1, groups=2)
        self.add, self.concat, self.product = qat.Add(), qat.Concat(1), qat.MatMul()
        self.pool, self.last, self.head = nn.MaxPool1d(2), nn.Conv1d(12, 4, 3, dilation=2), MLP(16, (8,), 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.relu(self.left(x)), self.right(x)
        y = self.last(self.pool(self.concat(self.add(a, b), b)))
        return self.head(self.product(y, y.transpose(1, 2)))


def test_functions_of_activations(tmp_path: Path) -> None:
    x = torch.randn(5, 4, 12)
    deployed = deploy(Branches(), targets.default_recipe("onnxruntime"), x)
    made, operators = written(deployed, tmp_path / "m.onnx", x, form="auto")
    assert not FLOAT_PRODUCTS & set(operators)
    assert operators["QLinearConcat"] == 1
    with torch.no_grad():
        expected = deployed(x)
    np.testing.assert_allclose(outputs(made, x)[0], expected.numpy(), atol=0.02 * float(expected.abs().max()))
