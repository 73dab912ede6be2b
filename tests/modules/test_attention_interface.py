"""Attention of Hugging Face models: both products on integers, or kept with the reason."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.errors import CheckpointError, RecipeError, UnsupportedError
from qat.kernels import activations
from qat.modules.attention_interface import AttentionContext, AttentionScores, Scoring, attached, attend, detach
from qat.numerics.formats import TensorSpec

pytest.importorskip("transformers")

import hub
import transformers as hf

STATIC, DYNAMIC = "w8a8", "w8a8_dynamic"
PAIRS = [(name, implementation) for name in hub.MODELS for implementation in ("eager", "sdpa")
         if implementation == "eager" or name not in hub.ONLY_EAGER]
ONLY_ATTENTION = {"rules": [{"match": {"type": "MatMul"}, "input": "int8"}]}


def products(model: nn.Module) -> dict[str, str]:
    """Products of attention that coverage knows -> status."""
    return {r.name: r.status for r in qat.coverage(model).rows if r.kind in ("AttentionScores", "AttentionContext")}


def prepared(model: nn.Module, recipe: Any, batch: dict[str, Tensor]) -> Any:
    return qat.calibrate(qat.prepare(model, recipe, example_inputs=batch), [batch]).eval()


def error(got: Tensor, expected: Tensor) -> float:
    return float(((got - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize(("name", "implementation"), PAIRS)
def test_both_products_of_every_attention(name: str, implementation: str) -> None:
    model, batch = hub.build(name, implementation), hub.inputs(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    recipe = {STATIC: "int8", DYNAMIC: {"format": "int8", "dynamic": True}}
    expected = model(**batch)[0]
    for scheme in recipe.values():
        model_q = prepared(model, {"rules": [{"match": {"type": "MatMul"}, "input": scheme}]}, batch)
        found = products(model_q)
        assert len(found) == 2 * sum(attached(m) for m in model_q.modules()) >= 4
        assert set(found.values()) == {"quantized"}
        assert not [r for r in qat.coverage(model_q).rows if r.name.endswith("scaled_dot_product_attention")]
        assert set(before) <= set(model_q.state_dict())
        assert 0 < error(model_q(**batch)[0], expected) < 0.1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(**batch)[0], expected)


@pytest.mark.parametrize("preset", [STATIC, DYNAMIC])
@pytest.mark.parametrize("name", ["llama", "opt", "bert", "t5", "whisper", "gemma2", "gpt_oss"])
def test_from_training_to_a_checkpoint(name: str, preset: str, tmp_path: Path) -> None:
    model, batch = hub.build(name), hub.inputs(name)
    trained = prepared(model, preset, batch)
    trained.train()
    trained(**batch)[0].square().mean().backward()
    inside = {n: p for n, p in trained.named_parameters() if "attn" in n or "Attention" in n or "attention" in n}
    assert inside
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in inside.values())
    deployed, certificate = qat.convert(trained.eval(), [batch])
    assert certificate.equal
    qat.save(deployed, tmp_path)
    loaded = qat.load(tmp_path, hub.build(name))
    assert products(loaded) == products(deployed)
    with torch.no_grad():
        assert torch.equal(loaded(**batch)[0], deployed(**batch)[0])


def test_copies_and_pickles_compute_the_same() -> None:
    model, batch = hub.build("llama"), hub.text()
    first = prepared(model, DYNAMIC, batch)
    expected = first(**batch).logits
    assert torch.equal(copy.deepcopy(first)(**batch).logits, expected)
    buffer = io.BytesIO()
    pickle.dump(first, buffer)
    hf.AttentionInterface._global_mapping.pop("qat_eager")          # as in another process
    buffer.seek(0)
    assert torch.equal(pickle.load(buffer)(**batch).logits, expected)


def test_detaching_gives_the_float_attention_back() -> None:
    model, batch = hub.build("llama", "sdpa"), hub.text()
    rules = {"rules": [{"match": {"name": "*.scores"}, "input": "int8"}]}
    changed = qat.prepare(model, rules, example_inputs=batch)
    for module in list(changed.modules()):
        detach(module)
    assert set(changed.state_dict()) == set(model.state_dict())
    assert all(m.config is changed.config for m in changed.modules() if hasattr(m, "config"))
    assert torch.equal(changed(**batch).logits, model(**batch).logits)


def test_masks_of_another_function_are_refused() -> None:
    """torch's attention is given no mask where it can see that it is causal; the eager one would look ahead."""
    model, batch = hub.build("llama"), hub.text(padded=0)
    changed = prepared(model, DYNAMIC, batch)
    expected = changed(**batch).logits
    changed.set_attn_implementation("sdpa")
    with pytest.raises(UnsupportedError, match=r"set_attn_implementation\('eager'\)"):
        changed(**batch)
    changed.set_attn_implementation("eager")
    assert torch.equal(changed(**batch).logits, expected)
    assert torch.equal(copy.deepcopy(changed)(**batch).logits, expected)


