"""Parameters that functions read: every way to read one, every scheme; prepared and deployed equal bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

import qat
from qat.modules.base import QuantizedModule
from qat.modules.parameters import ParameterPart, QuantizedParameters, watching
from qat.modules.views import WeightView
from qat.tracing import trace_by_running

E, IN, OUT = 3, 8, 12
X, XS, IMAGE = (5, IN), (E, 4, IN), (2, 4, 9)


class Reads(nn.Module):
    """A parameter of some shape, and a forward that reads it in some way."""

    def __init__(self, shape: tuple[int, ...], read: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(OUT))
        self._read = [read]

    def forward(self, x: Tensor) -> Tensor:
        return self._read[0](self, x)


def grouped(m: Any, x: Tensor) -> Tensor:
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    return torch._grouped_mm(x, m.table.transpose(-2, -1), offs=ends)


READS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[[Any, Tensor], Tensor]]] = {
    "linear": ((OUT, IN), X, lambda m, x: F.linear(x, m.table)),
    "linear with bias": ((OUT, IN), X, lambda m, x: F.linear(x, m.table, bias=m.bias)),
    "addmm": ((IN, OUT), X, lambda m, x: torch.addmm(m.bias, x, m.table)),
    "@": ((IN, OUT), X, lambda m, x: x @ m.table),
    "@ T": ((OUT, IN), X, lambda m, x: x @ m.table.T + m.bias),
    "a vector": ((IN, OUT), (IN,), lambda m, x: x @ m.table),
    "from the left": ((OUT, IN), (IN, 5), lambda m, x: m.table @ x),
    "from the left, a view of it": ((OUT, IN), (2, IN, IN), lambda m, x: (m.table @ x).view(2, -1)),
    "addmm from the left": ((OUT, IN), (IN, OUT), lambda m, x: torch.addmm(m.bias, m.table, x)),
    "addmm of a column": ((OUT, IN), (IN, 5), lambda m, x: torch.addmm(m.bias[:, None], m.table, x)),
    "addmm of a number": ((IN, OUT), X, lambda m, x: torch.addmm(m.bias[:1], x, m.table)),
    "mm": ((OUT, IN), X, lambda m, x: x.mm(m.table.t())),
    "permuted": ((OUT, IN), X, lambda m, x: torch.matmul(x, m.table.permute(1, 0))),
    "many rows": ((OUT, IN), (2, 3, IN), lambda m, x: x @ m.table.transpose(0, 1)),
    "expert by expert": ((E, OUT, IN), X, lambda m, x: sum(F.linear(x, m.table[i]) for i in range(E))),  # type: ignore
    "experts the other way": ((E, IN, OUT), X, lambda m, x: x @ m.table[0] + x @ m.table[torch.tensor(2)]),
    "unbind": ((E, OUT, IN), X, lambda m, x: sum(x @ w.mT for w in m.table.unbind())),  # type: ignore[arg-type]
    "select": ((E, OUT, IN), X, lambda m, x: F.linear(x, m.table.select(0, -1))),
    "bmm": ((E, IN, OUT), XS, lambda m, x: torch.bmm(x, m.table)),
    "bmm T": ((E, OUT, IN), XS, lambda m, x: x.bmm(m.table.transpose(1, 2))),
    "baddbmm": ((E, IN, OUT), XS, lambda m, x: torch.baddbmm(m.bias, x, m.table)),
    "gathered": ((E, OUT, IN), X, lambda m, x: torch.bmm(
        m.table[torch.tensor([2, 0, 0, 1, 2])], x.unsqueeze(-1)).squeeze(-1)),
    "grouped": ((E, OUT, IN), X, grouped),
    "stacked rows": ((3 * OUT, IN), X, lambda m, x: torch.cat([F.linear(x, w) for w in m.table.chunk(3)][1:], -1)),
    "a slice of rows": ((3 * OUT, IN), X, lambda m, x: F.linear(x, m.table[OUT : 2 * OUT], m.bias)),
    "a slice of columns": ((OUT, 2 * IN), X, lambda m, x: F.linear(x, m.table[:, :IN])),
    "narrow": ((OUT, IN), X, lambda m, x: x @ m.table.narrow(0, 1, 4).T),
    "a view": ((E * OUT, IN), X, lambda m, x: F.linear(x, m.table.view(E, OUT, IN)[1])),
    "a view the other way": ((E * IN, OUT), X, lambda m, x: x @ m.table.reshape(E, IN, OUT)[2]),
    "conv1d": ((OUT, 2, 3), IMAGE, lambda m, x: F.conv1d(x, m.table, m.bias, 2, 1, groups=2)),
    "conv1d same": ((OUT, 4, 4), IMAGE, lambda m, x: F.conv1d(x, m.table, padding="same", dilation=2)),
    "depthwise, squeezed": ((4, 1, 3), IMAGE, lambda m, x: F.conv1d(x, m.table.squeeze(1).unsqueeze(1), groups=4)),
    "conv2d": ((OUT, 4, 3, 3), (2, 4, 5, 5), lambda m, x: F.conv2d(x, m.table, m.bias, padding=(1, 0))),
    "conv without batch": ((OUT, 4, 3), (4, 9), lambda m, x: F.conv1d(x, m.table)),
}
FLOATING: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[[Any, Tensor], Tensor]]] = {
    "einsum": ((OUT, 2, 4), (5, OUT), lambda m, x: torch.einsum("bi,ind->bnd", x, m.table)),
    "conv_transpose1d": ((4, OUT, 3), IMAGE, lambda m, x: F.conv_transpose1d(x, m.table)),
    "mv": ((OUT, IN), (IN,), lambda m, x: torch.mv(m.table, x)),
}
SCHEMES: dict[str, dict[str, Any]] = {
    "static": zoo.every_layer(),
    "dynamic": zoo.every_layer("int8", {"format": "int8", "dynamic": True}),
    "weight only": zoo.every_layer({"format": "int4", "granularity": "per_group", "group_size": 4}, None),
    "affine": zoo.every_layer({"format": "uint4", "symmetric": False}, {"format": "uint8", "symmetric": False}),
    "learned": zoo.every_layer({"format": "int4", "learned": "lsq"}, {"format": "int8", "learned": "lsq"}),
    "per tensor": zoo.every_layer({"format": "int8", "granularity": "per_tensor"}),
    "ternary": zoo.every_layer("ternary", "int8"),
    "binary": zoo.every_layer("binary", "int8"),
    "midrise": zoo.every_layer("int2_midrise", "int4"),
}


def build(name: str) -> tuple[Reads, Tensor]:
    shape, given, read = {**READS, **FLOATING}[name]
    torch.manual_seed(0)
    return Reads(shape, read), torch.randn(given)


def fit(name: str, scheme: str) -> bool:
    """Whether groups of four divide the inputs, where a scheme has groups."""
    table = build(name)[0].table
    return scheme != "weight only" or table.dim() == 2 or "group" in name or table.shape[-1] != 3


@pytest.mark.parametrize(("name", "scheme"), [(n, s) for n in (*READS, *FLOATING) for s in SCHEMES if fit(n, s)])
def test_parity_and_gradients(name: str, scheme: str, tmp_path: Path) -> None:
    model, x = build(name)
    before, after = zoo.assert_parity(model, SCHEMES[scheme], x)
    assert isinstance(before, QuantizedParameters)
    assert isinstance(before, Reads)
    assert before.table.shape == model.table.shape
    (row,) = [r for r in qat.coverage(before).rows if r.name == "table"]
    assert (row.status, row.params) == ("quantized", model.table.numel())
    assert (row.input == "float") == (name in FLOATING or scheme == "weight only")
    x = x.clone().requires_grad_()
    before(x).square().sum().backward()
    table = before._parameters["table"]
    assert table is not None
    assert table.grad is not None
    assert bool(table.grad.any())
    assert x.grad is not None
    assert bool(x.grad.any())
    assert "table" not in after._parameters
    again = copy.deepcopy(after)
    assert torch.equal(again(x), after(x))
    qat.save(after, tmp_path / "out")
    assert torch.equal(qat.load(tmp_path / "out", build(name)[0])(x), after(x))


@pytest.mark.parametrize("name", READS)
def test_near_the_float_model(name: str) -> None:
    model, x = build(name)
    after = zoo.assert_parity(model, "w8a8", x)[1]
    with torch.no_grad():
        expected, actual = model(x), after(x)
    assert expected.shape == actual.shape
    assert float((expected - actual).abs().max()) < 0.05 * float(expected.abs().max())


@pytest.mark.parametrize("algorithm", ["smoothquant", "awq", "gptq", "adaround", "reconstruction", "bias_correction"])
@pytest.mark.parametrize("name", ["linear", "@", "from the left", "expert by expert", "bmm", "conv1d", "conv2d"])
@pytest.mark.filterwarnings("ignore:gptq saw fewer rows")
def test_calibration_takes_them_like_layers(name: str, algorithm: str) -> None:
    """Batches wait for each other inside of forwards, and codes change meanwhile."""
    model, x = build(name)
    batches = [x, torch.randn_like(x), torch.randn_like(x)]
    prepared = qat.prepare(model, {**SCHEMES["static"], "calibration": [algorithm]}, x)
    qat.calibrate(prepared, batches)
    deployed, certificate = qat.convert(prepared, batches)
    assert certificate.equal
    with torch.no_grad():
        error = float((deployed(x) - model(x)).norm() / model(x).norm())
    assert error < 0.03
    (row,) = [r for r in qat.coverage(prepared).rows if r.name == "table"]
    assert row.reason


def test_threads_do_not_share_a_forward() -> None:
    """A forward that has begun in one thread leaves nothing behind in another."""
    model, x = build("linear")
    prepared: Any = zoo.prepared(model, SCHEMES["static"], [x])
    (part,) = prepared.parts.values()
    with torch.no_grad(), part.quantized_once():
        before = part.quantized_weight()
        assert part.quantized_weight() is before
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(part.quantized_weight).result() is not before
    assert part.quantized_weight() is not before


@pytest.mark.parametrize("scheme", ["w4a16", {"rules": [{"input": {"format": "int8"}}]}], ids=["weights", "inputs"])
@pytest.mark.parametrize("read", [
    lambda m, x: F.linear(x, m.table), lambda m, x: x @ m.table.T, lambda m, x: m.table @ x.mT,
    lambda m, x: torch.relu(x @ m.table.T) @ m.table], ids=["linear", "@", "left", "both ways"])
@pytest.mark.parametrize("shape", [(1, 5), (2, 1), (2, 5), (3, 20)])
@pytest.mark.filterwarnings("ignore:group_size")
def test_bits_do_not_depend_on_gradients(shape: tuple[int, int], read: Any, scheme: Any) -> None:
    """torch multiplies batches in one way or another, depending on whether the weight requires a gradient."""
    torch.manual_seed(0)
    model = Reads((OUT, IN), read)
    layouts = [torch.randn(*shape, IN), torch.randn(*shape[::-1], IN).transpose(0, 1),
               torch.randn(shape[0], IN, shape[1]).transpose(1, 2)]
    prepared = zoo.prepared(model, scheme, layouts)
    deployed, _ = qat.convert(prepared, layouts)
    for x in layouts:
        assert prepared(x).requires_grad
        assert torch.equal(prepared(x), deployed(x))


@pytest.mark.parametrize("preset", ["w8a8", "w1a1"])
def test_the_other_way_neither_ranges_nor_thresholds_are_touched(preset: str) -> None:
    """A weight that is read transposed too is dequantized there: what it meets is no input of its products."""
    torch.manual_seed(0)
    model = Reads((OUT, IN), lambda m, x: 100 * (x @ m.table.T) @ m.table + x @ m.table.T @ m.table)
    x = torch.randn(X)
    prepared, _ = zoo.assert_parity(model, {"preset": preset, "edges": "same"}, x)
    (part,) = prepared.parts.values()
    assert part.input_quantizer.observer.high.max() <= x.abs().max()


@pytest.mark.parametrize("scheme", ["static", "dynamic", "learned", "affine"])
def test_the_same_codes_outputs_and_gradients_as_a_layer(scheme: str) -> None:
    """A parameter under F.linear is a Linear in all but name."""
    torch.manual_seed(0)
    layer, x = nn.Linear(IN, OUT), torch.randn(7, IN)
    read = Reads((OUT, IN), lambda m, x: F.linear(x, m.table, m.bias))
    with torch.no_grad():
        read.table.copy_(layer.weight)
        read.bias.copy_(layer.bias)
    one, other = (zoo.prepared(m, SCHEMES[scheme], [x]) for m in (layer, read))
    assert torch.equal(one(x), other(x))
    for model in (one, other):
        model(x).square().sum().backward()
    assert torch.equal(one.weight.grad, other._parameters["table"].grad)            # type: ignore[union-attr]
    assert torch.equal(one.bias.grad, other.bias.grad)                              # type: ignore[union-attr]


def test_a_forward_quantizes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build("expert by expert")
    before = zoo.prepared(model, "w8a8", [x])
    part: Any = before.get_submodule("table_product")
    seen: list[torch.Size] = []
    quantize = part.weight_quantizer.quantize
    monkeypatch.setattr(part.weight_quantizer, "quantize", lambda w: seen.append(w.shape) or quantize(w))
    before(x)
    assert seen == [(E * OUT, IN)]
    before(x)
    assert len(seen) == 2


def test_rules_name_parameters() -> None:
    model, x = nn.ModuleDict({"a": build("linear")[0], "b": build("linear")[0]}), torch.randn(5, IN)
    model.forward = lambda x: model["a"](x) + model["b"](x)     # type: ignore[method-assign, assignment]
    recipe = {"rules": [{"match": {"name": "a.table"}, "keep": "float32"}, *zoo.every_layer("int4")["rules"]]}
    rows = {r.name: r for r in qat.coverage(qat.prepare(model, recipe, x, inplace=True)).rows}
    assert rows["b.table"].weight == "int4 per_channel"
    assert (rows["a"].status, rows["a"].params) == ("kept", OUT * IN + OUT)


# ------------------------------------------------------------------------------------------------ weights of others


class RawHead(nn.Module):
    """The head is the table of the embedding, by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(11, IN), nn.Linear(IN, IN)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.body(self.table(tokens))), self.table.weight)


