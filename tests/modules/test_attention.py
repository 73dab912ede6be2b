"""Attention whole: projections, both products, every option of torch's module; transformer layers around it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

import qat
from qat.errors import RecipeError, UnsupportedError
from qat.kernels import activations, table
from qat.modules.attention import QuantizedMultiheadAttention, probability_spec
from qat.numerics.formats import TensorSpec

SCHEMES = ["w8a8", "w8a8_dynamic", "w4a8", "w2a8", "w1a8"]
STATIC: dict[str, Any] = {"rules": [{"weight": "int8", "input": "int8"}]}
DYNAMIC: dict[str, Any] = {"rules": [{"weight": "int8", "input": {"format": "int8", "dynamic": True}}]}


def attention(**options: Any) -> nn.MultiheadAttention:
    model = nn.MultiheadAttention(16, 4, **{"batch_first": True, **options}).eval()
    for bias in (model.in_proj_bias, model.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias, std=0.1)
    return model


def self_inputs(batch: int = 3, tokens: int = 7) -> dict[str, Any]:
    x = torch.randn(batch, tokens, 16)
    return {"query": x, "key": x, "value": x}


def prepared(model: nn.Module, recipe: Any, batch: dict[str, Any]) -> Any:
    return qat.calibrate(qat.prepare(model, recipe, example_inputs=batch), [batch]).eval()


def near(got: Tensor, expected: Tensor, bound: float = 0.03) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    got, expected = got.detach(), expected.detach()
    assert float((got - expected).abs().max()) <= bound * float(expected.abs().max())


def assert_same(model: nn.Module, recipe: Any, batch: dict[str, Any], bound: float = 0.03) -> Any:
    """Prepared equals deployed bit for bit, training path included; both are near the float module."""
    before = prepared(model, recipe, batch)
    after, certificate = qat.convert(before, [batch])
    assert certificate.equal
    with torch.no_grad():
        expected, got, shipped = model(**batch), before(**batch), after(**batch)
    trained = before(**batch)
    for float_one, one, other, third in zip(expected, got, shipped, trained, strict=True):
        assert (float_one is None) == (one is None) == (other is None)
        if float_one is not None:
            assert torch.equal(one, other)
            assert torch.equal(one, third)
            near(one, float_one, bound)
    return before


@pytest.mark.parametrize("preset", SCHEMES)
@pytest.mark.parametrize("edges", ["int8", "same"])
def test_parity(preset: str, edges: str) -> None:
    recipe = qat.Recipe.preset(preset, edges=edges)
    model = attention()
    before = assert_same(model, recipe, self_inputs(), 0.03 if edges == "int8" or "8a8" in preset else 2.0)
    after, _ = qat.convert(before, [self_inputs()])
    for batch in (self_inputs(1, 1), self_inputs(0, 4), self_inputs(2, 9)):
        assert torch.equal(before(**batch)[0], after(**batch)[0])
    for backend in ("reference", "float"):
        batch = self_inputs()
        expected = before(**batch)
        with table.use(backend):
            assert all(torch.equal(a, b) for a, b in zip(after(**batch), expected))


def causal(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).triu(1)


OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"need_weights": False}),
    ({}, {"average_attn_weights": False}),
    ({}, {"attn_mask": causal(7)}),
    ({}, {"attn_mask": causal(7), "is_causal": True, "need_weights": False}),
    ({}, {"attn_mask": nn.Transformer.generate_square_subsequent_mask(7)}),
    ({}, {"attn_mask": torch.randn(12, 7, 7)}),
    ({}, {"attn_mask": torch.rand(12, 7, 7) > 0.9}),
    ({}, {"key_padding_mask": torch.tensor([[False] * 7, [False] * 4 + [True] * 3, [False] * 6 + [True]])}),
    ({}, {"key_padding_mask": torch.randn(3, 7), "attn_mask": torch.randn(7, 7)}),
    ({}, {"key_padding_mask": torch.tensor([[False] * 7] * 3), "attn_mask": causal(7), "is_causal": True}),
    ({"bias": False}, {}),
    ({"add_bias_kv": True, "add_zero_attn": True},
     {"attn_mask": causal(7), "key_padding_mask": torch.zeros(3, 7, dtype=torch.bool)}),
    ({"add_zero_attn": True}, {"average_attn_weights": False}),
    ({"dropout": 0.5}, {}),
]


@pytest.mark.parametrize("recipe", [STATIC, DYNAMIC], ids=["static", "dynamic"])
@pytest.mark.parametrize(("build", "call"), OPTIONS, ids=lambda o: "+".join(o) or "plain")
def test_options(build: dict[str, Any], call: dict[str, Any], recipe: dict[str, Any]) -> None:
    assert_same(attention(**build), recipe, {**self_inputs(), **call})


@pytest.mark.parametrize("recipe", [STATIC, DYNAMIC], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", ["cross", "kdim", "tokens first", "unbatched", "unbatched cross"])
def test_shapes(form: str, recipe: dict[str, Any]) -> None:
    def inputs(*sizes: tuple[int, ...]) -> dict[str, Any]:
        return dict(zip(("query", "key", "value"), (torch.randn(s) for s in sizes)))

    options: dict[str, Any] = {}
    batch = inputs((3, 5, 16), (3, 8, 16), (3, 8, 16))
    if form == "kdim":
        options, batch = {"kdim": 12, "vdim": 10}, inputs((3, 5, 16), (3, 8, 12), (3, 8, 10))
    elif form == "tokens first":
        options, batch = {"batch_first": False}, inputs((5, 3, 16), (8, 3, 16), (8, 3, 16))
        batch["key_padding_mask"] = torch.rand(3, 8) > 0.7
    elif form == "unbatched":
        x = torch.randn(6, 16)
        batch = {"query": x, "key": x, "value": x, "key_padding_mask": torch.arange(6) > 3}
    elif form == "unbatched cross":
        batch = {**inputs((5, 16), (8, 16), (8, 16)), "average_attn_weights": False}
    before = assert_same(attention(**options), recipe, batch)
    assert sum(r.params for r in qat.coverage(before).rows) == sum(
        p.numel() for n, p in before.named_parameters() if "quantizer" not in n)


@pytest.mark.parametrize(("queries", "keys", "batch"), [(1, 2, 1), (7, 5, 1), (1, 5, 3), (7, 1, 2)])
def test_bits_of_weight_only_projections_do_not_depend_on_gradients(queries: int, keys: int, batch: int) -> None:
    """Without ``batch_first`` the rows of one sample, or of one token, have strides that torch treats differently."""
    model = attention(bias=False, batch_first=False)
    query, key = torch.randn(queries, batch, 16), torch.randn(keys, batch, 16)
    batches = [{"query": query, "key": key, "value": key, "need_weights": False}]
    before = prepared(model, "w8a16", batches[0])
    after, _ = qat.convert(before, batches)
    got = before.eval()(**batches[0])[0]
    assert got.requires_grad
    assert torch.equal(got, after(**batches[0])[0])


def test_every_product_is_an_integer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four projections and two products of activations run on the kernels, and none in floating point."""
    batch = self_inputs()
    deployed, _ = qat.convert(prepared(attention(), STATIC, batch), [batch])
    linear, matmul = [], []
    monkeypatch.setattr(table, "linear", lambda *a, f=table.linear: linear.append(a[0].values.dtype) or f(*a))
    monkeypatch.setattr(table, "matmul", lambda *a, f=table.matmul: matmul.append(a[0].values.dtype) or f(*a))
    for name in ("linear", "scaled_dot_product_attention", "multi_head_attention_forward"):
        monkeypatch.setattr(F, name, lambda *a, **k: pytest.fail("a floating point product"))
    deployed(**batch)
    assert linear == [torch.int8] * 4
    assert matmul == [torch.int8, torch.uint8]
    assert not any("weight" in n for n, _ in deployed.named_parameters())