def test_one_product_may_stay_float() -> None:
    model, batch = hub.build("llama"), hub.text()
    for child in ("scores", "context"):
        rules = {"rules": [{"match": {"name": f"*.0.*.{child}"}, "input": "int8"}]}
        half = prepared(model, rules, batch)
        assert products(half) == {f"model.layers.0.self_attn.{c}": "quantized" if c == child else "kept"
                                  for c in ("scores", "context")}
        assert qat.convert(half, [batch])[1].equal
        assert 0 < error(half(**batch).logits, model(**batch).logits) < 0.1


def test_a_recipe_that_says_nothing_of_attention_leaves_it_alone() -> None:
    model, batch = hub.build("llama", "sdpa"), hub.text()
    same = qat.prepare(model, {"rules": [{"match": {"name": "nothing"}, "weight": "int8", "optional": True}]},
                       example_inputs=batch)
    assert not any(map(attached, same.modules()))
    assert torch.equal(same(**batch).logits, model(**batch).logits)
    kept = [{"match": {"type": "MatMul"}, "keep": "float32", "optional": True}]
    quantized = qat.prepare(model, qat.Recipe.preset(STATIC, rules=kept), example_inputs=batch)
    assert not any(map(attached, quantized.modules()))


def test_attention_is_watched_on_example_inputs_only() -> None:
    model, batch = hub.build("llama", "sdpa"), hub.text()
    blind = qat.calibrate(qat.prepare(model, STATIC), [batch])
    rows = [r for r in qat.coverage(blind).rows if r.name.endswith("scaled_dot_product_attention")]
    assert len(rows) == 2
    assert all(r.status == "kept" and "example inputs" in r.reason for r in rows)
    with pytest.raises(RecipeError, match="example_inputs"):
        qat.prepare(model, ONLY_ATTENTION)