class Scaled(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens + 1) * 3.0


class Positions(nn.Module):
    """Two embeddings with forwards of their own, one tied to a head that is a layer, and a table that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = Scaled(12, IN), nn.Linear(IN, 12, bias=False)
        self.head.weight = self.table.weight
        self.places = nn.Parameter(torch.randn(1, 4, IN))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens) + self.places)


@pytest.mark.parametrize("preset", ["w8a8", "w4a16", "w4a4", "w8a8_dynamic"])
def test_a_head_that_is_a_table(preset: str) -> None:
    tokens = torch.randint(0, 11, (3, 4))
    before, after = zoo.assert_parity(RawHead(), preset, tokens)
    rows = {r.name: r for r in qat.coverage(before).rows}
    assert rows["table.weight"].status == "quantized"
    assert not [r for r in rows.values() if r.kind == "function"]
    assert not dict(after.named_parameters()).keys() & {"table.weight"}
    before(tokens).sum().backward()


@pytest.mark.parametrize("preset", ["w8a8", "w4a16", "w4a4"])
def test_embeddings_with_a_forward_of_their_own(preset: str) -> None:
    tokens = torch.randint(0, 11, (3, 4))
    before, after = zoo.assert_parity(Positions(), preset, tokens)
    rows = {r.name: r for r in qat.coverage(before).rows}
    assert rows["table.weight"].status == rows["head"].status == "quantized"
    assert "shared with" in rows["head"].reason + rows["table.weight"].reason
    assert "read by add" in rows[""].reason
    codes = {id(b) for n, b in after.named_buffers(remove_duplicate=False) if n.endswith("weight_codes")}
    assert len(codes) == 1


class Bypassed(nn.Module):
    """A convolution that is never called: its weight goes to a function, step by step or at once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, groups=4, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] == 3:
            return (x * self.conv.weight.squeeze(1)).sum(-1, keepdim=True)
        return F.conv1d(x, self.conv.weight, self.conv.bias, padding=2, groups=4)


