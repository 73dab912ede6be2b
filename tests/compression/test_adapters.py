"""Low-rank adapters: trained inside the quantizer, merged exactly, gone from what is deployed."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import zoo
from torch import Tensor, nn

import qat
from qat.errors import CheckpointError, PrepareError, RecipeError, SpecError
from qat.modules.adapted import Adapted


def stirred(model: nn.Module) -> nn.Module:
    """The factors as after training: ``up`` is not zero any more."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("adapter_up"):
                parameter.normal_(std=0.1)
    return model


def trained_names(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def adapted_layers(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, Adapted)]


SCHEMES = [(preset, model) for preset in ("w8a8", "w4a4", "w2a8", "w158a8", "w1a8", "w4a16", "fp16", "mixed_w8a8_bf16")
           for model in ("mlp", "conv", "transposed", "tied")] + [("w1a1", "conv"), ("w8a8_dynamic", "mlp")]


@pytest.mark.filterwarnings("ignore:1-bit activations that never change sign")    # the zoo's ReLUs come first
@pytest.mark.parametrize("first", ["adapt", "prepare"])
@pytest.mark.parametrize(("preset", "model"), SCHEMES)
def test_deployed_equals_prepared_and_holds_no_adapter(model: str, preset: str, first: str) -> None:
    x = zoo.inputs(model, 5)
    network = zoo.build(model)
    if first == "adapt":
        network = qat.prepare(qat.add_adapters(network, rank=3), preset, example_inputs=x)
    else:
        network = qat.add_adapters(qat.prepare(network, preset, example_inputs=x), rank=3)
    qat.calibrate(stirred(network), [x]).eval()
    deployed, certificate = qat.convert(network, [x])
    assert certificate.equal
    for batch in (x, zoo.inputs(model, 2)):
        with torch.no_grad():
            expected = network(batch)
            assert torch.equal(expected, deployed(batch))
        assert torch.equal(network(batch), expected), "the training path computes something else"
    plain, _ = qat.convert(qat.calibrate(qat.prepare(zoo.build(model), preset, example_inputs=x), [x]), [x])
    assert deployed.state_dict().keys() == plain.state_dict().keys()
    assert [type(m) for m in deployed.modules()] == [type(m) for m in plain.modules()]
    assert adapted_layers(network)
    assert not adapted_layers(deployed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_adapter_is_trained_through_the_quantizer(dtype: torch.dtype) -> None:
    """Against autograd on the plain expression; the base's dtype is kept and the factors are float32 at least."""
    torch.manual_seed(0)
    base = nn.Linear(6, 5).to(dtype)
    layer = stirred(qat.add_adapters(base, rank=2, alpha=3))
    assert layer.weight.dtype == dtype
    assert layer.adapter_up.dtype == torch.promote_types(dtype, torch.float32)
    wide = layer.adapter_up.dtype
    down, up = (p.detach().clone().requires_grad_() for p in (layer.adapter_down, layer.adapter_up))
    expected = (base.weight.detach().to(wide) + 1.5 * (up @ down)).to(dtype)
    assert torch.equal(layer.weight, expected)
    prepared = qat.calibrate(qat.prepare(layer, zoo.every_layer()), [torch.randn(4, 6).to(dtype)])
    x, g = torch.randn(4, 6).to(dtype), torch.randn(4, 5).to(dtype)
    (prepared(x) * g).sum().backward()
    codes = prepared.input_quantizer.quantize(x)
    gradient = g.float().T @ codes.dequantize(torch.float32)
    wanted_up, wanted_down = torch.autograd.grad(expected, (up, down), gradient.to(dtype))
    tolerance = 0.02 if dtype != torch.float64 else 1e-4
    assert torch.allclose(prepared.adapter_up.grad, wanted_up, rtol=tolerance, atol=tolerance)
    assert torch.allclose(prepared.adapter_down.grad, wanted_down, rtol=tolerance, atol=tolerance)
    assert prepared._parameters["weight"].grad is None


def test_training_moves_only_adapters_and_scales_and_lowers_the_loss() -> None:
    torch.manual_seed(1)
    x = torch.randn(64, 12)
    target = zoo.build("mlp")(x).detach() + 0.5 * (x @ torch.randn(12, 3)) / 3
    model = qat.add_adapters(qat.prepare(zoo.build("mlp"), "w4a8", example_inputs=x), rank=4)
    qat.calibrate(model, [x])
    assert {n.rpartition(".")[2] for n in trained_names(model)} == {"adapter_down", "adapter_up", "log_scale"}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(60):
        loss = nn.functional.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trained_names(model)
    deployed, _ = qat.convert(model, [x])
    with torch.no_grad():
        assert torch.equal(deployed(x), model.eval()(x))


@pytest.mark.parametrize("model", zoo.ZOO)
def test_a_fresh_adapter_changes_nothing(model: str) -> None:
    x, network = zoo.inputs(model, 3), zoo.build(model).eval()
    adapted = qat.add_adapters(network)
    with torch.no_grad():
        assert torch.equal(adapted(x), network(x))
    assert not adapted_layers(network)
    assert set(network.state_dict()) < set(adapted.state_dict())


@pytest.mark.parametrize("prepared", [False, True])
def test_merge_is_exact_and_leaves_the_plain_model(prepared: bool) -> None:
    x = zoo.inputs("conv", 3)
    plain = qat.calibrate(qat.prepare(zoo.build("conv"), "w4a8", example_inputs=x), [x]) if prepared \
        else zoo.build("conv")
    adapted = stirred(qat.add_adapters(plain)).eval()
    merged = qat.merge_adapters(adapted)
    with torch.no_grad():
        assert torch.equal(merged(x), adapted(x))
        assert not torch.equal(merged(x), plain.eval()(x))
    assert [type(m) for m in merged.modules()] == [type(m) for m in plain.modules()]
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert adapted_layers(adapted), "the copy was to be changed, not the model"


def test_under_autocast_the_weight_has_the_same_bits() -> None:
    layer = stirred(qat.add_adapters(nn.Linear(64, 33)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer.weight
    assert torch.equal(inside, layer.weight)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_shapes() -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.ConvTranspose1d(4, 6, 3, groups=2), nn.Linear(1, 9),
                          nn.Conv3d(2, 4, (1, 2, 3)), nn.Linear(7, 0))
    adapted = qat.add_adapters(model, rank=4, alpha=2)
    assert [tuple(m.adapter_up.shape) for m in adapted[:4]] == [(6, 4), (4, 4), (9, 1), (4, 4)]
    assert [tuple(m.adapter_down.shape) for m in adapted[:4]] == [(4, 9), (4, 9), (1, 1), (4, 12)]
    assert all(float(m.adapter_scaling) == 0.5 for m in adapted[:4]), "narrow layers are scaled as the others"
    assert not isinstance(adapted[4], Adapted), "there is nothing to adapt in a weight without elements"
    for layer in stirred(adapted)[:4]:
        delta = layer.weight - layer._parameters["weight"]
        assert delta.shape == layer._parameters["weight"].shape
        assert torch.linalg.matrix_rank(delta.flatten(1).detach()) <= 4


def test_tied_weights_share_the_adapter() -> None:
    model = stirred(qat.add_adapters(zoo.Tied(), match="head"))
    assert adapted_layers(model) == ["table", "head"]
    assert model.head.adapter_up is model.table.adapter_up
    assert torch.equal(model.head.weight, model.table.weight)
    merged = qat.merge_adapters(model)
    assert merged.head.weight is merged.table.weight
    x = torch.randint(0, 11, (3, 6))
    recipe = {"edges": "int8", "rules": [{"weight": "int4", "input": "int8"}]}
    prepared = qat.calibrate(qat.prepare(model, recipe, example_inputs=x), [x])
    assert prepared.table.plan.weight.bits == prepared.head.plan.weight.bits == 8, "an edge's codes are shared"
    deployed, _ = qat.convert(prepared, [x])
    assert deployed.head.weight_codes is deployed.table.weight_codes


def test_match_and_also_train() -> None:
    model = qat.add_adapters(zoo.Residual(), match=["stem", "conv"], also_train=["head.*", "norm.bias"])
    assert adapted_layers(model) == ["stem", "conv"]
    assert trained_names(model) == {"stem.adapter_down", "stem.adapter_up", "conv.adapter_down", "conv.adapter_up",
                                    "head.weight", "head.bias", "norm.bias"}
    assert adapted_layers(qat.add_adapters(zoo.Residual(), also_train="head.*")) == ["stem", "conv"]


def test_a_float_checkpoint_loads_into_the_base() -> None:
    model, other = stirred(qat.add_adapters(zoo.build("mlp"))), zoo.build("mlp")
    up = model[0].adapter_up.detach().clone()
    model.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(model[0]._parameters["weight"], other[0].weight)
    assert torch.equal(model[0].adapter_up, up)
    partial = {k: v for k, v in model.state_dict().items() if k != "0.adapter_up"}
    with pytest.raises(RuntimeError, match="adapter_up"):
        model.load_state_dict(partial)


def test_state_round_trip() -> None:
    x, base = zoo.inputs("conv", 8), zoo.build("conv")

    def fresh(rank: int = 2) -> nn.Module:
        return qat.add_adapters(qat.prepare(copy.deepcopy(base), "w4a8", example_inputs=x), rank=rank)

    model = stirred(qat.calibrate(fresh(), [x]))
    model.train()(x)                                                # moves the statistics of the batch norms
    state = qat.adapter_state(model)
    assert "0.adapter_up" in state
    assert "1.running_mean" in state
    assert not any(n in state for n in ("0.weight", "1.weight", "10.bias"))
    other = qat.load_adapter_state(fresh(), state)
    with torch.no_grad():
        assert torch.equal(other.eval()(x), model.eval()(x))
    untouched = {n: v.clone() for n, v in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"other shapes 0\.adapter_down"):
        qat.load_adapter_state(other, qat.adapter_state(fresh(rank=1)))
    with pytest.raises(CheckpointError, match=r"missing .*; unexpected spare"):
        qat.load_adapter_state(other, {"spare": x})
    assert all(torch.equal(v, untouched[n]) or v.isnan().any() for n, v in other.state_dict().items())
    for call in (qat.adapter_state, lambda m: qat.load_adapter_state(m, {})):
        with pytest.raises(PrepareError, match="no adapters"):
            call(base)


@pytest.mark.parametrize("first", ["adapt", "prepare", "adapt only"])
def test_copies_and_pickles(first: str) -> None:
    x = zoo.inputs("mlp", 4)
    model = zoo.build("mlp")
    if first == "prepare":
        model = qat.add_adapters(qat.calibrate(qat.prepare(model, "w8a8"), [x]))
    else:
        model = qat.add_adapters(model)
        model = model if first == "adapt only" else qat.calibrate(qat.prepare(model, "w8a8"), [x])
    stirred(model).eval()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        assert adapted_layers(twin) == adapted_layers(model)
        assert twin[0].adapter_up is not model[0].adapter_up


def test_saved_and_loaded_into_either_skeleton(tmp_path) -> None:
    x, float_model = zoo.inputs("residual", 4), zoo.build("residual")
    adapted = stirred(qat.add_adapters(float_model))
    model = qat.calibrate(qat.prepare(adapted, "w4a8", example_inputs=x), [x])
    deployed, _ = qat.convert(model, [x])
    qat.save(deployed, tmp_path / "out")
    for skeleton in (float_model, adapted):
        assert torch.equal(qat.load(tmp_path / "out", skeleton)(x), deployed(x))
    assert adapted_layers(adapted), "the skeleton is not changed"


def test_coverage_counts_and_names_the_adapters() -> None:
    model = qat.add_adapters(qat.prepare(zoo.build("mlp"), "w8a8", example_inputs=zoo.inputs("mlp", 2)), rank=2)
    (row,) = [r for r in qat.coverage(model).rows if r.name == "0"]
    assert "adapter of rank 2 inside the quantizer" in row.reason
    assert row.params == 12 * 7 + 7 + 2 * (12 + 7)
    assert qat.coverage(model).fraction == 1


class Subclass(nn.Linear):
    """A user's layer with its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * 2, self.bias)


def test_layers_that_stay_float_are_merged_too() -> None:
    x = torch.randn(5, 6)
    model = stirred(qat.add_adapters(nn.Sequential(Subclass(6, 4), nn.Linear(4, 3))))
    assert type(model[0]).__name__ == "AdaptedSubclass"
    recipe = {"rules": [{"match": {"name": "1"}, "weight": "int8", "input": "int8"}]}
    prepared = qat.calibrate(qat.prepare(model, recipe, example_inputs=x), [x])
    rows = {r.name: r for r in qat.coverage(prepared).rows}
    assert rows["0: linear"].status == "kept"
    deployed, certificate = qat.convert(prepared, [x])
    assert certificate.equal
    assert type(deployed[0]) is Subclass
    assert torch.equal(deployed[0].weight, model[0].weight)


def test_hooks_modes_and_memory_format_stay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).to(memory_format=torch.channels_last).eval()
    seen: list[str] = []
    model[0].register_forward_hook(lambda *_: seen.append("called"))
    adapted = stirred(qat.add_adapters(model))
    adapted(torch.randn(1, 3, 5, 5))
    assert seen == ["called"]
    assert not adapted[0].training
    assert adapted[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert qat.merge_adapters(adapted)[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_module_called_twice_and_one_with_two_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 5)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.b(x).relu())

    x = torch.randn(3, 5)
    model = stirred(qat.add_adapters(Twice(), match="b"))
    assert model.a is model.b
    prepared = qat.calibrate(qat.prepare(model, "w8a8", example_inputs=x), [x])
    deployed, _ = qat.convert(prepared, [x])
    assert torch.equal(deployed(x), prepared.eval()(x))


def test_misuse_is_typed() -> None:
    mlp = zoo.build("mlp")
    for options, error, said in (
        ({"rank": 0}, SpecError, "rank is a whole number"), ({"rank": 2.5}, SpecError, "rank"),
        ({"alpha": math.nan}, SpecError, "alpha is a finite number"),
        ({"match": "hed*"}, RecipeError, "matches no linear layer"),
        ({"also_train": "9.wait"}, RecipeError, "matches no parameter"),
        ({"also_train": "*"}, RecipeError, "nothing to adapt"),
    ):
        with pytest.raises(error, match=said):
            qat.add_adapters(mlp, **options)
    with pytest.raises(PrepareError, match="0 has an adapter already"):
        qat.add_adapters(qat.add_adapters(mlp))
    with pytest.raises(PrepareError, match="computed by a parametrization"):
        qat.add_adapters(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))))
    with pytest.raises(PrepareError, match="is lazy"):
        qat.add_adapters(nn.Sequential(nn.LazyLinear(3)))
    x = zoo.inputs("mlp", 2)
    deployed, _ = qat.convert(qat.calibrate(qat.prepare(mlp, "w8a8"), [x]), [x])
    with pytest.raises(PrepareError, match="0 is deployed"):
        qat.add_adapters(deployed)
    reader = nn.Module()
    reader.layer, reader.table = nn.Linear(3, 3), nn.Module()
    reader.table.scale = reader.layer.weight
    with pytest.raises(PrepareError, match=r"layer: table \(Module\) reads the same weight"):
        qat.add_adapters(reader)
    assert all(p.requires_grad for p in mlp.parameters())


@pytest.mark.parametrize("first", ["adapt", "prepare"])
def test_a_weight_with_an_adapter_can_be_overwritten(first: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.MultiheadAttention(8, 2))
    model = qat.add_adapters(model, rank=2) if first == "adapt" else model
    model = qat.prepare(model, "w8a8")
    model = stirred(model if first == "adapt" else qat.add_adapters(model, rank=2))
    for layer, holder in ((model[0], model[0]), (model[1].out, model[1].out_proj)):
        assert isinstance(holder, Adapted)
        wanted = torch.randn(8, 8)
        layer.write_weight(wanted)
        torch.testing.assert_close(layer.weight.detach(), wanted)


class Mirrored(nn.Module):
    """Functions read both weights: one transposed, one in a forward that is not that of its base class."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.middle, self.bias = nn.Linear(6, 4), Subclass(4, 4), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.middle(self.encode(x).relu()), self.encode.weight.t(), self.bias)


@pytest.mark.parametrize("first", ["adapt", "prepare"])
@pytest.mark.parametrize("preset", ["w8a8", "w4a16"])
def test_weights_that_functions_read(preset: str, first: str, tmp_path) -> None:
    """They are quantized with their correction, and it is trained; its factors are no weights of their own."""
    torch.manual_seed(0)
    x = torch.randn(32, 6)
    plain = qat.prepare(Mirrored(), preset, example_inputs=x)
    model = qat.add_adapters(Mirrored(), rank=2) if first == "adapt" else Mirrored()
    model = qat.prepare(model, preset, example_inputs=x)
    model = qat.calibrate(model if first == "adapt" else qat.add_adapters(model, rank=2), [x])
    rows, expected = {r.name: r for r in qat.coverage(model).rows}, {r.name: r for r in qat.coverage(plain).rows}
    assert rows.keys() == expected.keys()
    for name in ("encode.weight", "middle.weight"):
        assert (rows[name].status, rows[name].weight) == ("quantized", expected[name].weight)
        assert "adapter of rank 2" in rows[name].reason
    assert qat.coverage(model).total_params == sum(p.numel() for p in model.parameters())
    codes = model.middle.weight_product.quantized_weight().codes
    stirred(model)
    assert not torch.equal(model.middle.weight_product.quantized_weight().codes, codes)
    model(x).square().mean().backward()
    assert all(bool(m.adapter_up.grad.any()) for m in (model.encode, model.middle))
    deployed, _ = qat.convert(model, [x])
    assert torch.equal(deployed(x), model.eval()(x))
    assert torch.equal(qat.merge_adapters(model)(x), deployed(x))
    qat.save(deployed, tmp_path / "deployed")
    assert torch.equal(qat.load(tmp_path / "deployed", Mirrored())(x), deployed(x))


def test_adapters_inside_of_attention_are_counted() -> None:
    model = qat.add_adapters(qat.prepare(nn.TransformerEncoderLayer(8, 2, 12), "w8a8"), rank=2)
    assert "adapter of rank 2" in {r.name: r for r in qat.coverage(model).rows}["self_attn.out"].reason
    assert qat.coverage(model).total_params == sum(p.numel() for p in model.parameters())
