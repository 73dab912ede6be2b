"""Channels that leave: dependency groups, proof against a model that does not read them, and shapes on disk."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

import qat
from qat.compression.channels import pruned_shapes, take_shapes
from qat.errors import CheckpointError, PruneError
from qat.training import QuantizedTraining
from qat.training.models import MLP, ResidualNet


class Wired(nn.Module):
    """Everything a group can run through: depthwise, concatenation, a squeeze-and-excite gate, flatten into linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.act = nn.Conv2d(8, 16, 3, padding=1, groups=8), nn.PReLU(16)
        self.side, self.squeeze, self.excite = nn.Conv2d(3, 6, 1), nn.Conv2d(22, 4, 1), nn.Conv2d(4, 22, 1)
        self.up = nn.ConvTranspose2d(22, 6, 2, stride=2)
        self.pool, self.head = nn.MaxPool2d(4), nn.Linear(6 * 9, 10)

    def forward(self, x: Tensor) -> Tensor:
        a = self.act(self.depthwise(F.relu(self.norm(self.stem(x)))))
        both = torch.cat([a, torch.sigmoid(self.side(x))], dim=1)
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(both, 1)))))
        return self.head(torch.flatten(self.pool(self.up(both * gate)), 1))


def groups(report: qat.ChannelReport) -> dict[tuple[str, ...], tuple[int, int]]:
    return {tuple(sorted(g.layers)): (g.before, g.after) for g in report.groups}


def reasons(report: qat.ChannelReport) -> dict[str, str]:
    return {name: g.reason for g in report.groups for name in g.layers if g.reason}


def test_every_kind_of_dependency() -> None:
    model, x = zoo.batch_norms_of_any_sign(Wired()).eval(), torch.randn(2, 3, 6, 6)
    cut, report = qat.prune_channels(model, x)
    assert groups(report) == {("stem",): (8, 8), ("side",): (6, 6), ("squeeze",): (4, 2), ("excite",): (22, 22),
                              ("up",): (6, 3), ("head",): (10, 10)}  # fmt: skip
    assert reasons(report)["stem"] == "combined with channels that are arranged in another way", "two layers, one gate"
    assert reasons(report)["head"] == "the model returns them"
    assert cut.head.in_features == 3 * 9
    assert cut.head.weight.shape == (10, 27)
    assert cut.up.out_channels == 3
    assert cut.squeeze.out_channels == cut.excite.in_channels == 2
    assert cut(x).shape == (2, 10)
    assert model.head.in_features == 54, "the caller's model is not changed"


def test_depthwise_and_concatenation_follow() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(8, 16, 3, groups=8)
            self.norm, self.last = nn.BatchNorm2d(20), nn.Conv2d(20, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(torch.cat((self.depthwise(self.a(x)), self.b(x)[:, :, 1:-1, 1:-1]), 1)))

    class Padded(Joined):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(torch.cat((self.depthwise(F.pad(self.a(x), (1, 1, 1, 1))), self.b(x)), 1)))

    x = torch.randn(2, 3, 5, 5)
    cut, report = qat.prune_channels(Padded().eval(), x)
    assert groups(report) == {("a",): (8, 4), ("b",): (4, 2), ("last",): (5, 5)}
    assert (cut.depthwise.groups, cut.depthwise.in_channels, cut.depthwise.out_channels) == (4, 4, 8)
    assert cut.norm.num_features == 10
    assert cut.last.in_channels == 10
    _, report = qat.prune_channels(Joined().eval(), x)
    assert groups(report)[("b",)] == (4, 4)
    assert "getitem" in reasons(report)["b"], "slices are not understood, and said"


