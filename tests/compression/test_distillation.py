"""The losses against closed forms; what is watched is what a float network shows; the teacher stays apart."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qat
from qat.compression.distillation import (
    Distillation,
    Distiller,
    attention_loss,
    class_dim,
    hidden_loss,
    logits_loss,
)
from qat.compression.watching import watching
from qat.errors import ConfigError
from qat.training.models import ResidualNet


def recipe(**rule):
    return {"rules": [{"match": {"type": "*"}, "weight": {"format": "int8"}, "input": {"format": "int8"}, **rule}]}


def prepared(model, x, spec="w8a8"):
    """A calibrated network, in eval."""
    made = qat.prepare(model, spec, x)
    qat.calibrate(made, [x])
    return made.eval()


def mlp(hidden=8, classes=5, inputs=6):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                         nn.Linear(hidden, classes))  # fmt: skip


# ---------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize(("shape", "dim"), [((7, 5), 1), ((3, 4, 5), -1), ((3, 5, 4), 1), ((2, 5, 3, 2), 1), ((5,), 0)])
def test_kl_has_the_value_and_gradient_of_its_formula(temperature, shape, dim):
    s, t = torch.randn(shape, requires_grad=True), torch.randn(shape)
    loss = logits_loss(s, t, temperature, dim=dim)
    p, q = ((x.double() / temperature).softmax(dim) for x in (t, s))
    positions = s.numel() // s.shape[dim]
    expected = temperature**2 * (p * (p / q).log()).sum() / positions
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    torch.testing.assert_close(s.grad.double(), temperature * (q - p).detach() / positions, atol=1e-6, rtol=1e-4)


def test_the_losses_vanish_at_the_teacher_and_only_there():
    t = torch.randn(6, 4, 3)
    maps = torch.rand(2, 3, 4, 4).softmax(-1)
    for divergence in ("kl", "binary", "mse"):
        assert logits_loss(t, t, divergence=divergence).abs() < 1e-6
        assert logits_loss(t + torch.randn_like(t), t, divergence=divergence) > 0.01
    assert hidden_loss(t, t) == 0
    assert attention_loss(maps, maps).abs() < 1e-6
    assert attention_loss(maps.roll(1, -1), maps) > 1e-3


def test_binary_is_cross_entropy_of_sigmoids_less_the_teachers_entropy():
    s, t = torch.randn(7, 3), torch.randn(7, 3)
    p = (t / 3).sigmoid()
    cross = F.binary_cross_entropy_with_logits(s / 3, p, reduction="none")
    entropy = F.binary_cross_entropy(p, p, reduction="none")
    expected = 9 * (cross - entropy).sum(1).mean()
    torch.testing.assert_close(logits_loss(s, t, 3.0, "binary"), expected)
    extreme = torch.tensor([[200.0, -200.0]], requires_grad=True)
    logits_loss(extreme, -extreme.detach(), 1.0, "binary").backward()
    assert extreme.grad.isfinite().all()


def test_ignored_positions_have_no_influence():
    s, t = torch.randn(4, 6, 5, requires_grad=True), torch.randn(4, 6, 5)
    ignored = torch.rand(4, 6) < 0.5
    loss = logits_loss(s, t, ignored=ignored)
    torch.testing.assert_close(loss, logits_loss(s[~ignored], t[~ignored]))
    loss.backward()
    assert (s.grad[ignored] == 0).all()
    assert (s.grad[~ignored] != 0).any()
    nothing = logits_loss(s, t, ignored=torch.ones(4, 6, dtype=torch.bool))
    assert nothing == 0
    nothing.backward()


def test_classes_that_the_teacher_rules_out():
    s, t = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    t[:, 2] = -torch.inf
    loss = logits_loss(s, t)
    loss.backward()
    assert loss.isfinite()
    assert s.grad.isfinite().all()
    both = s.detach().clone()
    both[:, 2] = -torch.inf
    both.requires_grad_()
    loss = logits_loss(both, t)
    loss.backward()
    assert loss.isfinite()
    assert both.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_losses_are_float32_for_every_dtype_and_nothing_for_no_rows(dtype):
    s, t = torch.randn(4, 5).to(dtype), torch.randn(4, 5).to(dtype)
    maps = torch.rand(2, 3, 4, 4).softmax(-1).to(dtype)
    for loss, empty in (
        (logits_loss(s, t), logits_loss(s[:0], t[:0])),
        (hidden_loss(s, t), hidden_loss(s[:0], t[:0])),
        (attention_loss(maps, maps), attention_loss(maps[:0], maps[:0])),
    ):
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert empty == 0


def test_hidden_is_relative_and_defined_for_a_teacher_of_zeros():
    s, t = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(hidden_loss(100 * s, 100 * t), hidden_loss(s, t))
    torch.testing.assert_close(hidden_loss(torch.zeros(3, 4), t), torch.tensor(1.0))
    torch.testing.assert_close(hidden_loss(s, torch.zeros(3, 4)), s.square().mean())


def test_attention_of_other_head_counts_and_with_exact_zeros():
    few, many = torch.rand(2, 1, 4, 4).softmax(-1), torch.rand(2, 6, 4, 4).softmax(-1)
    torch.testing.assert_close(attention_loss(few, many), attention_loss(few, many.mean(1, keepdim=True)))
    causal = torch.rand(1, 2, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf).softmax(-1)
    scores = torch.randn(1, 2, 4, 4, requires_grad=True)
    loss = attention_loss(F.dropout(scores.softmax(-1), 0.5), causal)
    loss.backward()
    assert loss.isfinite()
    assert scores.grad.isfinite().all()


# ---------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 1.5}, "distill.weight must be a number of 0 to 1"),
        ({"weight": "much"}, "distill.weight"),
        ({"weight": float("nan")}, "distill.weight"),
        ({"temperature": 0}, "distill.temperature must be positive"),
        ({"temperature": float("inf")}, "distill.temperature"),
        ({"hidden_weight": -1}, "distill.hidden_weight"),
        ({"divergence": "lk"}, "did you mean 'kl'"),
        ({"class_dim": 1.0}, "distill.class_dim"),
        ({"hidden": "blocks.0"}, "distill.hidden must name layers"),
        ({"hidden": {"a": 1.5}}, "distill.hidden must name layers"),
        ({"attention": [""]}, "distill.attention must name layers"),
        ({"temprature": 2}, "did you mean 'temperature'"),
        ({"weight": 0}, "nothing to learn from"),
        ({"weight": 0, "hidden": ["a"], "hidden_weight": 0}, "nothing to learn from"),
    ],
)
def test_plans_that_make_no_sense(options, message):
    with pytest.raises(ConfigError, match=message):
        Distillation.from_dict(options)


def test_a_plan_survives_plain_values_and_weighs_its_parts():
    plan = Distillation(weight=0.75, hidden=["a", "b"], hidden_weight=2.0, attention={"c": "d"}, attention_weight=3.0)
    assert plan.hidden == {"a": "a", "b": "b"}
    assert Distillation(hidden=[2, "4"]).hidden == {"2": "2", "4": "4"}
    assert Distillation.from_dict(plan.to_dict()) == plan
    task, one = torch.tensor(8.0), torch.tensor(1.0)
    assert plan.combine(task, {"logits": one, "hidden": one, "attention": one}) == 0.25 * 8 + 0.75 + 2 + 3
    alone = Distillation(weight=1.0).combine(torch.tensor(float("nan")), {"logits": one})
    assert alone == 1  # labels that do not count may be missing


def test_class_dim():
    assert class_dim(torch.zeros(4, 10)) == 1
    assert class_dim(torch.zeros(10)) == 0
    assert class_dim(torch.zeros(4, 7, 10), None, -1) == 2
    with pytest.raises(ConfigError, match=r"set distill\.class_dim"):
        class_dim(torch.zeros(4, 10, 10), torch.zeros(4, 10))
    with pytest.raises(ConfigError, match=r"set distill\.class_dim"):
        class_dim(torch.zeros(4, 7, 10))
    with pytest.raises(ConfigError, match=r"distill\.class_dim is 3"):
        class_dim(torch.zeros(4, 7, 10), None, 3)


# ---------------------------------------------------------------------------------------------------- watching


@pytest.mark.parametrize("state", ["prepared", "training", "deployed"])
def test_a_quantized_network_shows_what_the_float_one_shows(state):
    """Absorbed activation functions included: a block's output is never negative, whoever computes the ReLU."""
    x = torch.randn(16, 1, 16, 16)
    net = ResidualNet(width=4, stages=2)
    for norm in net.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0  # so that the running statistics are those of this batch, as in training
    with torch.no_grad():
        net(x)
    net.eval()
    names = ["stem", "stem.2", "blocks.0", "blocks.0.body.0", "blocks.0.body.0.2", "blocks.1", "pool"]
    other = prepared(net, x)
    if state == "deployed":
        other, _ = qat.convert(other, [x])
    if state == "training":
        net.train(), other.train()
    with torch.no_grad():
        with watching(net, names) as expected:
            net(x)
        with watching(other, names) as found:
            other(x)
    assert expected.keys() == found.keys() == {f"hidden/{name}/0" for name in names}
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm()
        assert error < 0.1, (name, error)
        assert found[name].min() >= 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())


