"""Wiring and modules that break other toolkits: shared and in-place ReLUs, norms, hooks, subclasses, attention."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

import qat
from qat.errors import CalibrationError, PrepareError, PruneError, UnsupportedError
from qat.modules.base import QuantizedModule
from qat.modules.normalization import Absorbed

X = (5, 3, 6, 6)


class Wired(nn.Module):
    """Two convolutions, a ReLU and a batch norm, wired up by name."""

    def __init__(self, wiring: str, inplace: bool = False) -> None:
        super().__init__()
        self.wiring = wiring
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.c = nn.Conv2d(4, 4, 1)
        self.relu, self.norm = nn.ReLU(inplace), nn.BatchNorm2d(4)
        used = getattr(Wired, wiring).__code__.co_names
        for name in [n for n in self._modules if n not in used]:
            delattr(self, name)
        zoo.batch_norms_of_any_sign(self)

    def forward(self, x: Tensor) -> Any:
        return getattr(self, self.wiring)(x)

    def relu_twice(self, x: Tensor) -> Tensor:
        return self.c(self.relu(self.b(self.relu(self.a(x)))))

    def relu_read_by_conv_and_add(self, x: Tensor) -> Tensor:
        y = self.relu(self.a(x))
        return self.b(y) + y

    def relu_returned_too(self, x: Tensor) -> Tensor:
        y = self.relu(self.a(x))
        return torch.cat([self.b(y), y])

    def relu_once_absorbable_once_not(self, x: Tensor) -> Tensor:
        return self.relu(self.b(self.relu(self.a(x))))

    def written_in_place(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.relu(y)
        return self.b(z) + y            # with an in-place ReLU, y is z

    def changed_in_place_after(self, x: Tensor) -> Tensor:
        y = self.relu(self.a(x))
        y -= 0.5
        return self.b(y)

    def conv_read_twice(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.norm(y) + y

    def norm_twice(self, x: Tensor) -> Tensor:
        return self.norm(self.b(self.norm(self.a(x))))

    def conv_twice(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.b(self.a(x))))

    def norm_read_twice(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x))
        return self.b(y) + self.c(y)

    def norm_without_conv(self, x: Tensor) -> Tensor:
        return self.b(self.norm(F.gelu(self.a(x))))

    def functional_relu(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.a(x))))

    def two_branches(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(self.relu(y)) + self.c(y)

    def keyword(self, x: Tensor) -> Tensor:
        return self.b(self.relu(input=self.norm(input=self.a(x))))


WIRINGS = [n for n in vars(Wired) if not n.startswith("_") and n not in ("forward",)]
FOLDED = {"functional_relu": True, "keyword": True, "norm_read_twice": True, "conv_read_twice": False,
          "norm_twice": False, "conv_twice": False, "norm_without_conv": False}
ABSORBED = {"relu_twice": True, "relu_read_by_conv_and_add": False, "relu_returned_too": False, "keyword": True,
            "relu_once_absorbable_once_not": False, "written_in_place": False, "changed_in_place_after": False,
            "two_branches": True}


@pytest.mark.parametrize("traced", [True, False], ids=["run", "symbolic"])
@pytest.mark.parametrize("output", [None, "int8"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_wirings(wiring: str, inplace: bool, output: str | None, traced: bool) -> None:
    if wiring == "written_in_place" and inplace and output:
        return                           # autograd itself refuses y after the in-place write of a quantized output
    model, x = Wired(wiring, inplace).eval(), torch.randn(X)
    with torch.no_grad():
        expected = model(x)
    before, _ = zoo.assert_parity(model, zoo.every_layer(output=output), x, torch.randn(1, 3, 4, 7), traced=traced)
    with torch.no_grad():
        error = float((before(x) - expected).abs().max() / expected.abs().max())
    assert error < 0.06, "another computation than the float model's"
    if traced and wiring in FOLDED:
        assert any(m.plan.batch_norm for m in before.modules() if isinstance(m, QuantizedModule)) == FOLDED[wiring]
    if traced and wiring in ABSORBED and output is None and not (wiring == "written_in_place" and not inplace):
        assert isinstance(before.relu, Absorbed) == ABSORBED[wiring]


@pytest.mark.parametrize("wiring", ["conv_read_twice", "norm_twice", "conv_twice", "norm_without_conv"])
def test_coverage_says_that_a_batch_norm_is_not_folded(wiring: str) -> None:
    model = qat.prepare(Wired(wiring), "w8a8", example_inputs=torch.randn(X))
    (row,) = [r for r in qat.coverage(model).rows if r.name == "norm"]
    assert "not folded" in row.reason
    folded = qat.prepare(Wired("functional_relu"), "w8a8", example_inputs=torch.randn(X))
    (row,) = [r for r in qat.coverage(folded).rows if r.name == "norm"]
    assert row.reason == "folded into a in eval"


# ------------------------------------------------------------------------------------------------ weights


def normed(kind: str) -> nn.Module:
    conv = nn.Conv2d(3, 4, 3)
    wrap: Any = {"weight_norm": nn.utils.parametrizations.weight_norm,
                 "spectral_norm": nn.utils.parametrizations.spectral_norm,
                 "orthogonal": nn.utils.parametrizations.orthogonal, "old weight_norm": nn.utils.weight_norm,
                 "old spectral_norm": nn.utils.spectral_norm}[kind]
    return nn.Sequential(wrap(conv), nn.BatchNorm2d(4), nn.ReLU(), wrap(nn.Conv2d(4, 2, 3)))


# the old weight norm is deprecated by torch, and still in people's models
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("preset", ["w8a8", "w8a16", "w4a4"])
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "orthogonal", "old weight_norm", "old spectral_norm"])
def test_reparametrized_weights(kind: str, preset: str, inplace: bool) -> None:
    model, x = normed(kind).eval(), torch.randn(5, 3, 6, 6)
    with torch.no_grad():
        expected = model(x)
    names, count = set(model.state_dict()), sum(p.numel() for p in model.parameters())
    before = qat.prepare(model, preset, example_inputs=x, inplace=inplace)
    assert names <= set(before.state_dict())
    assert qat.coverage(before).total_params == count
    qat.calibrate(before, [x]).train()
    y = before(x)
    (y * torch.randn(y.shape)).sum().backward()
    for name, parameter in before.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name
    model.train()(x)                    # old spectral norm makes a power iteration at each training step: both make it
    before.eval()
    with torch.no_grad():
        expected = model.eval()(x) if not inplace else expected
    after, _ = qat.convert(before, [x])
    assert torch.equal(before(x), after(x))
    if preset != "w4a4" and not inplace:
        assert float((after(x) - expected).abs().max()) < 0.2 * float(expected.abs().max())
    assert not [n for n in after.state_dict() if "parametrizations" in n or n.endswith(("_g", "_v", "_orig"))]
    assert torch.equal(pickle.loads(pickle.dumps(after))(x), after(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("kind", ["weight_norm", "old weight_norm"])
def test_a_computed_weight_takes_a_value_or_says_that_it_cannot(kind: str) -> None:
    layer = qat.prepare(normed(kind), "w8a8", inplace=True)[0]
    before, wanted = layer.weight_matrix().detach().clone(), torch.randn(layer.weight_matrix().shape)
    if kind == "weight_norm":
        layer.write_weight(wanted)
        torch.testing.assert_close(layer.weight_matrix(), wanted)
        return
    with pytest.raises(CalibrationError, match="0: its weight is computed by a hook"):
        layer.write_weight(wanted)
    assert torch.equal(layer.weight_matrix(), before)


class Doubled(nn.Linear):
    """Computes something else than its base."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2.0