def test_the_forward_is_the_integer_formula() -> None:
    """Written out by hand, with an int64 product each time."""
    batch = self_inputs()
    layer = prepared(attention(), STATIC, batch)
    x = batch["query"]
    q, k = (part(x).unflatten(-1, (4, 4)).transpose(1, 2) for part in (layer.q, layer.k))
    left, right = layer.scores.input_quantizer, layer.scores.right_quantizer
    acc = (left.codes(q).long() - int(left.zero_point)) @ (right.codes(k).long() - int(right.zero_point)).mT
    scores = acc.float() * (left.scale * (right.scale * 0.5))
    codes = ((scores - scores.amax(-1, keepdim=True)).exp() * 255).round().long()
    values = layer.context.right_quantizer
    assert values.scale.shape == (16,)
    levels = (layer.v(x) / values.scale).round().add(values.zero_point).clamp(-128, 127).long() - values.zero_point
    acc = codes @ levels.unflatten(-1, (4, 4)).transpose(1, 2)
    context = acc.float() * values.scale.reshape(4, 1, 4) * (1.0 / codes.sum(-1, keepdim=True).float())
    y = layer.out(context.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(**batch)[0], y, rtol=1e-6, atol=1e-6)
    assert torch.equal(layer(**batch, average_attn_weights=False)[1].mul(codes.sum(-1, keepdim=True)).round().long(),
                       codes)


