"""Convert and its certificate (law 8), and what convert refuses (faults 2 and 4)."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import qat
from qat.deploy.convert import certify, freeze
from qat.errors import ConvertError, NotCalibratedError, ParityError, PrepareError
from qat.modules.base import QuantizedModule
from qat.quantizers.quantizer import FrozenQuantizer, StaticQuantizer


def test_the_certificate_says_what_was_compared() -> None:
    x = zoo.inputs("conv", 4)
    before = zoo.prepared(zoo.build("conv"), "w8a8", [x])
    _, certificate = qat.convert(before, [x, x[:3]])
    assert (certificate.batches, certificate.samples) == (2, 7)
    assert certificate.equal
    assert certificate.max_output_difference == 0.0
    assert certificate.prediction_agreement == 1.0
    names = {n for n, m in before.named_modules() if isinstance(m, QuantizedModule)}
    assert set(certificate.layers) == names
    assert all(record == {"weight_codes": 0, "input_codes": 0} for record in certificate.layers.values())
    assert "equal bit for bit" in str(certificate)
    assert certificate.to_dict()["samples"] == 7


@pytest.mark.parametrize("what", ["code", "scale", "bias", "input scale", "zero point"])
def test_a_tampered_model_gets_no_certificate(what: str) -> None:
    x = zoo.inputs("mlp", 16)
    before = zoo.prepared(zoo.build("mlp"), zoo.every_layer("int8", "uint8"), [x])
    after = copy.deepcopy(before)
    freeze(after)
    assert certify(before, after, [x]).equal
    layer = after[2]
    if what == "code":
        layer.weight_codes[3] ^= 1
    elif what == "scale":
        layer.weight_scale[1] *= 1.1
    elif what == "bias":
        after[0].bias[0] += 1e-3
    elif what == "input scale":
        after[0].input_quantizer.scale *= 1.05
    else:
        after[0].input_quantizer.zero_point += 1
        after[0].input_quantizer.loaded()
    for module in (after[0], layer):
        module._codes = module._kernel = None
    with pytest.raises(ParityError, match="differs") as caught:
        certify(before, after, [x])
    if what == "code":
        assert "first at 2" in str(caught.value)


def test_a_difference_in_the_float_parts_is_found_too() -> None:
    x = zoo.inputs("tied", 4)
    before = zoo.prepared(zoo.build("tied"), zoo.every_layer("int8", None), [x])
    after = copy.deepcopy(before)
    freeze(after)
    after.norm.weight.data[0] += 1e-3
    with pytest.raises(ParityError, match=r"floating point between .* only with example_inputs"):
        certify(before, after, [x])


@dataclasses.dataclass
class Output:
    logits: Tensor
    hidden: Tensor


class Rich(nn.Module):
    """Returns its tensors in a container."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.relu, self.head = nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        hidden = self.relu(self.stem(x if scale is None else x * scale))
        logits = self.head(hidden)
        if self.kind == "tuple":
            return logits, (hidden,)
        if self.kind == "dict":
            return {"logits": logits, "hidden": [hidden]}
        return Output(logits, hidden)


def parts(result: Any) -> tuple[Tensor, Tensor]:
    if isinstance(result, Output):
        return result.logits, result.hidden
    if isinstance(result, dict):
        return result["logits"], result["hidden"][0]
    return result[0], result[1][0]


@pytest.mark.parametrize("output", [None, "int8"])
@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass"])
def test_models_that_return_containers(kind: str, output: str | None) -> None:
    model = Rich(kind)
    x = torch.randn(9, 6)
    for batch in (x, (x,), [x], {"x": x}, {"x": x, "scale": torch.tensor(0.7)}, (x, torch.tensor(0.7))):
        before = zoo.prepared(model, zoo.every_layer(output=output), [batch])
        after, certificate = qat.convert(before, [batch])
        assert certificate.samples == 9
        with torch.no_grad():
            results = parts(before(x)), parts(after(x))
        for result in results:
            assert all(isinstance(t, Tensor) for t in result), "codes got out of the model"
            assert float(result[1].min()) >= 0.0, "the ReLU that the caller sees was taken away"
        assert all(torch.equal(a, b) for a, b in zip(*results))


def test_the_certificate_compares_what_is_in_a_dataclass() -> None:
    x = torch.randn(9, 6)
    before = zoo.prepared(Rich("dataclass"), "w8a8", [x])
    after = copy.deepcopy(before)
    freeze(after)
    after.head.bias.data += 1.0
    with pytest.raises(ParityError):
        certify(before, after, [x])