@pytest.mark.parametrize("name", ["mlp", "conv", "1d", "3d", "residual"])
@pytest.mark.parametrize("recipe", ["w8a8", "w4a4"])
def test_cut_models_quantize_and_load_onto_the_unpruned_skeleton(name: str, recipe: str, tmp_path: Any) -> None:
    x = zoo.inputs(name, 3)
    cut, report = qat.prune_channels(zoo.build(name).eval(), x)
    assert report.parameters_after < report.parameters_before
    prepared, deployed = zoo.assert_parity(cut, recipe, x)
    qat.save(deployed, tmp_path / "out")
    whole = zoo.build(name)
    loaded = qat.load(tmp_path / "out", whole)
    assert torch.equal(loaded(x), prepared(x))
    assert {n: p.shape for n, p in whole.named_parameters()} == {n: p.shape for n, p in
                                                                  zoo.build(name).named_parameters()}
    qat.save(loaded, tmp_path / "again")
    for file in ("manifest.json", "model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    assert torch.equal(qat.load(tmp_path / "out", zoo.build(name))(x), loaded(x))


def test_removing_channels_is_not_reading_them() -> None:
    """The definition, checked by hand on an MLP with a function that is not zero at zero."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Sigmoid(), nn.Linear(6, 4))
    x = torch.randn(7, 5)
    cut, _ = qat.prune_channels(model, x, sparsity=0.5)
    gone = [i for i in range(6) if not any(torch.equal(model[0].weight[i], row) for row in cut[0].weight)]
    assert len(gone) == 3
    with torch.no_grad():
        model[2].weight[:, gone] = 0
    torch.testing.assert_close(cut(x), model(x))


def test_the_least_important_channels_leave() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1, 1))
        model[1].weight.copy_(torch.tensor([1.0, 0.0, 1.0, 0.01]))
        model[3].weight.fill_(1.0)
    cut, _ = qat.prune_channels(model.eval(), torch.randn(1, 1, 2, 2))
    assert cut[0].weight.flatten().tolist() == [1.0, 3.0]


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.hidden = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 16)
        self.last = nn.Linear(16, 8)
        self.grouped, self.head = nn.Linear(8, 4), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h = h + self.last(F.gelu(self.hidden(self.norm(h))))
        return self.head(h) + self.grouped(h).chunk(2, -1)[0].sum(-1, keepdim=True)


def test_what_mixes_channels_is_left_and_said() -> None:
    _, report = qat.prune_channels(Normed(), torch.randn(2, 5, 6))
    said = reasons(report)
    assert groups(report)[("hidden",)] == (16, 8)
    assert "LayerNorm norm mixes them" in said["first"] == said["last"]
    assert "chunk" in said["grouped"]
    assert said["head"] == "the model returns them"
    assert "hidden: 16 -> 8 channels" in str(report)


def test_grouped_convolutions_and_weights_read_as_functions_are_left() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.grouped, self.b = nn.Conv1d(2, 8, 1), nn.Conv1d(8, 8, 1, groups=2), nn.Conv1d(8, 4, 1)
            self.c, self.d = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.b(self.grouped(self.a(x))).mean(-1)
            return self.d(torch.tanh(self.c(y))) + F.linear(y, self.c.weight[:4])

    with pytest.raises(PruneError, match="grouped convolution"):
        qat.prune_channels(Odd(), torch.randn(2, 2, 3))


def test_a_model_that_counts_its_channels_is_not_broken() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)
            self.c, self.d = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.a(x))
            y = self.b(h / float(h.shape[-1]))          # its own width enters the result
            return self.d(torch.relu(self.c(y)))

    _, report = qat.prune_channels(Counts(), torch.randn(3, 4))
    assert reasons(report)["a"] == "without them the rest would compute something else"
    assert groups(report)[("c",)] == (8, 4)


def test_shared_layers_and_options() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.same, self.b = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.same(torch.relu(self.same(torch.relu(self.a(x)))))))

    cut, _ = qat.prune_channels(Twice(), torch.randn(2, 4), sparsity=0.6, multiple_of=2)
    assert cut.a.out_features == 4, "3 of 8, rounded up to a multiple of 2"
    with pytest.raises(PruneError, match="a, same: too few for multiple_of"):
        qat.prune_channels(Twice(), torch.randn(2, 4), multiple_of=8)
    cut, _ = qat.prune_channels(Twice(), torch.randn(2, 4), sparsity=0.3)
    assert cut.same.weight.shape == (6, 6), "its inputs are its own outputs"
    model = Twice()
    same, _ = qat.prune_channels(model, torch.randn(2, 4), inplace=True)
    assert same is model
    assert model.a.out_features == 4
    with pytest.raises(PruneError, match="no layer, did you mean 'same'"):
        qat.prune_channels(Twice(), torch.randn(2, 4), exclude=["sam"])
    with pytest.raises(PruneError, match="excluded"):
        qat.prune_channels(Twice(), torch.randn(2, 4), exclude=["*"])
    with pytest.raises(PruneError, match="from 0 to below 1"):
        qat.prune_channels(Twice(), torch.randn(2, 4), sparsity=1.0)
    for wrong, message in (({"sparsity": "0.5"}, "share of weights"), ({"multiple_of": 1.5}, "whole number"),
                           ({"exclude": "same"}, "list of layer names")):
        with pytest.raises(PruneError, match=message):
            qat.prune_channels(Twice(), torch.randn(2, 4), **wrong)
    prepared = qat.prepare(Twice(), "w8a8", torch.randn(2, 4))
    with pytest.raises(PruneError, match="prepared"):
        qat.prune_channels(prepared, torch.randn(2, 4))


def test_ties_dtypes_frozen_parameters_and_hooks_stay() -> None:
    tied = zoo.Tied(vocabulary=11, width=8)
    tied.norm = nn.Identity()
    tied.body.weight.requires_grad_(False)
    cut, report = qat.prune_channels(tied, torch.randint(0, 11, (2, 6)))
    assert cut.head.weight is cut.table.weight
    assert cut.table.weight.shape == (11, 4) or reasons(report)
    assert not cut.body.weight.requires_grad
    half, _ = qat.prune_channels(MLP(16, (8,)).to(torch.bfloat16), torch.randn(2, 16, dtype=torch.bfloat16))
    assert half[1].weight.dtype == torch.bfloat16
    assert half[1].out_features == 4
    last = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)).to(memory_format=torch.channels_last)
    cut, _ = qat.prune_channels(last, torch.randn(1, 2, 4, 4))
    assert cut[0].weight.is_contiguous(memory_format=torch.channels_last)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 8),
                           nn.ReLU(), nn.Linear(8, 2))  # fmt: skip
    cut, report = qat.prune_channels(normed, torch.randn(2, 4))
    assert groups(report) == {("2",): (8, 4), ("4",): (2, 2)}


def test_shapes_are_checked_before_they_are_taken(tmp_path: Any) -> None:
    x = torch.randn(2, 1, 8, 8)
    cut, _ = qat.prune_channels(ResidualNet(width=4, stages=2).eval(), x)
    shapes = pruned_shapes(cut)
    again = take_shapes(ResidualNet(width=4, stages=2), shapes)
    again.load_state_dict(cut.state_dict())
    assert torch.equal(again.eval()(x), cut(x))
    assert pruned_shapes(again) == shapes == pruned_shapes(copy.deepcopy(cut))
    assert pruned_shapes(nn.Sequential(cut)) == {f"0.{n}": s for n, s in shapes.items()}
    for damage in ([9, 1, 3, 3], [2], [0, 1, 3, 3], [2.0, 1, 3, 3]):
        with pytest.raises(PruneError, match="cannot become"):
            take_shapes(ResidualNet(width=4, stages=2), {"stem.0.weight": damage})
    with pytest.raises(PruneError, match="does not have"):
        take_shapes(ResidualNet(width=4, stages=2), {"trunk.weight": [1]})
    _, deployed = zoo.assert_parity(cut, "w8a8", x)
    qat.save(deployed, tmp_path / "out")
    with pytest.raises(CheckpointError, match="does not fit this architecture"):
        qat.load(tmp_path / "out", ResidualNet(width=4, stages=1))
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"pruned_shapes": ["stem"]}))
    with pytest.raises(CheckpointError, match="pruned_shapes"):
        qat.load(tmp_path / "out", ResidualNet(width=4, stages=2))
    path.write_text(json.dumps({k: v for k, v in manifest.items() if k != "pruned_shapes"}))
    with pytest.raises(CheckpointError, match="shape"):
        qat.load(tmp_path / "out", ResidualNet(width=4, stages=2))


def test_the_training_module_rebuilds_a_cut_network() -> None:
    config = {"_target_": "qat.training.models.ResidualNet", "width": 4, "stages": 2}
    x = torch.randn(2, 1, 8, 8)
    cut, _ = qat.prune_channels(ResidualNet(width=4, stages=2).eval(), x)
    module = QuantizedTraining(config, recipe=qat.Recipe.preset("w8a8").to_dict(), pruned_shapes=pruned_shapes(cut))
    module.configure_model()
    assert module.network is not None
    module.network.load_state_dict(cut.state_dict(), strict=False)
    assert module.network.stem[0].out_channels == 2
    json.dumps(dict(module.hparams))


def test_a_gate_follows_the_channels_it_opens() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expand, self.depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
            self.norm, self.squeeze, self.excite = nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
            self.project = nn.Conv2d(8, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = F.hardswish(self.norm(self.depthwise(F.relu6(self.expand(x)))))
            return x + self.project(h * F.hardsigmoid(self.excite(self.squeeze(h.mean((2, 3), keepdim=True)))))

    cut, report = qat.prune_channels(Gated().eval(), torch.randn(2, 3, 4, 4))
    assert groups(report) == {("excite", "expand"): (8, 4), ("squeeze",): (2, 1), ("project",): (3, 3)}
    assert cut.depthwise.groups == cut.excite.out_channels == cut.project.in_channels == 4
