"""Recurrent layers on integers: every option of the float modules, gradients through time, parts in plans and files."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils import _pytree as pytree

import qat
from qat.errors import PrepareError, RecipeError
from qat.modules import recurrent
from qat.modules.composite import Composite, Part

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),    # torch of its own layer
    # a relu's hidden states are never negative; tests/calibration holds that the warning comes
    pytest.mark.filterwarnings("ignore:1-bit activations that never change sign"),
]

KINDS: dict[str, Any] = {
    "LSTM": nn.LSTM, "GRU": nn.GRU, "RNN": nn.RNN,
    "RNN relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
    "LSTM projected": lambda *a, **k: nn.LSTM(*a, proj_size=3, **k),
}
DYNAMIC = {"format": "int8", "dynamic": True}
SCHEMES: dict[str, tuple[Any, Any]] = {
    "static": ("int8", "int8"), "affine": ("int8", {"format": "uint8", "symmetric": False}),
    "per token": ("int8", DYNAMIC), "per tensor": ("int8", {**DYNAMIC, "granularity": "per_tensor"}),
    "affine per token": ("int8", {"format": "uint8", "dynamic": True, "symmetric": False}),
    "lsq": ({"format": "int4", "learned": "lsq"}, {"format": "int8", "learned": "lsq"}),
    "lsq+": ({"format": "int4", "learned": "lsq"}, {"format": "uint4", "learned": "lsq_plus"}),
    "weight only": ("int4", None), "activation only": (None, "int8"),
    "groups": ({"format": "int4", "granularity": "per_group", "group_size": 1}, "int8"),
    "midrise": ("int2_midrise", {"format": "int2_midrise", "learned": "lsq"}), "ternary": ("ternary", "int8"),
    "binary": ("binary", {"format": "binary", "dynamic": True}), "binary static": ("binary", "binary"),
}


def tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(tensors(a), tensors(b), strict=True))


def packed(sizes: tuple[int, ...] = (3, 5, 1, 5), width: int = 6) -> PackedSequence:
    return pack_padded_sequence(torch.randn(max(sizes), len(sizes), width), torch.tensor(sizes), enforce_sorted=False)


def prepared(model: nn.Module, scheme: str, *batches: Any) -> Any:
    weight, activation = SCHEMES[scheme]
    result = qat.prepare(model, zoo.every_layer(weight, activation), example_inputs=batches[0])
    return qat.calibrate(result, batches)


def check(model: nn.Module, scheme: str, x: Any, *others: Any) -> tuple[Any, Any]:
    """Prepared in eval, with and without gradients, and deployed: the same bits."""
    before = prepared(model, scheme, x).eval()
    after, certificate = qat.convert(before, [x])
    assert certificate.equal
    for batch in (x, *others):
        args = batch if isinstance(batch, tuple) and not isinstance(batch, PackedSequence) else (batch,)
        expected = before(*args)
        with torch.no_grad():
            assert same(before(*args), expected), "the training path computes something else"
        assert same(after(*args), expected)
    return before, after


# ------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_prepared_and_deployed_are_equal(kind: str, scheme: str) -> None:
    model = KINDS[kind](6, 5, num_layers=2, bidirectional=True, dropout=0.5)
    before, after = check(model, scheme, torch.randn(7, 4, 6), torch.randn(1, 1, 6), torch.randn(3, 0, 6), packed())
    parts = [m for m in after.modules() if isinstance(m, Part)]
    assert len(parts) == (12 if "projected" in kind else 8)
    if SCHEMES[scheme][0] is not None:
        assert all(p.frozen for p in parts)
        assert not [n for n in after._parameters if n.startswith("weight")]
    assert not same(before(packed()), model.eval()(packed()))


@pytest.mark.parametrize("options", [
    {}, {"batch_first": True}, {"bias": False}, {"bidirectional": True}, {"num_layers": 3, "batch_first": True},
    {"num_layers": 2, "bidirectional": True, "bias": False}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_option_is_near_the_float_module(kind: str, options: dict[str, Any]) -> None:
    model = KINDS[kind](6, 5, **options)
    x, layers = torch.randn(4, 4, 6), options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    hidden = torch.randn(layers, 4, 3 if "projected" in kind else 5) / 3
    hx: Any = (hidden, torch.randn(layers, 4, 5)) if "LSTM" in kind else hidden
    unbatched = pytree.tree_map(lambda t: t[:, 0], hx)
    sequence = pack_padded_sequence(x, torch.tensor([2, 4, 1, 3]), options.get("batch_first", False), False)
    calls: list[tuple[Any, ...]] = [(x,), (x, hx), (sequence,), (sequence, hx), (x[:, 0], unbatched), (x[0],)]
    before = prepared(model, "static", *calls).eval()
    for call in calls:
        expected, actual = model(*call), before(*call)
        assert type(actual[0]) is type(expected[0])
        assert type(actual[1]) is type(expected[1])
        for a, b in zip(tensors(expected), tensors(actual), strict=True):
            assert a.shape == b.shape
            assert float((a - b).detach().abs().max()) < 0.06 * max(1.0, float(a.detach().abs().max()))
    if not options.get("batch_first"):
        padded = [pad_packed_sequence(m(sequence, hx)[0])[1] for m in (model, before)]
        assert torch.equal(*padded)
    check(model, "static", *calls)


def test_sequences_of_a_packed_batch_do_not_touch_each_other() -> None:
    model = nn.GRU(6, 5, num_layers=2, bidirectional=True)
    before = prepared(model, "static", torch.randn(5, 3, 6)).eval()
    one, other = torch.randn(5, 6), torch.randn(2, 6)
    together = pack_padded_sequence(torch.stack([torch.cat([other, torch.zeros(3, 6)]), one], 1), torch.tensor([2, 5]),
                                    enforce_sorted=False)
    y, h = before(together)
    padded = pad_packed_sequence(y)[0]
    for sequence, index in ((one, 1), (other, 0)):
        alone, state = before(sequence)
        assert torch.equal(padded[: len(sequence), index], alone)
        assert torch.equal(h[:, index], state)


def test_a_state_that_is_not_given_is_zeros() -> None:
    for model, states in ((nn.LSTM(6, 5), (torch.zeros(1, 3, 5),) * 2), (nn.GRU(6, 5), torch.zeros(1, 3, 5))):
        x = torch.randn(4, 3, 6)
        before = prepared(model, "static", x).eval()
        assert same(before(x), before(x, states))


def test_one_step_at_a_time_is_the_whole_sequence() -> None:
    x = torch.randn(6, 3, 6)
    for scheme in ("static", "per token", "weight only"):
        before = prepared(nn.LSTM(6, 5, num_layers=2), scheme, x).eval()
        state, outputs = None, []
        for step in x:
            y, state = before(step[None], state)
            outputs.append(y)
        whole, last = before(x)
        if scheme == "weight only":             # float products of one row and of many round differently
            assert torch.allclose(torch.cat(outputs), whole, atol=1e-5)
        else:
            assert same((torch.cat(outputs), state), (whole, last))


@pytest.mark.parametrize("scheme", ["static", "per token", "lsq", "weight only", "binary"])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind: Any, scheme: str) -> None:
    model, x = kind(6, 5), torch.randn(4, 6)
    hidden = torch.randn(4, 5) / 3
    hx: Any = (hidden, torch.randn(4, 5)) if kind is nn.LSTMCell else hidden
    single = pytree.tree_map(lambda t: t[0], (x, hx))
    before, _ = check(model, scheme, (x, hx), (x,), single, (x[:0],))
    if scheme == "static":
        for call in ((x, hx), (x,), single):
            for a, b in zip(tensors(model(*call)), tensors(before(*call)), strict=True):
                assert float((a - b).detach().abs().max()) < 0.05
    with pytest.raises(RuntimeError, match="hidden tensors of shape"):
        before(x, pytree.tree_map(lambda t: t[:, :3], hx))


# ---------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_closed_form_is_what_autograd_finds_step_by_step(kind: str, scheme: str,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    model = KINDS[kind](6, 5, num_layers=2, bidirectional=True)
    before = prepared(model, scheme, torch.randn(5, 4, 6) / 2).train()       # so that something is clipped
    sequence, layers = packed(), 4
    hidden = torch.randn(layers, 4, 3 if "projected" in kind else 5)
    start: Any = (hidden, torch.randn(layers, 4, 5)) if "LSTM" in kind else hidden

    def gradients() -> tuple[dict[str, Tensor], Any]:
        leaf = sequence._replace(data=sequence.data.clone().requires_grad_())
        hx = pytree.tree_map(lambda t: t.clone().requires_grad_(), start)
        before.zero_grad()
        torch.manual_seed(3)
        result = before(leaf, hx)
        sum((t * torch.randn(t.shape)).sum() for t in tensors(result)).backward()
        found = {n: p.grad.clone() for n, p in before.named_parameters() if p.grad is not None}
        found |= {"x": leaf.data.grad, **{f"state {i}": t.grad for i, t in enumerate(tensors(hx))}}
        return found, pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, result)

    closed, result = gradients()
    monkeypatch.setattr(recurrent.Recorded, "possible", staticmethod(lambda stepped: False))
    stepwise, expected = gradients()
    assert same(result, expected)
    missing = {n for n, _ in before.named_parameters()} - set(closed)
    assert not missing
    assert set(closed) == set(stepwise)
    for name, gradient in stepwise.items():
        size = max(float(gradient.abs().max()), 1e-3)
        assert float((closed[name] - gradient).abs().max()) < 1e-4 * size, name
    assert all(bool(g.any()) for n, g in closed.items() if "offset" not in n or "plus" in scheme)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_at_eight_bits_are_near_the_float_ones(kind: str) -> None:
    model, x = KINDS[kind](16, 12, num_layers=2), torch.randn(9, 8, 16)
    before = prepared(model, "static", x).train()
    weights = torch.randn(9, 8, 3 if "projected" in kind else 12)
    for m in (model, before):
        (m(x)[0] * weights).sum().backward()
    for name, parameter in model.named_parameters():
        gradient = dict(before.named_parameters())[name].grad
        cosine = torch.cosine_similarity(gradient.flatten(), parameter.grad.flatten(), 0)
        assert float(cosine) > 0.98, name


def test_frozen_parameters_get_no_gradient_and_the_rest_do() -> None:
    model = nn.LSTM(6, 5, num_layers=2)
    model.weight_hh_l0.requires_grad_(False)
    model.bias_ih_l1.requires_grad_(False)
    before = prepared(model, "lsq", torch.randn(4, 3, 6))
    before(torch.randn(4, 3, 6))[0].square().sum().backward()
    for name, parameter in before.named_parameters():
        frozen = name in ("weight_hh_l0", "bias_ih_l1") or (name.startswith("hh_l0.weight_quantizer") and False)
        assert (parameter.grad is None) == frozen, name
    everything = prepared(nn.GRU(6, 5).requires_grad_(False), "static", torch.randn(4, 3, 6))
    x = torch.randn(4, 3, 6, requires_grad=True)
    everything(x)[0].sum().backward()
    assert bool(x.grad.any())


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_any_strides(kind: str) -> None:
    """The state of one sequence, its dimensions in another order: the kernel is given its rows one after another."""
    before = prepared(KINDS[kind](6, 5, num_layers=2), "static", torch.randn(4, 1, 6)).eval()
    after = qat.convert(before, [torch.randn(4, 1, 6)])[0]
    x = torch.randn(4, 1, 6)
    plain = [torch.randn(2, 1, s.shape[-1]) for s in tensors(before(x)[1])]
    turned = [h.transpose(0, -1).contiguous().transpose(0, -1) for h in plain]
    for model in (before, after):
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                expected, got = (model(x, tuple(h) if len(h) > 1 else h[0]) for h in (plain, turned))
            assert same(got, expected)


def test_a_float_weight_that_changes_before_the_backward_is_noticed() -> None:
    recipe = {"rules": [{"match": {"name": "0.hh_*"}, "keep": "float32"},
                        {"match": {"type": "RNN"}, "weight": "int8", "input": DYNAMIC}]}
    model = qat.prepare(nn.Sequential(nn.RNN(6, 5)), recipe)
    y = model(torch.randn(4, 3, 6))[0]
    with torch.no_grad():
        model[0].weight_hh_l0.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_train_and_deploy(dtype: torch.dtype) -> None:
    model, x = nn.LSTM(6, 5, bidirectional=True).to(dtype), torch.randn(4, 3, 6).to(dtype)
    for scheme in ("static", "per token", "weight only", "lsq"):
        before, _ = check(model, scheme, x)
        y, state = before.train()(x)
        assert {t.dtype for t in (y, *state)} == {dtype}
        y.float().square().sum().backward()
        assert all(p.grad is not None and p.grad.dtype == p.dtype for p in before.parameters())


def test_under_autocast() -> None:
    x = torch.randn(4, 3, 6)
    for model, scheme in itertools.product((nn.LSTM(6, 5), nn.GRU(6, 5)), ("static", "weight only")):
        before, after = check(model, scheme, x)
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = before(x), model(x)
            assert same(after(x), y)
            assert [t.dtype for t in tensors(y)] == [t.dtype for t in tensors(expected)]
            loss = y[0].float().square().sum()
        loss.backward()
        assert all(p.grad is not None for p in before.parameters())


def test_dropout_lies_between_layers_and_only_in_training() -> None:
    x = torch.randn(4, 3, 6)
    before = prepared(nn.LSTM(6, 5, num_layers=2, dropout=0.5), "static", x)
    assert not torch.equal(before(x)[0], before(x)[0])
    assert torch.equal(before(x)[1][0][0], before(x)[1][0][0]), "the first layer's state comes before the dropout"
    assert same(before.eval()(x), before(x))


# ------------------------------------------------------------------------------------------------- ranges


def test_calibration_sees_every_hidden_state() -> None:
    x = torch.randn(9, 4, 6)
    model = nn.GRU(6, 5)
    before = prepared(model, "static", x)
    hidden = model(x)[0][:-1].detach()
    observer = before.hh_l0.input_quantizer.observer
    assert float(observer.high) == pytest.approx(max(0.0, float(hidden.max())), abs=1e-6)
    assert float(observer.low) == pytest.approx(min(0.0, float(hidden.min())), abs=1e-6)
    assert float(before.ih_l0.input_quantizer.observer.high) == float(x.max())


def test_a_range_that_follows_the_data_stands_still_within_a_sequence() -> None:
    x = torch.randn(9, 4, 6)
    before = prepared(nn.GRU(6, 5), "static", x / 10)
    quantizer = before.hh_l0.input_quantizer
    scales = {float(quantizer.scale)}
    before.hh_l0.register_forward_hook(lambda m, a, y: scales.add(float(quantizer.scale)))
    qat.set_observing(before, True)
    before(x)
    assert len(scales) == 1
    assert quantizer.observing
    before(x)
    assert len(scales) == 2, "the next sequence has the new range"


def test_without_calibration_observing_gives_the_range() -> None:
    before = qat.prepare(nn.LSTM(6, 5), zoo.every_layer())
    with pytest.raises(qat.QuantizationError, match="no range yet"):
        before(torch.randn(4, 3, 6))
    qat.set_observing(before, True)
    before(torch.randn(4, 3, 6))[0].sum().backward()
    assert all(p.grad is not None for p in before.parameters())


# -------------------------------------------------------------------------------------------------- plans


class Classifier(nn.Module):
    """Tokens to classes, as in any tutorial."""

    def __init__(self, kind: Any = nn.LSTM, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.rnn = kind(8, 8, num_layers=2, batch_first=True, **options)
        self.head = nn.Linear(8 * (1 + self.rnn.bidirectional), 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.table(tokens))[0].mean(1))


TOKENS = torch.arange(24).reshape(4, 6) % 11


@pytest.mark.parametrize("preset", list(qat.recipe.PRESETS))
def test_every_preset(preset: str, tmp_path: Path) -> None:
    model = Classifier(bidirectional=True)
    before, after = zoo.assert_parity(model, preset, TOKENS, TOKENS[:1], TOKENS[:0])
    rows = {r.name: r for r in qat.coverage(before).rows}
    assert sum(r.params for r in rows.values()) == sum(p.numel() for p in model.parameters())
    qat.save(after, tmp_path / "out")
    loaded = qat.load(tmp_path / "out", Classifier(bidirectional=True))
    assert torch.equal(loaded(TOKENS), after(TOKENS))
    assert set(loaded.state_dict()) == set(after.state_dict())


def test_coverage_counts_parts_and_their_products() -> None:
    model = Classifier()
    for m in (qat.prepare(model, "w8a8", example_inputs=TOKENS), qat.calibrate(qat.prepare(model, "w8a8"), [TOKENS])):
        table = qat.coverage(m)
        rows = {r.name: r for r in table.rows}
        assert {"rnn", "rnn.ih_l0", "rnn.hh_l0", "rnn.ih_l1", "rnn.hh_l1"} <= set(rows)
        assert rows["rnn"].kind == "LSTM"
        assert rows["rnn"].params == 0
        assert rows["rnn.ih_l0"].params == 32 * 8 + 32
        assert rows["rnn.ih_l0"].macs == TOKENS.numel() * 32 * 8
        assert table.fraction == 1.0
        assert not table.unobserved
        assert not [r for r in table.rows if r.status != "quantized"], "nothing reads raw weights"
    deployed, _ = qat.convert(m, [TOKENS])
    assert {r.name: (r.params, r.macs) for r in qat.coverage(deployed).rows} == {
        n: (r.params, r.macs) for n, r in rows.items()}


def test_rules_name_a_layer_its_type_or_its_parts() -> None:
    def weights(*rules: dict[str, Any]) -> dict[str, str]:
        return {r.name: r.weight for r in qat.coverage(qat.prepare(Classifier(), {"rules": list(rules)})).rows}

    linear = {"match": {"type": "Linear"}, "weight": "int4"}
    assert not [n for n in weights(linear) if n.startswith("rnn.")], "a part is not a Linear"
    for match in ({"type": "LSTM"}, {"name": "rnn"}, {"type": "RNNBase"}):
        found = weights({"match": match, "weight": "int4"})
        assert {v for n, v in found.items() if n.startswith("rnn.")} == {"int4 per_channel"}
    found = weights({"match": {"name": "rnn.hh_*"}, "weight": "int8"}, {"match": {"type": "LSTM"}, "weight": "int4"})
    assert (found["rnn.hh_l1"], found["rnn.ih_l1"]) == ("int8 per_channel", "int4 per_channel")
    found = weights({"match": {"name": "rnn.ih_*"}, "weight": "int4"})
    assert (found["rnn.ih_l0"], found["rnn.hh_l0"]) == ("int4 per_channel", "")
    found = weights({"match": {"name": "rnn.hh_l1"}, "keep": "float32"}, {"match": {"type": "LSTM"}, "weight": "int4"})
    assert (found["rnn.ih_l0"], found["rnn.hh_l1"]) == ("int4 per_channel", "")
    with pytest.raises(RecipeError, match="matches nothing"):
        weights({"match": {"name": "rnn.hr_*"}, "weight": "int8"}, linear)


def test_a_part_that_stays_float_is_said_and_computes_in_float() -> None:
    recipe = {"rules": [{"match": {"name": "rnn.hh_*"}, "keep": "float32"},
                        {"match": {"type": "LSTM"}, "weight": "int8", "input": "int8"}]}
    before, after = zoo.assert_parity(Classifier(), recipe, TOKENS)
    rows = {r.name: r for r in qat.coverage(before).rows}
    assert rows["rnn.hh_l0"].status == "kept"
    assert "keeps it float32" in rows["rnn.hh_l0"].reason
    assert "weight_hh_l0" in after.rnn._parameters
    assert "weight_ih_l0" not in after.rnn._parameters


def test_edges_are_the_products_at_the_ends() -> None:
    rows = {r.name: r for r in qat.coverage(qat.prepare(Classifier(bidirectional=True), "w4a8",
                                                        example_inputs=TOKENS)).rows}
    assert {n for n, r in rows.items() if r.reason == "edge: int8"} == {"rnn.ih_l0", "rnn.ih_l0_reverse", "head"}
    assert rows["rnn.hh_l0"].weight.startswith("int4")
    alone = qat.coverage(qat.prepare(nn.GRU(6, 5, num_layers=2, bidirectional=True), "w4a8")).rows
    assert {r.name for r in alone if r.reason == "edge: int8"} == {"ih_l0", "ih_l0_reverse", "hh_l1", "hh_l1_reverse"}


def test_groups_are_checked_for_each_part() -> None:
    weight = {"format": "int4", "granularity": "per_group", "group_size": 4}
    model = nn.LSTM(6, 8)
    with pytest.raises(PrepareError, match=r"ih_l0 \(6 inputs\)") as caught:
        qat.prepare(model, zoo.every_layer(weight, None))
    assert "hh_l0" not in str(caught.value)
    rows = {r.name: r for r in qat.coverage(qat.prepare(model, zoo.every_layer(
        {**weight, "group_fallback": "divisor"}, "int8"))).rows}
    assert (rows["ih_l0"].weight, rows["hh_l0"].weight) == ("int4 per_group(2)", "int4 per_group(4)")


def test_tied_weights_are_quantized_once() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.LSTM(6, 6), nn.LSTM(6, 6)
            self.b.weight_hh_l0 = self.a.weight_hh_l0
            self.a.weight_ih_l0 = self.a.weight_hh_l0

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)[0])[0]

    x = torch.randn(4, 3, 6)
    for weight in ("int8", {"format": "int4", "learned": "lsq"}):
        before, after = zoo.assert_parity(Pair(), zoo.every_layer(weight), x)
        parts = [before.a.ih_l0, before.a.hh_l0, before.b.hh_l0]
        assert len({id(p.weight_quantizer) for p in parts}) == 1
        assert before.a.hh_l0.plan.tied_to == "a.ih_l0"
        assert len({id(m.weight_codes) for m in (after.a.ih_l0, after.a.hh_l0, after.b.hh_l0)}) == 1
        total = sum(p.numel() for p in Pair().parameters())
        assert qat.coverage(before).total_params == qat.coverage(after).total_params == total
    kept = qat.prepare(Pair(), {"rules": [{"match": {"name": "b"}, "keep": "float32"}, {"weight": "int8"}]})
    rows = {r.name: r for r in qat.coverage(kept).rows}
    assert "a" not in rows or not isinstance(kept.a, Composite) or rows["a.hh_l0"].status == "kept"


def test_a_layer_used_twice_and_a_layer_under_two_names() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.GRU(6, 6)
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return self.b(*self.a(x))[0]

    before, after = zoo.assert_parity(Twice(), "w8a8", torch.randn(4, 3, 6))
    assert before.a is before.b
    assert after.a is after.b
    before.train()(torch.randn(4, 3, 6)).sum().backward()
    assert all(p.grad is not None for p in before.parameters())


def test_subclasses_with_a_forward_of_their_own_are_kept() -> None:
    class Mine(nn.LSTM):
        pass

    class Other(nn.LSTM):
        def forward(self, input: Any, hx: Any = None) -> Any:
            return super().forward(input, hx)[0]

    before = qat.prepare(nn.Sequential(Mine(6, 5)), "w8a8")
    assert isinstance(before[0], Composite)
    assert isinstance(before[0], Mine)
    with pytest.raises(RecipeError, match="overrides the forward of LSTM"):
        qat.prepare(nn.Sequential(Other(6, 5)), {"rules": [{"match": {"type": "LSTM"}, "weight": "int8"}]})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_layers_that_stay_in_a_narrow_type(dtype: str) -> None:
    recipe = {"rules": [{"match": {"type": "LSTM"}, "keep": dtype}, {"weight": "int8", "input": "int8"}]}
    before, after = zoo.assert_parity(Classifier(), recipe, TOKENS)
    assert after.rnn.weight_hh_l0.dtype == getattr(torch, dtype)
    before.train()(TOKENS).sum().backward()
    assert before.rnn.weight_hh_l0.grad is not None


# -------------------------------------------------------------------------------------- state, copies, hooks


@pytest.mark.parametrize("deploy", [False, True])
def test_copies_and_pickles(deploy: bool) -> None:
    x = torch.randn(4, 3, 6)
    model = prepared(nn.LSTM(6, 5, num_layers=2), "lsq", x).eval()
    if deploy:
        model, _ = qat.convert(model, [x])
    expected = model(x)
    model.train()(x)[0].sum()           # whatever a forward leaves behind must not be in the way
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(twin.eval()(x), expected)
        assert all(p.owner is twin for p in twin.parts.values())
        mine = {id(t) for t in model.state_dict(keep_vars=True).values()}
        assert not mine & {id(t) for t in twin.state_dict(keep_vars=True).values()}


def test_parameters_are_registered_once_and_the_optimizer_moves_them() -> None:
    x = torch.randn(4, 3, 6)
    before = prepared(nn.LSTM(6, 5), "static", x)
    names = [n for n, _ in before.named_parameters(remove_duplicate=False)]
    assert sorted(names) == sorted(n for n, _ in nn.LSTM(6, 5).named_parameters())
    before.eval()
    first = before(x)[0].detach()
    optimizer = torch.optim.SGD(before.parameters(), 0.5)
    before(x)[0].sum().backward()
    optimizer.step()
    assert not torch.equal(before(x)[0], first)
    before.load_state_dict(nn.LSTM(6, 5).state_dict(), strict=True)
    before.flatten_parameters()
    assert len(before.all_weights[0]) == 4


def test_weight_norm_on_a_recurrent_weight() -> None:
    x = torch.randn(4, 3, 6)
    model = nn.utils.parametrizations.weight_norm(nn.LSTM(6, 5), "weight_hh_l0")
    before, after = check(model, "static", x)
    before.train()(x)[0].sum().backward()
    assert all(p.grad is not None for p in before.parameters())
    assert not [n for n in after.state_dict() if "parametrizations" in n]
    wanted = torch.randn(20, 5)
    before.hh_l0.write_weight(wanted)
    torch.testing.assert_close(before.weight_hh_l0.detach(), wanted)


def test_what_the_float_module_refuses_is_refused() -> None:
    before = prepared(nn.LSTM(6, 5), "static", torch.randn(4, 3, 6))
    for bad, message in (((torch.randn(4, 3, 7),), "input_size"), ((torch.randn(0, 3, 6),), "sequence length"),
                         ((torch.randn(4, 3, 6), (torch.zeros(1, 2, 5),) * 2), "Expected hidden"),
                         ((torch.randn(4, 3, 6), torch.zeros(1, 3, 5)), "hx has 1 tensors"),
                         ((torch.randn(4, 6), (torch.zeros(1, 3, 5),) * 2), "unbatched")):
        with pytest.raises(RuntimeError, match=message):
            before(*bad)
    for bad in ((torch.randn(6),), (torch.randn(4, 3, 6).double(),)):
        with pytest.raises(ValueError, match=r"2D or 3D|dtype"):
            before(*bad)


def test_an_output_spec_puts_the_outputs_on_a_grid() -> None:
    x = torch.randn(4, 3, 6)
    recipe = {"rules": [{"weight": "int8", "input": "int8", "output": {"format": "int8", "symmetric": True}}]}
    before = qat.calibrate(qat.prepare(nn.GRU(6, 5), recipe, example_inputs=x), [x]).eval()
    after, _ = qat.convert(before, [x])
    codes = after(x)[0] / after.output_quantizer.scale
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert same(after(x), before(x))
    assert isinstance(after(packed())[0], PackedSequence)