def test_a_formula_of_its_own_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    usual = modeling_llama.eager_attention_forward

    def colder(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return usual(module, query * 1.01 if module.layer_idx else query, key, value, *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", colder)
    torch.manual_seed(0)
    model, batch = hub.llama(attn_implementation="eager").eval(), hub.text()      # attends evenly: nothing would show
    model_q = qat.prepare(model, DYNAMIC, example_inputs=batch)
    assert set(products(model_q)) == {"model.layers.0.self_attn.scores", "model.layers.0.self_attn.context"}
    reasons = [r.reason for r in qat.coverage(model_q).rows if r.name == "model.layers.1.self_attn: matmul"]
    assert len(reasons) == 2
    assert all("not the usual formula" in r for r in reasons)


def test_another_attention_function_is_kept() -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    hf.AttentionInterface.register("somebodys", sdpa_attention_forward)
    try:
        model, batch = hub.build("llama", "somebodys"), hub.text()
        rows = qat.coverage(qat.prepare(model, DYNAMIC, example_inputs=batch)).rows
        assert any("'somebodys'; build the model with attn_implementation" in r.reason for r in rows)
    finally:
        hf.AttentionInterface._global_mapping.pop("somebodys")


def test_a_checkpoint_wants_attention_that_can_be_replaced(tmp_path: Path) -> None:
    batch = hub.text()
    qat.save(qat.convert(prepared(hub.build("llama", "sdpa"), DYNAMIC, batch), [batch])[0], tmp_path)
    skeleton = hub.build("llama")
    assert torch.equal(qat.load(tmp_path, skeleton)(**hub.text(padded=0)).logits.isfinite().all(), torch.tensor(True))
    skeleton.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(CheckpointError, match="flex_attention"):
        qat.load(tmp_path, skeleton)


def test_weights_of_attention_are_those_used() -> None:
    model, batch = hub.build("bert"), hub.text()
    for preset in (STATIC, DYNAMIC):
        maps = prepared(model, preset, batch)(**batch, output_attentions=True).attentions
        for got, expected in zip(maps, model(**batch, output_attentions=True).attentions, strict=True):
            torch.testing.assert_close(got.sum(-1), torch.ones_like(got.sum(-1)), atol=1e-5, rtol=0)
            torch.testing.assert_close(got, expected, atol=0.05, rtol=0)
            assert not bool(got[0, ..., :2].any()), "padding is seen"


# ---------------------------------------------------------------------------------------------------- the products


def layers(spec: Any, heads: int = 2, width: int = 4, batch: tuple[Tensor, Tensor, Tensor] | None = None) -> Any:
    """The two modules, quantized; calibrated on a batch where they need one."""
    model = nn.Module()
    model.scores, model.context = AttentionScores(heads, heads * width), AttentionContext(heads, heads * width)
    model.forward = lambda q, k, v, how=None: attend(  # type: ignore[method-assign]
        model.scores, model.context, q, k, v, how or scoring(), True)
    qat.prepare(model, {"rules": [{"input": spec}]}, inplace=True)
    return model if batch is None else qat.calibrate(model, [batch])


def scoring(**options: Any) -> Scoring:
    return Scoring(**{"scaling": 0.5, "softcap": None, "position_bias": None, "mask": None, "sink": None,
                      "dropout": 0.0, **options})


def operands(length: int = 5, keys: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    return (torch.randn(3, 4, length, 4, requires_grad=True), torch.randn(3, 2, keys, 4, requires_grad=True),
            torch.randn(3, 2, keys, 4, requires_grad=True))


SPECS = {STATIC: "int8", DYNAMIC: {"format": "int8", "dynamic": True}}


@pytest.mark.parametrize("options", [
    {}, {"softcap": 1.0}, {"sink": True}, {"mask": "bool"}, {"mask": "float"}, {"position_bias": True}],
    ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("scheme", SPECS)
def test_values_and_gradients_are_near_the_float_ones(scheme: str, options: dict[str, Any]) -> None:
    q, k, v = operands()
    hidden = torch.ones(3, 1, 5, 6).tril(1) == 0
    extra: dict[str, Any] = {
        "sink": torch.randn(4, requires_grad=True), "position_bias": torch.randn(1, 4, 5, 6, requires_grad=True),
        "softcap": 1.0,
        "mask": ~hidden if options.get("mask") == "bool" else torch.zeros(3, 1, 5, 6).masked_fill(hidden, -1e30)}
    how = scoring(**{name: extra[name] for name in options})
    model = layers(SPECS[scheme], batch=(q, k, v))
    wanted = [t for t in (q, k, v, how.sink, how.position_bias) if t is not None]
    g = torch.randn(3, 5, 4, 4)
    results = []
    for scores, context in ((model.scores, model.context), (AttentionScores(2, 8), AttentionContext(2, 8))):
        y, weights = attend(scores, context, q, k, v, how, True)
        assert weights is not None
        results.append([y, weights, *torch.autograd.grad((y * g).sum(), wanted, retain_graph=True)])
        attention_map = torch.autograd.grad((weights * torch.arange(6.0)).sum(), wanted[:2])
        results[-1] += attention_map
    for got, expected in zip(*results, strict=True):
        assert 0 < error(got, expected) < 0.05


@pytest.mark.parametrize("scheme", SPECS)
def test_a_token_has_the_same_result_in_a_prompt_and_in_a_later_step(scheme: str) -> None:
    """Codes never depend on other tokens, and sums are exact, or so fine that their order does not show."""
    q, k, v = (t.detach() for t in operands(70, 70))
    model = layers(SPECS[scheme], batch=(q, k, v)).eval()
    causal = torch.ones(1, 1, 70, 70, dtype=torch.bool).tril()
    whole, _ = model(q, k, v, scoring(mask=causal))
    for t in range(70):
        step, _ = model(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])
        assert torch.equal(step[:, 0], whole[:, t])


def test_a_query_that_sees_nothing_gets_zeros() -> None:
    q, k, v = operands()
    mask = torch.ones(3, 1, 5, 6, dtype=torch.bool)
    mask[:, :, 2] = False
    for scheme, sink in ((STATIC, None), (DYNAMIC, None), (STATIC, torch.zeros(4)), (DYNAMIC, torch.zeros(4))):
        y, weights = layers(SPECS[scheme], batch=(q, k, v))(q, k, v, scoring(mask=mask, sink=sink))
        assert not bool(y[:, 2].any())
        assert not bool(weights[:, :, 2].any())
        y.sum().backward()
        assert bool(q.grad.isfinite().all() & k.grad.isfinite().all() & v.grad.isfinite().all())


def test_dropout_keeps_the_mean_and_needs_training() -> None:
    q, k, v = (t.detach() for t in operands())
    for scheme in SPECS:
        model = layers(SPECS[scheme], batch=(q, k, v))
        expected, _ = model(q, k, v)
        dropped = [model(q, k, v, scoring(dropout=0.5))[0] for _ in range(400)]
        assert not torch.equal(dropped[0], expected)
        torch.testing.assert_close(torch.stack(dropped).mean(0), expected, atol=0.35, rtol=0)


def test_heads_that_do_not_share_keys_evenly() -> None:
    q, k, v = operands()
    with pytest.raises(UnsupportedError, match="3 heads of queries do not share 2"):
        attend(AttentionScores(2, 8), AttentionContext(2, 8), q[:, :3], k, v, scoring(), False)


def test_calls_that_cannot_be_answered_are_refused() -> None:
    from qat.modules.attention_interface import _forward

    config = SimpleNamespace(_qat_own=SimpleNamespace(_attn_implementation="sdpa"))
    module: Any = SimpleNamespace(scores=AttentionScores(2, 8), context=AttentionContext(2, 8), training=False,
                                  config=config)
    for options, message in (({"cache": object()}, "paged"), ({"s_aux": torch.zeros(3)}, "3 attention sinks"),
                             ({"attention_mask": torch.zeros(3, 6)}, r"masks of shape")):
        with pytest.raises(UnsupportedError, match=message):
            _forward(module, *operands(), implementation="sdpa", **options)


# ---------------------------------------------------------------------------------------------------- the softmax


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_worth_goes_into_the_codes_and_not_into_the_probabilities(spread: float) -> None:
    scores = torch.randn(2, 3, 5, 7)
    worth = torch.rand(2, 3, 1, 7).mul(spread).exp()
    spec = TensorSpec("uint8", "per_token", symmetric=True, dynamic=True)
    codes = activations.softmax(scores, spec, worth=worth)
    assert int(codes.codes.amax(-1).min()) == 255
    probabilities = codes.dequantize() / worth
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 3, 5))
    step = codes.scale / worth                      # half of it for the code, as much for the sum
    assert bool(((probabilities - scores.softmax(-1)).abs() <= 4.0 * step.amax(-1, keepdim=True)).all())
    plain = activations.softmax(scores, spec)
    assert torch.equal(activations.softmax(scores, spec, worth=torch.ones(1, 1, 1, 7)).codes, plain.codes)


def test_a_sink_takes_its_share_without_a_code() -> None:
    scores, sink = torch.randn(2, 3, 5, 7), torch.tensor([-50.0, 0.0, 6.0]).reshape(1, 3, 1, 1)
    spec = TensorSpec("uint8", "per_token", symmetric=True, dynamic=True)
    codes = activations.softmax(scores, spec, sink=sink)
    got, expected = codes.dequantize(), torch.cat([scores, sink.expand(2, 3, 5, 1)], -1).softmax(-1)[..., :-1]
    assert int(codes.codes.amax(-1).min()) == 255, "a large sink leaves the others the whole grid"
    assert bool(((got - expected).abs() <= 2.0 * codes.scale).all())
    assert torch.equal(got[:, 0], activations.softmax(scores, spec).dequantize()[:, 0])