def test_saved_and_loaded_networks_show_the_same(tmp_path):
    x = torch.randn(16, 6)
    deployed, _ = qat.convert(prepared(mlp(), x), [x])
    qat.save(deployed, tmp_path / "saved")
    loaded = qat.load(tmp_path / "saved", mlp())
    with watching(deployed, ["1", "3"]) as one, watching(loaded, ["1", "3"]) as two:
        assert torch.equal(deployed(x), loaded(x))
    assert one.keys() == two.keys()
    for name in one:
        assert torch.equal(one[name], two[name])
        assert one[name].min() >= 0


def test_codes_between_chained_layers_carry_the_gradient():
    """The first layer emits codes; a loss on them reaches its weight as a loss on their values would."""
    x = torch.randn(32, 6)
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5))
    rules = {"rules": [{"match": {"name": "0"}, "weight": {"format": "int8"}, "input": {"format": "int8"},
                        "output": {"format": "int8"}},
                       {"match": {"type": "Linear"}, "weight": {"format": "int8"}, "input": {"format": "int8"}}],
             "edges": "same"}  # fmt: skip
    net = prepared(net, x, rules).train()
    seen = []
    handle = net[0].register_forward_hook(lambda module, args, output: seen.append(output))
    with watching(net, ["0"]) as said:
        net(x)
    handle.remove()
    assert isinstance(seen[0], qat.QuantizedTensor)
    value = said["hidden/0/0"]
    assert torch.equal(value, seen[0].dequantize())
    hidden_loss(value, torch.zeros_like(value)).backward()
    grad = net[0].weight.grad
    reference = nn.Linear(6, 8)
    reference.load_state_dict({k: net[0].state_dict()[k] for k in ("weight", "bias")})
    y = reference(x)
    y.square().mean().backward()
    assert (grad - reference.weight.grad).norm() < 0.1 * reference.weight.grad.norm()
    assert net[2].weight.grad is None