# ------------------------------------------------------------------------------------------------ probabilities


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_probabilities_add_up_to_one_at_every_width(bits: int) -> None:
    scores = torch.randn(2, 3, 5, 700) * 0.01          # 700 keys share the attention: each has less than 1/510
    scores[0, 0, 0, 3:] = -torch.inf
    p = activations.softmax(scores, TensorSpec(f"uint{bits}", "per_token", symmetric=True, dynamic=True))
    assert p.codes.dtype == torch.uint8
    assert p.zero_point is None
    assert int(p.codes.amax(-1).min()) == 2**bits - 1
    torch.testing.assert_close(p.dequantize().sum(-1), torch.ones(2, 3, 5))
    assert not p.codes[0, 0, 0, 3:].any()
    assert probability_spec(TensorSpec("int4", "per_tensor")).format == "uint4"


def test_a_query_that_may_attend_to_nothing_gets_zeros() -> None:
    batch = {**self_inputs(), "key_padding_mask": torch.tensor([[True] * 7, [False] * 7, [False] * 7])}
    layer = prepared(attention(), STATIC, {**batch, "need_weights": False})
    y, weights = layer(**batch)
    assert bool(torch.isfinite(y).all())
    assert not weights[0].any()
    assert bool(weights[1:].any())


@pytest.mark.parametrize("bits", [8, 4])
def test_the_gradient_of_softmax(bits: int) -> None:
    scores = torch.randn(2, 5, 9, requires_grad=True)
    g = torch.randn(2, 5, 9)
    p = activations.softmax(scores, TensorSpec(f"uint{bits}", "per_token", symmetric=True, dynamic=True))
    got, = torch.autograd.grad(p.dequantize(), scores, g)
    expected, = torch.autograd.grad(scores.softmax(-1), scores, g)
    torch.testing.assert_close(got, expected, rtol=0, atol=(0.01 if bits == 8 else 0.2) * float(expected.abs().max()))