class Swapped(nn.Linear):
    """Only adds a method and an attribute."""

    extra = "mine"

    def double(self) -> Tensor:
        return self.weight * 2


def test_subclasses() -> None:
    model = nn.Sequential(Swapped(6, 5), nn.Tanh(), Doubled(5, 4))
    x = torch.randn(7, 6)
    before, after = zoo.assert_parity(model, "w8a8", x)
    for m in (before, after):
        assert isinstance(m[0], Swapped)
        assert isinstance(m[0], QuantizedModule)
        assert m[0].extra == "mine"
        assert m[0].double().shape == (5, 6)
        assert isinstance(m[2], Doubled)
    rows = {r.name: r for r in qat.coverage(before).rows}
    assert (rows["2.weight"].status, rows["2.weight"].params) == ("quantized", 20)
    assert (rows["2"].status, rows["2"].params, rows["2"].reason) == ("kept", 4, "no matrix product reads bias")
    unseen = qat.prepare(model, "w8a8")             # nobody has seen what its forward does
    assert type(unseen[2]) is Doubled
    (row,) = [r for r in qat.coverage(unseen).rows if r.name == "2"]
    assert row.status == "kept"
    assert row.reason.startswith("Doubled overrides the forward of Linear: give prepare example_inputs")


def test_a_folded_batch_norm_refuses_inputs_whose_features_lie_elsewhere() -> None:
    """(N, L, features) of L = features would have the right shape, and the wrong numbers."""
    model, rows = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6)).eval(), torch.randn(8, 5)
    folded = qat.calibrate(qat.prepare(model, "w8a8", rows), [rows]).eval()
    for deployed in (folded, qat.convert(folded, [rows])[0]):
        with pytest.raises(UnsupportedError, match=r"^0: 1 is folded .* \(8, 6, 5\)"):
            deployed(torch.randn(8, 6, 5))
    zoo.assert_parity(model, "w8a8", torch.randn(8, 6, 5))