def test_an_activation_inside_the_codes_is_refused_by_the_wrong_name_and_seen_by_the_right_one():
    x = torch.randn(32, 6)
    rules = {"rules": [{"match": {"type": "Linear"}, "weight": {"format": "int8"}, "input": {"format": "uint8"},
                        "output": {"format": "uint8"}}], "edges": "same"}  # fmt: skip
    # the first layer and its activation function stand in different blocks
    net = nn.Sequential(nn.Sequential(nn.Linear(6, 8)), nn.Sequential(nn.ReLU(), nn.Linear(8, 5)))
    made = prepared(net, x, rules)
    assert made[0][0].plan.output_absorbs
    with pytest.raises(ConfigError, match="name that activation function"), watching(made, ["0"]):
        made(x)
    with watching(made, ["1.0"]) as said, watching(net, ["1.0"]) as expected:
        made(x), net(x)
    torch.testing.assert_close(said["hidden/1.0/0"], expected["hidden/1.0/0"], atol=0.05, rtol=0.05)
    teacher = mlp()
    with pytest.raises(ConfigError, match="name that activation function"):
        Distiller({"weight": 0, "hidden": {"0.0": "0"}}, teacher, made, x)


def test_a_folded_batch_norm_of_the_teacher_is_named():
    x = torch.randn(8, 1, 16, 16)
    net = ResidualNet(width=4, stages=2)
    deployed, _ = qat.convert(prepared(net, x), [x])
    with pytest.raises(ConfigError, match=r"stem\.0 of the teacher holds the batch norm behind it; name stem\.1"):
        Distiller({"hidden": ["stem.0"]}, deployed, ResidualNet(width=4, stages=2), x)
    Distiller({"hidden": ["stem.1"]}, deployed, ResidualNet(width=4, stages=2), x)


