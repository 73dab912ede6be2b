"""Bias correction: what error is left on average goes into the biases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from trained import digits

import qat
from qat.calibration.corrections import mean_error
from qat.calibration.rounding import layer_stops

RECIPES: dict[str, Any] = {
    "w3 weights only": {"rules": [{"weight": "int3"}]},
    "w4 per tensor": {"rules": [{"weight": {"format": "int4", "granularity": "per_tensor"}, "input": "int8"}]},
    "w2": {"rules": [{"weight": {"format": "int2_midrise", "observer": "mse"}, "input": "int8"}]},
}


def mean_outputs(model: nn.Module, batches: list[torch.Tensor], norms: dict[str, str]) -> dict[str, torch.Tensor]:
    """The mean output of each layer for each channel, behind its batch norm if it has one; ``norms``: layer -> norm."""
    means, handles = {}, []
    for name, norm in norms.items():
        handles.append(model.get_submodule(norm or name).register_forward_hook(
            lambda m, a, y, name=name: means.__setitem__(name, y.transpose(0, 1).flatten(1).mean(1)
                                                         if y.dim() == 4 else y.mean(0))))
    with torch.no_grad():
        model(torch.cat(batches))
    for handle in handles:
        handle.remove()
    return means


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("kind", ["cnn", "mlp"])
def test_the_mean_output_of_each_layer_is_the_float_nets(kind: str, recipe: str, tmp_path) -> None:
    task = digits(kind)
    plain, model = task.quantized(RECIPES[recipe], []), task.quantized(RECIPES[recipe], ["bias_correction"])
    names = list(layer_stops(model))
    norms = {n: n[:-1] + "1" if isinstance(task.net.get_submodule(n), nn.Conv2d) else "" for n in names}
    expected, before, after = (mean_outputs(m, task.batches, norms) for m in (task.net, plain, model))
    for name in names:
        was, now = (float((m[name] - expected[name]).norm()) for m in (before, after))
        assert now < 0.02 * was + 1e-6, name
        assert torch.equal(model.get_submodule(name).quantized_weight().codes,
                           plain.get_submodule(name).quantized_weight().codes)
    assert task.error(model) < 0.8 * task.error(plain)
    deployed, certificate = qat.convert(model, task.batches[:1])
    assert certificate.equal
    qat.save(deployed, tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(qat.load(tmp_path / "out", task.net)(task.held_out), model(task.held_out))


def test_a_model_without_an_error_stays_as_it_is() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
    with torch.no_grad():
        net[1].running_mean.normal_()
        for layer in (net[0], net[4]):
            layer.weight.copy_(torch.randn_like(layer.weight).sign() / 2)           # on the sign grid
    model = qat.prepare(net.eval(), {"rules": [{"weight": "binary"}], "calibration": ["bias_correction"]},
                        torch.randn(2, 2, 5, 5))
    qat.calibrate(model, [torch.randn(8, 2, 5, 5) for _ in range(3)])
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in net.state_dict().items())
    assert "mean output error 0 of" in {r.name: r.reason for r in qat.coverage(model).rows}["0"]


def test_where_there_is_no_bias_nothing_is_added_and_coverage_says_so() -> None:
    net = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.LSTM(5, 4, bias=False, batch_first=True))
    model = qat.prepare(net, {"rules": [{"weight": "int3"}], "calibration": ["bias_correction"]}, torch.randn(2, 3, 6))
    qat.calibrate(model, [torch.randn(8, 3, 6)])
    rows = {r.name: r.reason for r in qat.coverage(model).rows}
    assert all("there is no bias to correct" in rows[n] for n in ("0", "2.ih_l0", "2.hh_l0"))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in net.state_dict().items())


def test_parts_of_composites_have_their_share_of_a_stacked_bias_corrected() -> None:
    net = nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        net.in_proj_bias.normal_()
    x = torch.randn(4, 5, 8) + 1
    model = qat.prepare(net.eval(), {"rules": [{"weight": "int2"}], "calibration": ["bias_correction"]}, (x, x, x))
    qat.calibrate(model, [(x, x, x)])
    for i, part in enumerate((model.q, model.k, model.v)):
        rows = slice(8 * i, 8 * i + 8)
        wanted = nn.functional.linear(x, net.in_proj_weight[rows], net.in_proj_bias[rows])
        torch.testing.assert_close(part(x).mean((0, 1)), wanted.mean((0, 1)), rtol=1e-4, atol=1e-5)
    assert not torch.equal(model.in_proj_bias, net.in_proj_bias)


def test_the_mean_error_of_grouped_weights() -> None:
    weight, values = torch.randn(2, 6, 5)
    floats, rows = torch.randn(2, 2, 30, 5)
    wanted, made = (x @ w.reshape(2, 3, 5).transpose(1, 2) for x, w in ((floats, weight), (rows, values)))
    torch.testing.assert_close(mean_error(weight, values, rows.mean(1), floats.mean(1)),
                               (wanted - made).mean(1).flatten())
