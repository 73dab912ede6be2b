"""Decoding with a language model: one token at a time on the CPU, floating point against integer weights.

    OMP_NUM_THREADS=2 python benchmarks/decode.py                   # a 1B-parameter shape: all kinds need 20 GB
    python benchmarks/decode.py --layers 4 --only fp32,w4a16        # some of it
    python benchmarks/decode.py --hidden 256 --feed-forward 512 --layers 2 --vocabulary 512 --heads 8 --kv-heads 2

The model has the shape of a Llama (RMS norms, rotary embeddings, grouped-query attention over a key-value cache, gated
feed-forward) and random weights. One layer is deployed for each kind and copied; copies share no memory. Embedding and
head are at 8 bits in the int4 kinds too. Decode steps of all kinds run in turn in one process; their medians are
compared, and the speed of prefill (tokens of a prompt in one call) is measured after them. ``resident``: bytes of all
that a model holds once it has decoded and prefilled: parameters, buffers, and what its kernels have packed.

Targets: int8 3x and int4 4x faster than fp32.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from harness import alternate, machine, table
from torch import Tensor, nn

import qat
from qat.deploy.convert import resident_bytes


@dataclass(frozen=True)
class Shape:
    """The size of a model."""

    hidden: int
    feed_forward: int
    layers: int
    vocabulary: int
    heads: int
    kv_heads: int
    context: int


class Block(nn.Module):
    """Attention and feed-forward; ``forward`` writes the new keys and values into the cache at ``position``."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = shape.heads, shape.kv_heads, shape.hidden // shape.heads
        kv = self.kv_heads * self.width
        self.attention_norm, self.norm = nn.RMSNorm(shape.hidden), nn.RMSNorm(shape.hidden)
        self.q, self.k, self.v, self.o = (nn.Linear(shape.hidden, n, bias=False)
                                          for n in (shape.hidden, kv, kv, shape.hidden))
        self.gate, self.up = (nn.Linear(shape.hidden, shape.feed_forward, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.feed_forward, shape.hidden, bias=False)

    def forward(self, x: Tensor, cache: Tensor, rotation: Tensor, position: int) -> Tensor:
        """``x``: (1, tokens, hidden); ``cache``: (2, 1, kv_heads, context, width); ``rotation``: (2, tokens, width)."""
        tokens = x.shape[1]
        normed = self.attention_norm(x)
        q, k, v = (layer(normed).view(1, tokens, -1, self.width).transpose(1, 2) for layer in (self.q, self.k, self.v))
        cache[0, :, :, position : position + tokens] = rotated(k, rotation)
        cache[1, :, :, position : position + tokens] = v
        keys, values = cache[:, :, :, : position + tokens]
        attended = F.scaled_dot_product_attention(rotated(q, rotation), keys, values, is_causal=tokens > 1,
                                                  enable_gqa=True)
        x = x + self.o(attended.transpose(1, 2).reshape(1, tokens, -1))
        normed = self.norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * rotation[0] + torch.cat([-x[..., half:], x[..., :half]], -1) * rotation[1]


class Decoder:
    """A model as its pieces, with a cache. Piece by piece, so that only one is in memory more than once."""

    def __init__(self, shape: Shape, dtype: torch.dtype, pieces: list[nn.Module]) -> None:
        self.shape, self.embedding, self.blocks, self.head = shape, pieces[0], pieces[1:-1], pieces[-1]
        width = shape.hidden // shape.heads
        angles = (torch.arange(shape.context)[:, None]
                  * 10000.0 ** -(torch.arange(0, width, 2) / width)[None, :]).repeat(1, 2)
        self.rotation = torch.stack([angles.cos(), angles.sin()]).to(dtype)
        self.caches = [torch.zeros(2, 1, shape.kv_heads, shape.context, width, dtype=dtype) for _ in self.blocks]

    def __call__(self, tokens: Tensor, position: int) -> Tensor:
        """The scores of the last token's successor; ``tokens``: (1, n), at ``position`` and after."""
        rotation = self.rotation[:, position : position + tokens.shape[1]]
        x = self.embedding(tokens)
        for block, cache in zip(self.blocks, self.caches):
            x = block(x, cache, rotation, position)
        return self.head(x[:, -1:])

    @property
    def pieces(self) -> list[nn.Module]:
        return [self.embedding, *self.blocks, self.head]


def float_pieces(shape: Shape) -> list[nn.Module]:
    """Embedding, one block, head."""
    return [nn.Sequential(nn.Embedding(shape.vocabulary, shape.hidden)), Block(shape),
            nn.Sequential(nn.RMSNorm(shape.hidden), nn.Linear(shape.hidden, shape.vocabulary, bias=False))]


PER_TOKEN = {"format": "int8", "dynamic": True, "granularity": "per_token"}
MINMAX = {"learned": None, "observer": "minmax"}
BF16_SCALES = {"scale_dtype": "bfloat16"}

KINDS: dict[str, tuple[torch.dtype, Callable[[], qat.Recipe] | None, str]] = {
    # kind -> (dtype of the activations, recipe of the blocks, preset of embedding and head)
    "fp32": (torch.float32, None, ""),
    "bf16": (torch.bfloat16, None, ""),
    "w8a8_dynamic": (torch.float32, lambda: qat.Recipe.preset("w8a8_dynamic"), "w8a8_dynamic"),
    "w8a16": (torch.float32, lambda: qat.Recipe.preset("w8a16"), "w8a16"),
    "w4a8_dynamic": (torch.float32, lambda: qat.Recipe.preset("w4a8", edges="same", input=PER_TOKEN, weight=MINMAX),
                     "w8a8_dynamic"),
    "w4a8_groups": (torch.float32, lambda: qat.Recipe.preset(
        "w4a8", edges="same", input=PER_TOKEN, weight={**MINMAX, "granularity": "per_group", "group_size": 128}),
        "w8a8_dynamic"),
    "w4a16": (torch.float32, lambda: qat.Recipe.preset("w4a16", edges="same"), "w8a16"),
    "w4a16_bf16": (torch.bfloat16, lambda: qat.Recipe.preset("w4a16", edges="same", weight=BF16_SCALES), "w8a16"),
}
TARGETS = {"w8a8_dynamic": 3.0, "w8a16": 3.0, "w4a8_dynamic": 4.0, "w4a8_groups": 4.0, "w4a16": 4.0, "w4a16_bf16": 4.0}


def deploy(piece: nn.Module, recipe: qat.Recipe, *args: Any) -> nn.Module:
    """The piece frozen to integers, proven equal to the prepared one on ``args``."""
    prepared = qat.prepare(piece, recipe, example_inputs=args)
    return qat.convert(qat.calibrate(prepared, [args]).eval(), [args])[0]


def build(kind: str, shape: Shape, pieces: list[nn.Module]) -> Decoder:
    dtype, recipe, edges = KINDS[kind]
    embedding, block, head = (copy.deepcopy(piece).to(dtype) for piece in pieces)
    if recipe is not None:
        outer = qat.Recipe.from_dict({**qat.Recipe.preset(edges).to_dict(), "edges": "same"})
        alone = Decoder(shape, dtype, [embedding, block, head])
        x = torch.randn(1, 1, shape.hidden).to(dtype)
        embedding = deploy(embedding, outer, torch.zeros(1, 1, dtype=torch.long))
        block = deploy(block, recipe(), x, alone.caches[0], alone.rotation[:, :1], 0)
        head = deploy(head, outer, x)
    return Decoder(shape, dtype, [embedding, *(copy.deepcopy(block) for _ in range(shape.layers)), head])


def weights(model: Decoder) -> int:
    return sum(p.numel() for piece in model.pieces for p in piece.parameters())


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Measure and print; kind -> seconds of a decode step, its ratio to fp32, resident bytes, prefill tokens/s."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 2048), ("feed-forward", 5632), ("layers", 22), ("vocabulary", 32000),
                          ("heads", 32), ("kv-heads", 4), ("context", 512), ("prompt", 128), ("rounds", 15)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", default="", help=f"some of {','.join(KINDS)}; fp32 always runs")
    options = parser.parse_args(arguments)
    only = ["fp32", *(k for k in (options.only.split(",") if options.only else KINDS) if k != "fp32")]
    shape = Shape(options.hidden, options.feed_forward, options.layers, options.vocabulary, options.heads,
                  options.kv_heads, options.context)
    torch.manual_seed(0)
    with torch.no_grad():
        pieces = float_pieces(shape)
        models = {kind: build(kind, shape, pieces) for kind in only}
        count = weights(models["fp32"])
        token, prompt = torch.tensor([[1]]), torch.randint(0, shape.vocabulary, (1, options.prompt))
        steps = {kind: (lambda m=model: m(token, options.prompt)) for kind, model in models.items()}
        seconds = alternate(steps, options.rounds, warmup=2, budget=90.0)
        filling = alternate({kind: (lambda m=model: m(prompt, 0)) for kind, model in models.items()}, 3, warmup=1,
                            budget=60.0)
    result = {kind: {"seconds": seconds[kind], "ratio": seconds["fp32"] / seconds[kind],
                     "resident": float(sum(resident_bytes(piece) for piece in models[kind].pieces)),
                     "prefill": options.prompt / filling[kind]} for kind in models}
    print(machine())
    rows = [[kind, f"{r['seconds'] * 1e3:.1f}", f"{1 / r['seconds']:.1f}", f"{r['ratio']:.2f}x",
             f"{TARGETS[kind]:.0f}x" if kind in TARGETS else "", f"{r['resident'] / 2**20:.0f}",
             f"{r['resident'] / count:.2f}", f"{r['prefill']:.0f}"] for kind, r in result.items()]
    table(f"A decode step of {count / 1e6:.0f} M parameters at {options.prompt} tokens of context",
          ["kind", "ms", "tokens/s", "vs fp32", "target", "resident MiB", "bytes a weight", "prefill tokens/s"], rows)
    return result


if __name__ == "__main__":
    main()