def test_values_are_kept_before_they_are_overwritten():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    x = torch.randn(8, 4)
    with watching(net, ["0", "1"]) as said:
        net(x)
    assert torch.equal(said["hidden/0/0"], net[0](x))
    assert torch.equal(said["hidden/1/0"], net[0](x).relu())


def test_modules_that_run_twice_and_outputs_that_are_tuples():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.rnn, self.head = nn.Linear(4, 4), nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 3)

        def forward(self, x, passes=2):
            for _ in range(passes):
                x = self.shared(x)
            return self.head(self.rnn(x)[0])

    x = torch.randn(2, 5, 4)
    student, teacher = Twice(), Twice()
    distiller = Distiller({"hidden": ["shared", "rnn"], "class_dim": -1}, teacher, student, x)
    output, parts = distiller(student, x)
    with watching(student, ["shared", "rnn"]) as mine, watching(teacher, ["shared", "rnn"]) as theirs:
        student(x), teacher(x)
    assert list(mine) == ["hidden/shared/0", "hidden/shared/1", "hidden/rnn/0"]
    expected = torch.stack([hidden_loss(mine[name], theirs[name]) for name in mine]).mean()
    torch.testing.assert_close(parts["hidden"], expected)
    with watching(student, ["shared", "rnn"]) as said:
        student(x, passes=1)
    with pytest.raises(ConfigError, match="shared ran 1 times in the student and shared 2 times in the teacher"):
        distiller.losses(output, said, distiller.ask(x))


# ---------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("arguments", [{}, {"need_weights": False}, {"average_attn_weights": False}])
@pytest.mark.parametrize("positional", [False, True])
def test_attention_maps_are_seen_and_the_caller_gets_what_it_asked_for(arguments, positional):
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    net = nn.ModuleDict({"attention": layer})
    x = torch.randn(3, 4, 8)
    defaults = {"key_padding_mask": None, "need_weights": True, "attn_mask": None, "average_attn_weights": True}

    def call():
        if positional:
            return layer(x, x, x, *(defaults | arguments).values())
        return layer(x, x, x, **arguments)

    expected, maps = call()
    with watching(net, attention=["attention"]) as said:
        output, found = call()
    torch.testing.assert_close(output, expected)
    assert (maps is None) == (found is None)
    if maps is not None:
        torch.testing.assert_close(found, maps)
    assert said["attention/attention/0"].shape == (3, 2, 4, 4)
    said["attention/attention/0"].square().sum().backward()
    assert layer.in_proj_weight.grad[:8].abs().sum() > 0


def encoder(layers, heads, width=8):
    layer = nn.TransformerEncoderLayer(width, heads, 16, dropout=0.1, batch_first=True)

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoder(layer, layers)
            self.head = nn.Linear(width, 5)

        def forward(self, x, padding=None):
            return self.head(self.encoder(x, src_key_padding_mask=padding))

    torch.manual_seed(layers)
    return Tagger()


def test_transformers_of_other_depth_learn_attention_and_ignore_padding():
    x, padding = torch.randn(3, 6, 8), torch.arange(6) >= torch.tensor([[6], [4], [2]])
    target = torch.randint(5, (3, 6)).masked_fill(padding, -100)
    student, teacher = encoder(2, 2), encoder(4, 4)
    distiller = Distiller({"attention": "auto"}, teacher, student, {"x": x, "padding": padding})
    assert distiller.attention == {
        "encoder.layers.0.self_attn": "encoder.layers.1.self_attn",
        "encoder.layers.1.self_attn": "encoder.layers.3.self_attn",
    }
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    values = []
    for _ in range(30):
        _, parts = distiller(student.eval(), {"x": x, "padding": padding}, target)
        optimizer.zero_grad()
        parts["attention"].backward()
        optimizer.step()
        values.append(parts["attention"].item())
    assert values[-1] < 0.5 * values[0]
    with torch.no_grad():
        output, parts = distiller(student, {"x": x, "padding": padding}, target)
        kept = ~padding
        told = distiller.ask({"x": x, "padding": padding})
        expected = logits_loss(output[kept], told["logits"][kept])
    torch.testing.assert_close(parts["logits"], expected)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("state", ["prepared", "deployed"])