def test_dropout_drops_codes_and_keeps_the_mean() -> None:
    scores = torch.randn(4, 50, 60, requires_grad=True)
    p = activations.softmax(scores, TensorSpec("uint8", "per_token", symmetric=True, dynamic=True))
    dropped = activations.dropout(p, 0.25)
    values, kept = dropped.dequantize(), dropped.codes != 0
    assert 0.7 < float(kept.float().mean() / (p.codes != 0).float().mean()) < 0.8
    torch.testing.assert_close(values[kept], p.dequantize()[kept] / 0.75)
    assert abs(float(values.detach().sum(-1).mean()) - 1) < 0.05
    values.sum().backward()
    assert bool(scores.grad.any())
    assert not activations.dropout(p, 1.0).codes.any()
    layer = prepared(attention(dropout=0.5), STATIC, self_inputs()).train()
    batch = self_inputs()
    assert not torch.equal(layer(**batch)[0], layer(**batch)[0])
    assert torch.equal(layer.eval()(**batch)[0], layer(**batch)[0])


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("recipe", [STATIC, DYNAMIC], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", ["self", "cross", "kdim"])
def test_gradients_are_those_of_float(form: str, recipe: dict[str, Any]) -> None:
    batch = self_inputs(4, 9)
    if form == "cross":
        batch = {n: torch.randn(4, 6 + (n != "query"), 16) for n in ("query", "key", "value")}
    model = attention(add_bias_kv=True, **({"kdim": 12, "vdim": 10} if form == "kdim" else {}))
    if form == "kdim":
        batch = {"query": torch.randn(4, 6, 16), "key": torch.randn(4, 7, 12), "value": torch.randn(4, 7, 10)}
    # wider than the data: at the ends of a range that just fits it, every other value is rounded off and masked
    layer = prepared(model, recipe, {n: 1.3 * t for n, t in batch.items()} if form != "self" else self_inputs(64, 32))
    g = torch.randn_like(batch["query"])
    for m in (model, layer):
        (m(**batch)[0] * g).sum().backward()
    for name, parameter in model.named_parameters():
        mine = layer.get_parameter(name).grad
        assert mine is not None
        assert bool(mine.any()), name
        error = float((mine - parameter.grad).norm() / parameter.grad.norm())
        assert error < 0.06, (name, error)


@pytest.mark.parametrize("preset", ["w4a4", "w2a2", "w1a1"])
def test_learned_and_narrow_activations_train(preset: str) -> None:
    batch = self_inputs()
    layer = prepared(attention(), qat.Recipe.preset(preset, edges="same"), batch).train()
    optimizer = torch.optim.Adam(layer.parameters(), 0.01)
    losses = []
    for _ in range(8):
        loss = (layer(**batch)[0] - batch["query"]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in layer.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    deployed, _ = qat.convert(layer.eval(), [batch])
    assert torch.equal(deployed(**batch)[0], layer(**batch)[0])


def test_in_self_attention_one_set_of_codes_serves_three_projections(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = self_inputs()
    layer = prepared(attention(), STATIC, batch)
    counted: list[str] = []
    for name in "qkv":
        quantizer = getattr(layer, name).input_quantizer
        monkeypatch.setattr(quantizer, "quantize", lambda x, n=name, f=quantizer.quantize: counted.append(n) or f(x))
    expected = layer(**batch)[0]
    assert counted == ["q"]
    apart = layer(batch["query"], batch["key"].clone(), batch["value"].clone())[0]
    assert counted == ["q", "q", "k", "v"]
    assert torch.equal(apart, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_and_autocast(dtype: torch.dtype) -> None:
    model = attention(add_bias_kv=True).to(dtype)
    batch = {n: t.to(dtype) for n, t in self_inputs().items()}
    batch = {**batch, "key": batch["query"], "value": batch["query"]}
    before = assert_same(model, STATIC, batch, 0.06)
    before(**batch)[0].float().square().sum().backward()
    assert before.in_proj_weight.grad.dtype == dtype
    plain = prepared(attention(), STATIC, self_inputs())
    after, _ = qat.convert(plain, [self_inputs()])
    x = self_inputs()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert plain(**x)[0].dtype == torch.bfloat16
        assert torch.equal(plain(**x)[0], after(**x)[0])


# ------------------------------------------------------------------------------------------------ rules, checkpoints


def test_rules_name_attention_whole_or_one_of_its_products() -> None:
    batch = self_inputs()
    model = nn.ModuleDict({"attn": attention()})["attn"]
    rules = [{"match": {"name": "scores"}, "keep": "float32"}, {"match": {"name": "out"}, "weight": "int4"},
             {"weight": "int8", "input": "int8"}]
    before = assert_same(model, {"rules": rules}, batch, 0.3)
    rows = {r.name: r for r in qat.coverage(before).rows}
    assert rows["scores"].status == "kept"
    assert rows["context"].status == "quantized"
    assert rows["out"].weight == "int4 per_channel"
    weight_only = assert_same(attention(), "w8a16", batch)
    rows = {r.name: r for r in qat.coverage(weight_only).rows}
    assert rows["q"].status == "quantized"
    assert rows["scores"].status == rows["context"].status == "kept"
    assert "floating point" in rows["scores"].reason


def test_a_rule_for_linear_layers_does_not_reach_into_float_attention() -> None:
    with pytest.raises(RecipeError, match="raw weights"):
        qat.prepare(nn.ModuleList([attention()]), {"rules": [{"match": {"type": "Linear"}, "weight": "int8"}]})


def test_what_is_refused() -> None:
    layer = prepared(attention(), STATIC, self_inputs())
    x = self_inputs()
    with pytest.raises(RuntimeError, match="is_causal"):
        layer(**x, is_causal=True)
    with pytest.raises(RuntimeError, match="attn_mask has shape"):
        layer(**x, attn_mask=torch.zeros(7, 6))
    with pytest.raises(RuntimeError, match="key_padding_mask has shape"):
        layer(**x, key_padding_mask=torch.zeros(3, 6))
    nested = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(2, 16)], layout=torch.jagged)
    with pytest.raises(UnsupportedError, match="nested"):
        layer(nested, nested, nested)


@pytest.mark.parametrize("options", [{}, {"kdim": 12, "vdim": 10, "add_bias_kv": True}], ids=["stacked", "separate"])
def test_save_load_and_state_dict(options: dict[str, Any], tmp_path: Any) -> None:
    model = attention(**options)
    batch = {"query": torch.randn(3, 5, 16), "key": torch.randn(3, 6, model.kdim),
             "value": torch.randn(3, 6, model.vdim)}
    before = prepared(model, STATIC, batch)
    assert set(model.state_dict()) <= set(before.state_dict())
    after, _ = qat.convert(before, [batch])
    qat.save(after, tmp_path / "a")
    qat.save(copy.deepcopy(after), tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    loaded = qat.load(tmp_path / "a", attention(**options))
    assert isinstance(loaded, QuantizedMultiheadAttention)
    assert all(torch.equal(a, b) for a, b in zip(loaded(**batch), before(**batch)))


# ------------------------------------------------------------------------------------------------ transformer layers


def assert_all_ran(model: nn.Module, x: Tensor, **more: Any) -> None:
    """Every linear and attention module inside runs: none is bypassed by a fast path."""
    ran: set[str] = set()
    wanted = {n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.MultiheadAttention) and n
              and not n.endswith("out_proj")}
    # swapped on the instance: a forward hook would itself switch the fast path off
    for name in wanted:
        module = model.get_submodule(name)
        module.forward = lambda *a, n=name, f=module.forward, **k: ran.add(n) or f(*a, **k)
    with torch.no_grad():
        model(x, **more)
    assert ran == wanted


# the float model's: it takes the nested path
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("recipe", [STATIC, DYNAMIC, "w4a8"], ids=["static", "dynamic", "w4a8"])
def test_encoders_do_not_take_the_fast_path(recipe: Any, norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    x, padding = torch.randn(3, 6, 16), torch.arange(6) >= torch.tensor([[6], [4], [5]])
    batch = {"src": x, "src_key_padding_mask": padding}
    before = prepared(model, recipe, batch)
    after, certificate = qat.convert(before, [batch])
    assert certificate.equal
    with torch.no_grad():
        float_y = model(**batch)
        assert torch.equal(before(**batch), after(**batch))
        seen = ~padding                      # the nested path leaves zeros where the padding is
        near(after(**batch)[seen], float_y[seen], 0.05 if recipe != "w4a8" else 0.5)
    rows = {r.name: r for r in qat.coverage(before).rows}
    assert rows["layers.1.self_attn.scores"].status == rows["layers.1.linear2"].status == "quantized"
    for candidate in (before, after):
        assert_all_ran(copy.deepcopy(candidate), x, src_key_padding_mask=padding)


def test_decoders() -> None:
    class Translator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Transformer(16, 4, 1, 2, 32, batch_first=True, dropout=0.0)

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            mask = self.body.generate_square_subsequent_mask(target.shape[1])
            return self.body(source, target, tgt_mask=mask, tgt_is_causal=True)

    model, batch = Translator().eval(), {"source": torch.randn(3, 6, 16), "target": torch.randn(3, 5, 16)}
    before = prepared(model, STATIC, batch)
    after, _ = qat.convert(before, [batch])
    with torch.no_grad():
        assert torch.equal(before(**batch), after(**batch))
        near(after(**batch), model(**batch), 0.06)
    kept = [r.kind for r in qat.coverage(before).rows if r.status == "kept" and r.params]
    assert set(kept) == {"LayerNorm"}
    before.train()(**batch).square().sum().backward()
    for name, parameter in before.named_parameters():
        assert parameter.grad is not None, name


def test_a_rule_may_name_the_layer_around() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)).eval()
    x = torch.randn(2, 5, 16)
    rule = {"match": {"type": "TransformerEncoderLayer"}, "weight": "int8", "input": "int8"}
    before, after = zoo.assert_parity(model, {"rules": [rule]}, x)
    status = {r.name: r.status for r in qat.coverage(before).rows}
    assert status["0"] == "kept"
    assert status["1.self_attn"] == status["1.linear1"] == status["1.linear2"] == "quantized"
    assert_all_ran(after[1], x)


def test_macs_are_said_of_attention_whole() -> None:
    batch = {"query": torch.randn(3, 5, 16), "key": torch.randn(3, 8, 16), "value": torch.randn(3, 8, 16)}
    rows = {r.name: r for r in qat.coverage(qat.prepare(attention(), STATIC, example_inputs=batch)).rows}
    assert rows[""].macs == 16 * 16 * (15 + 24 + 24 + 15) + 2 * 3 * 5 * 8 * 16


def test_functions_called_by_user_models_stay_float_and_are_listed_with_the_remedy() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x) @ x.transpose(-1, -2)

    rows = {r.name: r for r in qat.coverage(qat.prepare(Net(), STATIC | {"rules": []},
                                                        example_inputs=torch.randn(1, 4, 8))).rows}
    assert "nn.MultiheadAttention" in rows["model: scaled_dot_product_attention"].reason
    assert "qat.MatMul" in rows["model: matmul"].reason


def test_compiled_equals_eager() -> None:
    torch._dynamo.reset()
    batch = self_inputs()
    deployed, _ = qat.convert(prepared(attention(), STATIC, batch), [batch])
    with torch.no_grad():
        expected = deployed(**batch)[0]
        assert torch.equal(torch.compile(deployed, backend="aot_eager")(**batch)[0], expected)
