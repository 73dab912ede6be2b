"""ExecuTorch files: the integers of the deployed model, run by XNNPACK's int8 kernels."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat import targets
from qat.errors import OverflowBoundError, UnsupportedError
from qat.modules.functional import Add, Concat, MatMul
from qat.recipe import Recipe, Rule
from qat.rewriter import quantized_modules
from qat.training.models import MLP, ResidualNet
from tests.deploy.digits import images, trained

pytest.importorskip("executorch")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")         # of its own imports
    from executorch.runtime import Runtime

    from qat.deploy import executorch_file

RECIPE = targets.default_recipe("executorch")


def deploy(model: nn.Module, x: Any, recipe: Recipe = RECIPE) -> nn.Module:
    prepared = qat.prepare(model.eval(), recipe, example_inputs=x)
    qat.calibrate(prepared, [x])
    return qat.convert(prepared, [x])[0]


def run(deployed: nn.Module, path: Path, x: Tensor, target: str | None = "executorch") -> tuple[Tensor, Tensor]:
    """What the file and what the model computes."""
    qat.export(deployed, path, format="executorch", example_inputs=x, target=target)
    with torch.no_grad():
        expected = deployed(x)
    return Runtime.get().load_program(path).load_method("forward").execute([x])[0], expected


def differing(theirs: Tensor, ours: Tensor, step: Tensor) -> Tensor:
    """By how many codes each output differs; ``step``: the scale of the output."""
    assert theirs.shape == ours.shape
    assert len(ours.unique()) > 9
    return ((theirs - ours) / step).round().abs()


class Sum(nn.Module):
    """A residual sum of a convolution and a depthwise one; negative gains, a channel without weights, a ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU6())
        self.deep = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
                                  nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12))
        self.add, self.relu, self.flat, self.head = Add(), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 64, 10)
        with torch.no_grad():
            self.stem[0].weight[3] = 0.0
            self.stem[0].weight[5] = torch.linspace(-0.1, 1.0, 9).view(1, 3, 3)     # its lowest code is not used
            self.stem[1].weight[5] = -1.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.flat(self.relu(self.add(x, self.deep(x)))))


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    return images()