def test_quantized_transformers_show_their_attention_and_teach_it(state):
    x = torch.randn(8, 6, 8)
    net = encoder(2, 2).eval()
    quantized = prepared(net, x, "w8a8")
    if state == "deployed":
        quantized, _ = qat.convert(quantized, [x])
    names = ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn"]
    with torch.no_grad(), watching(net, attention=names) as expected, watching(quantized, attention=names) as found:
        net(x), quantized(x)
    assert expected.keys() == found.keys()
    for name, maps in expected.items():
        assert maps.shape == (8, 2, 6, 6)
        torch.testing.assert_close(found[name], maps, atol=0.03, rtol=0)
    student = prepared(net, x, "w4a8").train()
    distiller = Distiller({"attention": "auto", "weight": 0}, quantized, student, x)
    _, parts = distiller(student, x)
    parts["attention"].backward()
    for layer in student.encoder.layers:
        assert layer.self_attn.in_proj_weight.grad[:16].abs().sum() > 0


def test_a_compiled_network_shows_its_layers():
    net, x = mlp(), torch.randn(4, 6)
    net.compile(backend="eager")
    net(x)
    with watching(net, ["1"]) as said:
        net(x)
    assert torch.equal(said["hidden/1/0"], net[0](x).relu())
    torch._dynamo.reset()


def test_names_are_those_of_the_network_itself_whatever_is_wrapped_around_it():
    net, x = mlp(), torch.randn(4, 6)
    wrapped = torch.compile(net, backend="eager")
    distiller = qat.Distiller({"hidden": ["1"]}, torch.compile(mlp(hidden=12), backend="eager"), wrapped, x)
    assert distiller.check(net) is None
    with watching(wrapped, ["1"]) as said:
        wrapped(x)
    assert torch.equal(said["hidden/1/0"], net[0](x).relu())
    output, parts = distiller(wrapped, x)
    assert torch.equal(output, net(x))
    assert parts.keys() == {"logits", "hidden"}
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_teacher_of_torchscript_teaches_its_logits_alone():
    student, teacher, x = mlp(), mlp(hidden=12).eval(), torch.randn(4, 6)
    for compiled in (torch.jit.trace(copy.deepcopy(teacher), x), torch.jit.script(copy.deepcopy(teacher))):
        distiller = qat.Distiller({}, compiled, student, x)
        assert not any(p.requires_grad for p in compiled.parameters())
        assert torch.equal(distiller.ask(x)["logits"], teacher(x))
        with pytest.raises(ConfigError, match="compiled by TorchScript"):
            qat.Distiller({"hidden": ["1"]}, compiled, student, x)


def test_maps_of_a_softmax_module_and_what_is_no_map():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.softmax = nn.Linear(8, 8), nn.Linear(8, 8), nn.Softmax(-1)

        def forward(self, x):
            scores = self.q(x).unsqueeze(1) @ self.k(x).unsqueeze(1).transpose(-1, -2)
            return (self.softmax(scores).squeeze(1) @ x).mean(1)

    x = torch.randn(3, 4, 8)
    distiller = Distiller({"attention": ["softmax"]}, Attention(), Attention(), x)
    _, parts = distiller(Attention(), x)
    assert parts["attention"] > 0
    with pytest.raises(ConfigError, match="not between 0 and 1"):
        Distiller({"attention": ["q"]}, Attention(), Attention(), x)
    with pytest.raises(ConfigError, match="returns no attention map"):
        Distiller({"attention": ["0"]}, mlp(), mlp(), torch.randn(3, 6))
    with pytest.raises(ConfigError, match=r"has no nn\.MultiheadAttention"):
        Distiller({"attention": "auto"}, mlp(), mlp(), torch.randn(3, 6))