def test_lazy_modules() -> None:
    model = nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.LazyConv2d(3, 3))
    with pytest.raises(PrepareError, match="0 is lazy"):
        qat.prepare(model, "w8a8")
    model = nn.Sequential(nn.LazyLinear(5), nn.ReLU(), nn.LazyLinear(2))
    model(torch.randn(3, 6))
    zoo.assert_parity(model, "w8a8", torch.randn(3, 6))


def test_torchscript_is_refused() -> None:
    with pytest.deprecated_call(match="torch.jit.script"):
        model = nn.Sequential(nn.Linear(6, 4), torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU())))
    for inputs in (None, torch.randn(3, 6)):
        with pytest.raises(PrepareError, match="1 is compiled by TorchScript"):
            qat.prepare(model, "w8a8", example_inputs=inputs)
    with pytest.raises(PrepareError, match="the model is compiled by TorchScript"):
        qat.prepare(model[1], "w8a8")
    with pytest.raises(PruneError, match="1 is compiled by TorchScript"):
        qat.prune_channels(model, torch.randn(3, 6))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's tracer does it
def test_the_wrapper_of_a_compiled_model_is_refused_and_compiled_parts_are_not(tmp_path: Path) -> None:
    def model() -> nn.Sequential:
        compiled = torch.compile(nn.Sequential(nn.Linear(6, 4), nn.ReLU()), backend="eager")
        return nn.Sequential(compiled, nn.Linear(4, 2))

    x = torch.randn(5, 6)
    for use in (lambda wrapped: qat.prepare(wrapped, "w8a8", x), lambda wrapped: qat.calibrate(wrapped, [x]),
                lambda wrapped: qat.convert(wrapped, [x]), qat.coverage):
        with pytest.raises(PrepareError, match=r"its \._orig_mod"):
            use(torch.compile(model(), backend="eager"))
    prepared = qat.calibrate(qat.prepare(model(), "w8a8", x), [x])
    prepared.train()(x).square().mean().backward()
    assert all(p.grad is not None for p in prepared.parameters())
    deployed, certificate = qat.convert(prepared, [x])
    assert certificate.equal
    qat.save(deployed, tmp_path / "deployed")
    assert torch.equal(qat.load(tmp_path / "deployed", model())(x), prepared.eval()(x))


def test_a_class_attribute_that_hides_a_quantizer() -> None:
    class Hides(nn.Linear):
        weight_quantizer = None

    with pytest.raises(PrepareError, match="weight_quantizer hides"):
        qat.prepare(nn.Sequential(Hides(3, 3)), "w8a8")