@pytest.mark.parametrize("kind", ["mlp", "residual"])
def test_codes_and_predictions_of_a_trained_network(kind: str, digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    x, y = digits
    torch.manual_seed(0)
    model = trained(MLP(64, (50, 33)) if kind == "mlp" else ResidualNet(), x, y)
    deployed = deploy(model, x[:256])
    theirs, ours = run(deployed, tmp_path / "m.pte", x)
    assert (ours.argmax(-1) == y).float().mean() > 0.9
    head = list(quantized_modules(deployed).values())[-1]
    assert head.output_quantizer is not None
    codes = differing(theirs, ours, head.output_quantizer.scale)
    assert codes.max() <= 1
    assert codes.mean() <= (1e-4 if kind == "mlp" else 1e-3)       # behind sums, a code may be one off
    assert torch.equal(theirs.argmax(-1), ours.argmax(-1))
    assert (tmp_path / "m.pte").stat().st_size < 3 * sum(p.numel() for p in model.parameters())   # no float weights
    run(deployed, tmp_path / "again.pte", x)
    assert (tmp_path / "again.pte").read_bytes() == (tmp_path / "m.pte").read_bytes()


def test_depthwise_negative_gains_and_dead_channels(digits: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    x = digits[0][:300]
    torch.manual_seed(0)
    deployed = deploy(Sum(), x)
    names = set(deployed.state_dict())
    layers = {n: m for n, m in quantized_modules(deployed).items() if m.plan.weight is not None}
    assert any(bool((m.weight_scale < 0).any()) for m in layers.values())
    theirs, ours = run(deployed, tmp_path / "m.pte", x, target="arm")
    codes = differing(theirs, ours, layers["head"].output_quantizer.scale)     # type: ignore[union-attr]
    assert codes.max() <= 1
    assert codes.mean() <= 1e-3
    program = executorch_file.exported(deployed, x)
    assert set(deployed.state_dict()) == names
    held = dict(program.named_buffers())
    assert len(layers) == 4
    for name, layer in layers.items():
        codes_held, scale = held[f"{name}.executorch_codes"], held[f"{name}.executorch_scale"]
        assert codes_held.dtype == torch.int8
        assert bool((scale > 0).all())
        assert torch.equal(codes_held.float() * scale.reshape(-1, *[1] * (codes_held.dim() - 1)), layer.weight)
    with torch.no_grad():
        again = deployed(x)
    assert torch.equal(again, ours)


class Branches(nn.Module):
    """Results with several readers, activation functions between two grids, a concatenation, a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 3, padding=1), nn.Conv2d(8, 8, (3, 1))
        self.cat, self.pool, self.head = Concat(1), nn.AdaptiveAvgPool2d(1), nn.Linear(13, 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = torch.sigmoid(self.c(torch.relu(x)))
        return self.head(self.pool(self.cat(self.b(x)[..., 2:, :], y)).flatten(1))


@pytest.mark.parametrize(("model", "shape"), [
    (nn.Sequential(nn.Conv1d(3, 9, 5, padding=2, stride=2), nn.BatchNorm1d(9), nn.ReLU(),
                   nn.Conv1d(9, 6, 3, dilation=2)), (8, 3, 31)),
    (nn.Sequential(nn.Linear(13, 29), nn.GELU(), nn.LayerNorm(29), nn.Linear(29, 3, bias=False)), (4, 7, 13)),
    (nn.Sequential(nn.Conv2d(2, 5, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                   nn.Linear(15, 12)), (9, 2, 7, 3)),
    (nn.Sequential(layer := nn.Linear(6, 6), nn.ReLU(), layer), (33, 6)),
    (Branches(), (6, 3, 11, 9)),
])
def test_shapes_and_what_lies_between(model: nn.Module, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    deployed = deploy(model, x)
    theirs, ours = run(deployed, tmp_path / "m.pte", x, target=None)
    last = list(quantized_modules(deployed).values())[-1]
    assert last.output_quantizer is not None
    codes = differing(theirs, ours, last.output_quantizer.scale)
    assert codes.max() <= 1
    assert codes.mean() <= 0.01


class Attention(nn.Module):
    """Looked-up rows, and a product of activations that stays in floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.query, self.scores, self.out = nn.Embedding(40, 8), nn.Linear(8, 8), MatMul(), nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.table(x)
        return self.out(self.scores(rows, self.query(rows).transpose(-1, -2)).softmax(-1) @ rows)


def test_embeddings_and_float_products(tmp_path: Path) -> None:
    torch.manual_seed(0)
    recipe = replace(RECIPE, rules=(Rule(type="MatMul", keep="float32"), *RECIPE.rules))
    x = torch.randint(0, 40, (5, 9))
    deployed = deploy(Attention(), x, recipe)
    layers = quantized_modules(deployed)
    assert layers["table"].plan.weight is not None
    theirs, ours = run(deployed, tmp_path / "m.pte", x)
    assert layers["out"].output_quantizer is not None
    codes = differing(theirs, ours, layers["out"].output_quantizer.scale)
    assert codes.max() <= 1
    assert codes.mean() <= 0.01


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scores = MatMul()

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(x, x.transpose(-1, -2))


def narrowed(**changes: Any) -> Recipe:
    """The recipe with other specs of inputs and outputs."""
    return replace(RECIPE, rules=tuple(
        replace(r, input=r.input and r.input.replace(**changes), output=r.output and r.output.replace(**changes))
        for r in RECIPE.rules))


@pytest.mark.parametrize(("model", "shape", "recipe", "said"), [
    (Recurrent(), (2, 9, 5), RECIPE, r"cell: a LSTM is no int8 kernel.*keep: float32"),
    (Product(), (2, 4, 5), RECIPE, r"scores: XNNPACK has no int8 product of two activations.*keep: float32"),
    (nn.Sequential(nn.ConvTranspose2d(2, 3, 2)), (2, 2, 5, 5), RECIPE, r"0: a quantized ConvTranspose2d.*'onnx'"),
    (nn.Sequential(nn.Conv3d(2, 3, 2)), (2, 2, 3, 5, 5), RECIPE, r"0: a quantized Conv3d.*keep: float32"),
    (nn.Sequential(nn.Linear(5, 6)), (3, 5), targets.default_recipe("arm"), r"0: .* give it an output: int8 spec"),
    (nn.Sequential(nn.Linear(5, 6)), (3, 5), Recipe.preset("w8a8"), r"0: it was trained with a float bias.*requantize"),
    (nn.Sequential(nn.Linear(5, 6)), (3, 5), Recipe.preset("w8a16"), r"0: its inputs are floating point"),
    (nn.Sequential(nn.Linear(5, 6)), (3, 5), Recipe.preset("w8a8_dynamic"), r"0: .* static"),
    (nn.Sequential(nn.Linear(5, 6)), (3, 5), narrowed(format="int4"), r"0: int4 per_tensor is no input.*format: int8"),
])
def test_what_the_pattern_cannot_express(model: nn.Module, shape: tuple[int, ...], recipe: Recipe, said: str,
                                         tmp_path: Path) -> None:
    x = torch.randn(shape)
    deployed = deploy(model, x, recipe)
    with pytest.raises(UnsupportedError, match=said):
        qat.export(deployed, tmp_path / "m.pte", format="executorch", example_inputs=x, target="arm")
    assert not list(tmp_path.iterdir())
    assert not any("executorch" in name for name in deployed.state_dict())


def test_a_bias_that_the_file_cannot_hold(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(5, 12)), torch.randn(64, 5)
    with torch.no_grad():
        model[0].weight[2] = 1e-9
        model[0].bias[2] = 100.0
    deployed = deploy(model, x)
    with pytest.raises(OverflowBoundError, match="0: the bias 100 of channel 2"):
        qat.export(deployed, tmp_path / "m.pte", format="executorch", example_inputs=x)


def test_example_inputs_and_float32_are_asked_for(tmp_path: Path) -> None:
    x = torch.randn(3, 5)
    deployed = deploy(nn.Sequential(nn.Linear(5, 6)), x)
    with pytest.raises(UnsupportedError, match="example_inputs"):
        qat.export(deployed, tmp_path / "m.pte", format="executorch")
    with pytest.raises(UnsupportedError, match=r"float32 models.*float64.*model\.float\(\)"):
        qat.export(deployed, tmp_path / "m.pte", format="executorch", example_inputs=x.double())