# ---------------------------------------------------------------------------------------------------- the driver


def test_the_teacher_stays_out_of_everything():
    x = torch.randn(4, 6)
    student, teacher = mlp(), mlp(16).train()
    before = copy.deepcopy(teacher.state_dict())
    distiller = Distiller({"hidden": ["1", "3"]}, teacher, student, x)
    module = nn.ModuleDict({"student": student, "distiller": distiller})
    owned = {"distiller.projections.1.weight", "distiller.projections.3.weight"}
    assert {n for n in module.state_dict() if n.startswith("distiller")} == owned
    assert {n for n, _ in module.named_parameters() if n.startswith("distiller")} == owned
    module.train()
    assert not any(m.training for m in teacher.modules())
    optimizer = torch.optim.AdamW(module.parameters(), 0.1, weight_decay=0.1)
    for _ in range(3):
        output, parts = distiller(student, x, torch.arange(4))
        optimizer.zero_grad()
        distiller.combine(F.cross_entropy(output, torch.arange(4)), parts).backward()
        optimizer.step()
    assert all(torch.equal(before[n], v) for n, v in teacher.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(p.grad is not None for p in module.parameters())
    module.to(torch.float64)
    assert distiller.teacher is teacher
    assert next(teacher.parameters()).dtype == torch.float64
    output, parts = distiller(student, x.double())
    assert parts["hidden"].isfinite()
    for copied in (copy.deepcopy(distiller), pickle.loads(pickle.dumps(distiller))):
        assert copied.teacher is not teacher
        assert torch.equal(copied.ask(x.double())["logits"], distiller.ask(x.double())["logits"])
    distiller.release()
    assert distiller.teacher is None
    with pytest.raises(ConfigError, match="no teacher any more"):
        distiller(student, x.double())


def test_projections_bridge_one_dimension_and_leave_the_random_state_alone():
    x = torch.randn(3, 1, 16, 16)
    student, teacher = ResidualNet(width=4, stages=2), ResidualNet(width=6, stages=2)
    state = torch.random.get_rng_state()
    one, two = (Distiller({"hidden": ["blocks.0", "blocks.1", "pool"]}, teacher, student, x) for _ in range(2))
    other = Distiller({"hidden": ["blocks.0"]}, teacher, student, x, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert {n: tuple(p.shape) for n, p in one.projections.named_parameters()} == {
        "blocks/0.weight": (6, 4), "blocks/1.weight": (12, 8), "pool.weight": (12, 8),
    }  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))
    assert not torch.equal(next(one.parameters()), next(other.parameters()))
    value = torch.randn(2, 4, 5, 5)
    expected = torch.einsum("oi,nihw->nohw", one.projections["blocks/0"].weight, value)
    torch.testing.assert_close(one.projections["blocks/0"](value), expected)


def test_equal_widths_need_no_projection_and_the_teachers_own_twin_is_perfect():
    x = torch.randn(4, 6)
    teacher = mlp()
    distiller = Distiller({"hidden": ["1", "3"]}, teacher, copy.deepcopy(teacher), x)
    assert not list(distiller.parameters())
    _, parts = distiller(copy.deepcopy(teacher), x)
    assert parts["hidden"] == 0
    assert parts["logits"].abs() < 1e-6


