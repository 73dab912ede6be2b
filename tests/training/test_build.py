"""The allow-list of `_target_` strings."""

import functools

import pytest
import torch

from qat.errors import ConfigError
from qat.training.build import allow_targets, build, plain


def test_builds_nested_configs():
    layer = {"_target_": "torch.nn.Linear", "in_features": 4, "out_features": 2}
    encoder = build({"_target_": "torch.nn.Sequential"})
    assert isinstance(encoder, torch.nn.Sequential)
    assert build(layer, bias=False).bias is None


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.run",
        "builtins.eval",
        "torch.load",
        "torch.hub.load",
        "torch.nn.modules.module.torch.hub.load",  # begins with an allowed prefix, leads elsewhere
        "torch.nn.functional.importlib.import_module",
        "torch.optim.optimizer.functools.partial",
        "qat.pipeline.storage.os.system",
        "qat.training.build.importlib.import_module",
        "torch.nn",
        "torch.nn.",
        "",
    ],
)
def test_refuses_everything_else(target):
    with pytest.raises(ConfigError, match=r"not allowed|has no|names no module"):
        build({"_target_": target})


def test_a_process_may_allow_its_own_package():
    config = {"_target_": "fractions.Fraction", "numerator": 3}
    with pytest.raises(ConfigError, match="not allowed"):
        build(config)
    allow_targets("fractions")
    assert build(config) == 3
    with pytest.raises(ConfigError, match="must name a package"):
        allow_targets("")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_target_": "torch.nn.Lineer"}, "did you mean 'Linear'"),
        ({"_target_": "torch.nn.Linear", "in_feature": 1, "out_features": 1}, "did you mean 'in_features'"),
        ({"_target_": "torch.nn.Linear", "in_features": 1}, "out_features"),
        ({"_target_": "transformers.AutoModel.from_pretrained", "trust_remote_code": True}, "trust_remote_code"),
        ({"in_features": 1}, "needs a `_target_`"),
    ],
)
def test_says_what_is_wrong(config, message):
    with pytest.raises(ConfigError, match=message):
        build(config)


@pytest.mark.parametrize("value", [functools.partial(int), torch.nn.ReLU, torch.zeros(1), object()])
def test_a_stored_config_is_plain(value):
    with pytest.raises(ConfigError, match=r"config\.inner\[1\]"):
        plain({"inner": [1, value]})