# ------------------------------------------------------------------------------------------------ refusals


def test_convert_before_calibration_names_every_layer() -> None:
    model = qat.prepare(zoo.build("mlp"), "w8a8", example_inputs=zoo.inputs("mlp", 2))
    with pytest.raises(NotCalibratedError, match=r"0\.input, 2\.input, 4\.input.*calibrate"):
        qat.convert(model, [zoo.inputs("mlp", 2)])


def test_convert_of_a_layer_that_the_data_never_reached() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = qat.calibrate(qat.prepare(Net(), "w8a8"), [torch.randn(3, 4)])
    with pytest.raises(NotCalibratedError, match=r"unused\.input.*keep: float32"):
        qat.convert(model, [torch.randn(3, 4)])


def test_convert_before_anything_ran_refuses() -> None:
    model = qat.prepare(zoo.build("mlp"), "w8a16")
    assert qat.coverage(model).unobserved
    with pytest.raises(ConvertError, match="example_inputs"):
        qat.convert(model, [zoo.inputs("mlp", 2)])


def test_convert_needs_data_and_a_prepared_model() -> None:
    x = zoo.inputs("mlp", 2)
    with pytest.raises(PrepareError, match=r"qat\.prepare"):
        qat.convert(zoo.build("mlp"), [x])
    before = zoo.prepared(zoo.build("mlp"), "w8a8", [x])
    with pytest.raises(ConvertError, match="at least one batch"):
        qat.convert(before, [])
    after, _ = qat.convert(before, [x])
    with pytest.raises(ConvertError, match="deployed already"):
        qat.convert(after, [x])
    with pytest.raises(ConvertError, match="deployed"):
        qat.calibrate(after, [x])


def test_a_quantizer_that_convert_cannot_freeze_is_named() -> None:
    class Stubborn(StaticQuantizer):
        def freeze(self) -> StaticQuantizer:      # type: ignore[override]
            return self

    x = zoo.inputs("mlp", 2)
    before = zoo.prepared(zoo.build("mlp"), "w8a8", [x])
    before[2].input_quantizer.__class__ = Stubborn
    with pytest.raises(ConvertError, match=r"2\.input_quantizer"):
        qat.convert(before, [x])


def test_convert_leaves_the_prepared_model_alone() -> None:
    x = zoo.inputs("conv", 3)
    before = zoo.prepared(zoo.build("conv"), "w8a8", [x]).train()
    state = {k: v.clone() for k, v in before.state_dict().items()}
    after, _ = qat.convert(before, [x])
    assert before.training
    assert not after.training
    assert all(torch.equal(v, state[k]) for k, v in before.state_dict().items())
    assert all(p.requires_grad for p in before.parameters())
    same, _ = qat.convert(before, [x], inplace=True)
    assert same is before
    assert torch.equal(same(x), after(x))


def test_a_deployed_model_holds_no_float_weight_and_no_observer() -> None:
    x = zoo.inputs("conv", 3)
    after, _ = qat.convert(zoo.prepared(zoo.build("conv"), "w4a4", [x]), [x])
    assert all(isinstance(m, FrozenQuantizer) for n, m in after.named_modules() if n.endswith("_quantizer"))
    for name in after.state_dict():
        assert not name.endswith(".weight"), name
        assert "observer" not in name
    size = sum(t.numel() * t.element_size() for t in after.state_dict().values())
    assert size < sum(t.numel() * t.element_size() for t in zoo.build("conv").state_dict().values())


def test_the_certificate_works_on_a_stream() -> None:
    x = zoo.inputs("mlp", 4)
    before = zoo.prepared(zoo.build("mlp"), "w8a8", [x])
    _, certificate = qat.convert(before, (zoo.inputs("mlp", n) for n in (1, 0, 3)))
    assert (certificate.batches, certificate.samples) == (3, 4)


def test_floats_on_strided_inputs() -> None:
    """torch multiplies strided inputs in another way where the weight requires a gradient, even under no_grad."""
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.head(self.attention(x, y, y)[0].transpose(0, 1))

    x = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    kept = qat.prepare(Net(), "fp16", example_inputs=x)
    _, certificate = qat.convert(kept, [x])
    assert certificate.equal
    assert all(p.requires_grad for p in kept.parameters())
    narrow = qat.calibrate(qat.prepare(Net(), "w4a16", example_inputs=x), [x]).eval()
    deployed, _ = qat.convert(narrow, [x])
    assert torch.equal(narrow(*x), deployed(*x)), "with gradients on one side only"