def test_a_quantizer_that_does_not_quantize_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from qat.quantizers.quantizer import DynamicQuantizer
    monkeypatch.setattr(DynamicQuantizer, "codes", lambda self, x: x)
    with pytest.raises(PrepareError, match="0: its weight quantizer"):
        qat.prepare(nn.Sequential(nn.Linear(3, 3)), "w8a8")


# ------------------------------------------------------------------------------------------------ torch's own attention


class Handmade(nn.MultiheadAttention):
    """Attention with a forward of its own around torch's, which reads the raw weight of ``out_proj``."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.attention = Handmade(8, 2, batch_first=True)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.block(x))


@pytest.mark.parametrize("preset", ["w8a8", "w4a4", "w4a16", "fp16"])
def test_modules_that_bypass_their_children_are_kept_or_quantized_whole(preset: str) -> None:
    model, x = Attends().eval(), torch.randn(2, 5, 8)
    before = zoo.prepared(model, preset, [x])
    after, _ = qat.convert(before, [x, torch.randn(1, 3, 8)])
    with torch.no_grad():
        assert torch.equal(before(x), after(x))
        expected = model(x)
        error = float((after(x) - expected).abs().max() / expected.abs().max())
    assert 0 < error < (0.05 if preset in ("w8a8", "fp16") else 0.6)
    rows = {r.name: r for r in qat.coverage(before).rows}
    quantized = {"stem", "head", "block.linear1", "block.linear2", "block.self_attn"}
    raw = {"attention.in_proj_weight", "attention.out_proj.weight"}
    for name in quantized | (raw if preset != "fp16" else {"attention", "attention.out_proj"}):
        assert rows[name].status == ("quantized" if preset != "fp16" else "kept"), name
    if preset == "fp16":
        assert "raw weights" in rows["attention.out_proj"].reason
    assert rows["attention: multi_head_attention_forward"].status == "kept"     # its products of activations
    assert sum(r.params for r in rows.values()) == sum(p.numel() for p in model.parameters())
    found = {n for n, m in after.named_modules() if isinstance(m, QuantizedModule)}
    found = {n for n in found if not n.startswith(("block.self_attn.", "attention"))}
    assert found == (quantized if preset != "fp16" else set())


# ------------------------------------------------------------------------------------------------ hooks


@pytest.mark.parametrize("traced", [True, False], ids=["run", "symbolic"])
@pytest.mark.parametrize("output", [None, "int8"])
def test_hooks_see_what_they_saw_in_the_float_model(output: str | None, traced: bool) -> None:
    """Nothing is folded, absorbed or chained where somebody listens in."""
    model = zoo.batch_norms_of_any_sign(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4),
                                                      nn.Linear(4, 3))).eval()
    seen: dict[str, Tensor] = {}
    for name, module in model.named_children():
        def keep(module: nn.Module, args: Any, result: Any, name: str = name) -> None:
            seen[f"{name} in"], seen[f"{name} out"] = args[0], result
        module.register_forward_hook(keep)
    x = torch.randn(64, 6)
    with torch.no_grad():
        model(x)
        expected = dict(seen)
        before = zoo.prepared(model, zoo.every_layer(output=output), [x], traced)
        for m in (before, qat.convert(before, [x])[0]):
            seen.clear()
            m(x)
            for name, value in expected.items():
                assert isinstance(seen[name], Tensor), f"{name} got codes"
                assert float((seen[name] - value).abs().max()) < 0.1 * float(value.abs().max()), name


@pytest.mark.parametrize("traced", [True, False], ids=["run", "symbolic"])
def test_hooks_that_change_tensors_still_change_them(traced: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 3)).eval()
    model[2].register_forward_pre_hook(lambda m, args: (args[0] - 1.0,))
    model[2].register_forward_hook(lambda m, args, y: y * 3.0)
    x = torch.randn(32, 6)
    before, _ = zoo.assert_parity(model, zoo.every_layer(output="int8"), x, traced=traced)
    with torch.no_grad():
        expected = model(x)
        assert float((before(x) - expected).abs().max()) < 0.06 * float(expected.abs().max())