def test_looking_at_a_student_moves_none_of_its_ranges():
    x = torch.randn(16, 6)
    student = prepared(mlp(), x).train()
    qat.set_observing(student, True)
    before = {n: v.clone() for n, v in student.state_dict().items()}
    Distiller({"hidden": ["1"]}, mlp(16), student, 1000 * x)
    assert all(torch.equal(before[n], v) for n, v in student.state_dict().items())
    assert student.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_teacher_of_another_dtype(dtype):
    """Half precision saves the memory of a large teacher; the student and its data stay as they are."""
    torch.manual_seed(0)
    layers = nn.Linear(6, 12), nn.LayerNorm(12), nn.Linear(12, 3)
    x, target = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    narrow = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    parts = []
    for teacher in (nn.Sequential(*layers), copy.deepcopy(nn.Sequential(*layers)).to(dtype)):
        distiller = qat.Distiller({"hidden": ["1"]}, teacher, narrow, x)
        parts.append(distiller(narrow, x, target)[1])
        for precision in (None, torch.bfloat16):
            with torch.autocast("cpu", precision, enabled=precision is not None):
                told = distiller.ask(x)["logits"].dtype
            assert told == (precision if precision and teacher[0].weight.dtype == torch.float32
                            else teacher[0].weight.dtype)  # fmt: skip
    for name, value in parts[0].items():
        torch.testing.assert_close(parts[1][name], value, rtol=0.05, atol=1e-3)
        parts[1][name].backward(retain_graph=True)
    distiller = qat.Distiller({}, nn.Sequential(*layers), copy.deepcopy(narrow).to(dtype), x.to(dtype))
    assert distiller.ask(x.to(dtype))["logits"].dtype == torch.float32


def test_a_prepared_teacher_does_not_observe():
    x = torch.randn(16, 6)
    teacher = prepared(mlp(), x)
    qat.set_observing(teacher, True)
    before = {n: v.clone() for n, v in teacher.state_dict().items()}
    Distiller({}, teacher, mlp(), x).ask(1000 * x)
    assert all(torch.equal(before[n], v) for n, v in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("options", "student", "teacher", "message"),
    [
        ({"hidden": ["4.x"]}, mlp(), mlp(), "there is no layer '4.x'"),
        ({"hidden": {"1": "one"}}, mlp(), mlp(), "there is no layer 'one'"),
        ({"hidden": {"1": "4"}, "weight": 0}, nn.Sequential(nn.Flatten(), nn.Unflatten(1, (2, 3))), mlp(),
         "a projection bridges one dimension only"),
        ({}, mlp(classes=3), mlp(), "must have the same classes"),
        ({}, mlp(classes=1), mlp(classes=1), "a softmax over one class teaches nothing"),
        ({}, nn.LSTM(6, 5), mlp(), "the student returns a tuple"),
        ({"hidden": ["1"]}, mlp(), None, "shares weights"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_at_once(options, student, teacher, message):
    with pytest.raises(ConfigError, match=message):
        Distiller(options, teacher or student, student, torch.randn(2, 6))


def test_hidden_layers_need_an_example():
    with pytest.raises(ConfigError, match="needs example_inputs"):
        Distiller({"hidden": ["1"]}, mlp(), mlp())
    output, parts = Distiller({"weight": 0.5}, mlp(), mlp())(mlp(), torch.randn(2, 6))
    assert output.shape == (2, 5)
    assert set(parts) == {"logits"}


def test_regression_and_outputs_with_logits():
    class Output(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(classes=1)

        def forward(self, values):
            return type("Output", (), {"logits": self.net(values)})()

    student, teacher = Output(), Output()
    x = torch.randn(4, 6)
    output, parts = Distiller({"divergence": "mse"}, teacher, student, {"values": x})(student, {"values": x})
    torch.testing.assert_close(parts["logits"], F.mse_loss(output, teacher.net(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("spec", ["w8a8", "w2a2", "w1a8", "w8a8_dynamic", "w4a16"])
def test_quantized_twins_learn_in_every_precision(spec, dtype, autocast):
    """From a deployed teacher, too: losses are finite, every weight gets a gradient, prepared equals deployed."""
    x = torch.randn(32, 16)
    net = mlp(16, inputs=16).to(dtype)
    x = x.to(dtype)
    teacher, _ = qat.convert(prepared(copy.deepcopy(net), x), [x])
    student = prepared(net, x, spec).train()
    distiller = Distiller({"hidden": ["1", "3"]}, teacher, student, x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output, parts = distiller(student, x)
        distiller.combine(output.float().square().mean(), parts).backward()
    for layer in (0, 2, 4):
        assert student[layer].weight.grad.isfinite().all()
        assert student[layer].weight.grad.abs().sum() > 0
    deployed, _ = qat.convert(student.eval(), [x])
    with torch.no_grad():
        assert torch.equal(deployed(x), student(x))
    assert not [name for name in deployed.state_dict() if "projection" in name]