def test_a_convolution_that_is_bypassed() -> None:
    x, step = torch.randn(2, 4, 9), torch.randn(2, 4, 3)
    before, after = zoo.assert_parity(Bypassed(), "w8a8", x, step)
    rows = {r.name: r for r in qat.coverage(before).rows}
    assert rows["conv.weight"].status == "quantized"
    assert rows["conv.weight"].input == "int8 per_tensor"
    assert "weight" not in after.conv._parameters                                   # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------ views


def test_a_view_is_a_stand_in() -> None:
    model, x = build("linear")
    after = zoo.assert_parity(model, "w8a8", x)[1]
    view: Any = after.table
    assert isinstance(view, WeightView)
    assert (view.shape, view.dtype, view.device.type, view.dim()) == ((OUT, IN), torch.float32, "cpu", 2)
    part: Any = after.get_submodule("table_product")
    values = part.quantized_weight().dequantize()
    for read in (lambda w: w + 0, lambda w: w.abs(), lambda w: w[2], lambda w: w.T[1], lambda w: w.flatten(),
                 lambda w: torch.cat([w, w]), lambda w: w[:, None], lambda w: w.to(torch.float64) * 1,
                 lambda w: w[w > 0], lambda w: w[[1, 2]] * 1):
        assert torch.equal(read(view), read(values))
    with torch._C.DisableTorchFunctionSubclass():
        assert bool(view.isnan().all()), "who passes by __torch_function__ must notice"


def test_watching_leaves_the_model_as_it_was() -> None:
    model, x = build("expert by expert")
    parameter = model.table
    with watching(model) as readings:
        trace = trace_by_running(model, x)
    assert model.table is parameter
    assert readings["", "table"].layouts == ["rows"] * E
    assert [c.parameters for c in trace.functions if c.function == "linear"] == [["table"]] * E
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_deployed_parts_keep_what_kernels_derive() -> None:
    model, x = build("expert by expert")
    after = zoo.assert_parity(model, "w8a8", x)[1]
    part: Any = next(m for m in after.modules() if isinstance(m, ParameterPart))
    assert isinstance(part, QuantizedModule)
    assert len(part._kernel) == E
    first = list(part._kernel.values())
    after(x)
    assert all(a is b for a, b in zip(first, part._kernel.values(), strict=True))
