"""Small models that the laws are tested on: each with every layer type, odd shape or wiring that could break them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qat


def language_model_folder(folder: Path, **options: Any) -> Path:
    """The folder of a tiny Hugging Face language model with random weights and a real tokenizer of 300 words."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    config = transformers.LlamaConfig(**({
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
    } | options))
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog and then some more"] * 4, trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 5, bias=False), nn.GELU(), nn.Linear(5, 3))


def batch_norms_of_any_sign(model: nn.Module) -> nn.Module:
    """Statistics and affine parameters as after training, with a negative and a zero gamma in every batch norm."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            count = module.num_features
            with torch.no_grad():
                module.weight.copy_(torch.linspace(-1.5, 1.5, count))
                module.weight[count // 2] = 0.0
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.3, 2.0)
    return model


def conv_net() -> nn.Module:
    """Conv, batch norm and ReLU; one strided, one depthwise, one grouped and dilated, one 1x1."""
    return batch_norms_of_any_sign(nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6), nn.BatchNorm2d(6), nn.ReLU6(),
        nn.Conv2d(6, 8, (3, 1), padding=(2, 0), dilation=(2, 1), groups=2), nn.Hardtanh(0.0, 4.0),
        nn.Conv2d(8, 5, 1), nn.Flatten(), nn.Linear(5 * 4 * 4, 4)))


def transposed_net() -> nn.Module:
    return batch_norms_of_any_sign(nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), nn.BatchNorm2d(6), nn.ReLU(),
        nn.ConvTranspose2d(6, 2, 2, padding=2, dilation=3)))


def net_1d() -> nn.Module:
    return batch_norms_of_any_sign(nn.Sequential(
        nn.Conv1d(3, 4, 3, dilation=2, padding="same"), nn.BatchNorm1d(4), nn.ReLU(),
        nn.ConvTranspose1d(4, 3, 3, stride=2),
        nn.Conv1d(3, 2, 3, padding=1, padding_mode="reflect")))


def net_3d() -> nn.Module:
    return batch_norms_of_any_sign(nn.Sequential(
        nn.Conv3d(2, 4, 2, padding=1), nn.BatchNorm3d(4), nn.ReLU(),
        nn.ConvTranspose3d(4, 2, (1, 2, 3), stride=(1, 2, 1)),
        nn.Conv3d(2, 2, 1, padding_mode="circular", padding=(0, 1, 1))))


class Tied(nn.Module):
    """A language model in miniature: the head shares the table of the embedding."""

    def __init__(self, vocabulary: int = 11, width: int = 8) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width, padding_idx=0)
        self.norm = nn.LayerNorm(width)
        self.body = nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(F.gelu(self.body(self.norm(self.table(tokens)))))


class Residual(nn.Module):
    """A residual block: its ReLU is read by a convolution and by an add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.add = qat.Add()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(self.add(x, self.norm(self.conv(x))))
        return self.head(x.mean((2, 3)))


ZOO: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (12,)),
    "conv": (conv_net, (3, 8, 8)),
    "transposed": (transposed_net, (2, 7, 5)),
    "1d": (net_1d, (3, 9)),
    "3d": (net_3d, (2, 3, 4, 5)),
    "tied": (Tied, (6,)),
    "residual": (Residual, (3, 5, 7)),
}
"""Name -> (how to build it, shape of one sample)."""


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return ZOO[name][0]().to(dtype)


def inputs(name: str, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    shape = (batch, *ZOO[name][1])
    return torch.randint(0, 11, shape) if name == "tied" else torch.randn(shape).to(dtype)


def every_layer(weight: Any = "int8", activation: Any = "int8", output: Any = None, **more: Any) -> dict[str, Any]:
    """A recipe with one rule for everything."""
    rule = {k: v for k, v in (("weight", weight), ("input", activation), ("output", output)) if v is not None}
    return {"rules": [rule], **more}


def prepared(model: nn.Module, recipe: Any, batches: Iterable[Any], traced: bool = True) -> nn.Module:
    """The prepared and calibrated model, in eval."""
    batches = list(batches)
    result = qat.prepare(model, recipe, example_inputs=batches[0] if traced else None)
    return qat.calibrate(result, batches).eval()


def assert_parity(model: nn.Module, recipe: Any, x: Any, *others: Any, traced: bool = True) -> tuple[Any, Any]:
    """Prepare on ``x``, convert, and hold both against each other on ``x`` and the other batches, bit for bit."""
    before = prepared(model, recipe, [x], traced)
    after, certificate = qat.convert(before, [x])
    assert certificate.equal
    for batch in (x, *others):
        with torch.no_grad():
            expected, actual = before(batch), after(batch)
        assert torch.equal(expected, actual), float((expected - actual).abs().max())
        assert expected.dtype == actual.dtype
        with torch.enable_grad():
            assert torch.equal(before(batch), expected), "the training path computes something else"
    return before, after
