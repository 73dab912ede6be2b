"""Small reference networks. Every other model comes by its ``_target_``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qat.errors import ConfigError, nearest
from qat.modules.functional import MatMul


class ConvBlock(nn.Sequential):
    """Convolution without bias, batch norm, and (unless the next thing is an addition) a ReLU of its own.

    Each ReLU is an instance of its own because a quantizer absorbs the one in front of it; a shared one it could not.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, relu: bool = True) -> None:
        layers: list[nn.Module] = [
            nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        super().__init__(*layers, *([nn.ReLU()] if relu else []))


class ResidualBlock(nn.Module):
    """``relu(body(x) + shortcut(x))``; (batch, inputs, h, w) -> (batch, outputs, h / stride, w / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(ConvBlock(inputs, outputs, stride=stride), ConvBlock(outputs, outputs, relu=False))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else ConvBlock(inputs, outputs, kernel=1, stride=stride, relu=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


class ResidualNet(nn.Module):
    """A residual network for small images: a stem and a block per stage, each twice as wide and half as large.

    Shapes: (batch, channels, h, w) -> (batch, num_classes) logits. Width 8 and three stages: 19,810 parameters.

    >>> sum(p.numel() for p in ResidualNet().parameters())
    19810
    """

    def __init__(self, num_classes: int = 10, channels: int = 1, width: int = 8, stages: int = 3) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(stages)]
        self.stem = ConvBlock(channels, width)
        self.blocks = nn.Sequential(
            *(ResidualBlock(a, b, stride=1 if i == 0 else 2) for i, (a, b) in enumerate(zip([width, *widths], widths)))
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


class MLP(nn.Sequential):
    """Linear layers with ReLU between them on the flattened input: (batch, ...) -> (batch, num_classes) logits."""

    def __init__(self, inputs: int = 256, hidden: Sequence[int] = (64, 64), num_classes: int = 10) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in zip([inputs, *hidden], hidden):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*layers, nn.Linear([inputs, *hidden][-1], num_classes))


class CausalAttention(nn.Module):
    """Self-attention of each position to itself and what lies before it; (batch, time, width) -> same.

    Each head lowers its scores by a slope of its own for each step back (Press et al. 2022, ALiBi): from 1, a head that
    sees the nearest, down to 1/16. So there is no position embedding, and no greatest length. The two products of
    activations are modules, so that a recipe quantizes them like the layers.
    """

    slopes: Tensor

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"model: {heads} heads do not divide a width of {width}.")
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.scores, self.mix = MatMul(), MatMul()
        self.register_buffer("slopes", torch.logspace(0, -4, heads, base=2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        (batch, time, width), head = x.shape, x.shape[-1] // self.heads
        q, k, v = (
            layer(x).view(batch, time, self.heads, head).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        scores = self.scores(q, k.transpose(-2, -1)) * head**-0.5
        mixed = self.mix((scores + self.bias(time)).softmax(-1), v)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))

    def bias(self, time: int) -> Tensor:
        """(heads, time, time): minus the slope times the distance; minus infinity for what lies ahead."""
        at = torch.arange(time, device=self.slopes.device)
        distance = (at[:, None] - at[None, :]).to(self.slopes.dtype)
        return (-self.slopes[:, None, None] * distance).masked_fill(distance < 0, -torch.inf)


class TransformerBlock(nn.Module):
    """Attention and a feed-forward part, each on normalized input and added to it; (batch, time, width) -> same."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), CausalAttention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up, self.activation, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.down(self.activation(self.up(self.norm2(x)))))


class ByteTransformer(nn.Module):
    """A causal transformer over bytes: at each position the logits of the byte that follows.

    Shapes: (batch, time) int64 in 0..num_classes-1 -> (batch, time, num_classes) logits.

    >>> sum(p.numel() for p in ByteTransformer().parameters())
    385120
    """

    def __init__(
        self, num_classes: int = 256, width: int = 96, heads: int = 3, layers: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes, width)
        nn.init.normal_(self.embedding.weight, std=0.3)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, dropout) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(x))))


class RecurrentClassifier(nn.Module):
    """An LSTM or a GRU over padded byte sequences, and a linear layer on the state after the last byte of each.

    Shapes: tokens (batch, time) int64, lengths (batch,) int64 -> (batch, num_classes) logits. What lies behind
    ``lengths`` has no influence. An empty sequence (length 0) counts as one padding byte.

    Args:
        cell: ``lstm`` or ``gru``.
        tokens: size of the vocabulary.
    """

    def __init__(
        self,
        num_classes: int = 16,
        cell: str = "lstm",
        tokens: int = 256,
        width: int = 32,
        hidden: int = 96,
        layers: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        cells: dict[str, type[nn.LSTM] | type[nn.GRU]] = {"lstm": nn.LSTM, "gru": nn.GRU}
        if cell not in cells:
            raise ConfigError(f"model.cell must be {' or '.join(cells)}, not {cell!r}{nearest(str(cell), cells)}.")
        self.embedding = nn.Embedding(tokens, width)
        self.recurrent = cells[cell](width, hidden, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(hidden, num_classes)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        states, _ = self.recurrent(self.embedding(tokens))
        # The cell runs in one direction, so padding behind a sequence cannot reach its last state.
        last = (lengths.clamp(min=1) - 1)[:, None, None].expand(-1, 1, states.shape[-1])
        return self.head(self.dropout(states.gather(1, last)[:, 0]))
