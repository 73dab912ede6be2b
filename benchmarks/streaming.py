"""Quantizing a model that is read from the disk unit by unit: float bytes in a second, and peak memory.

    python benchmarks/streaming.py [recipe=w4a16] [layers=30] [batches=0] [folder=<where to keep the model>]

The model has the shape of a Llama of 1.5 billion parameters, with random weights in float32: 6 GB on the disk. Peak
memory is that of the whole process, Python and torch included; the target is 1.5 times the largest unit and 1 GB.
"""

from __future__ import annotations

import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

import qat
from qat.deploy.streaming import units_of


def architecture(layers: int) -> nn.Module:
    """A Llama without weights."""
    config = LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32,
                         num_key_value_heads=8, vocab_size=32000, tie_word_embeddings=False)
    with qat.without_weights():
        return AutoModelForCausalLM.from_config(config)


def write(folder: Path, layers: int) -> None:
    """Random weights, in files of a gigabyte."""
    folder.mkdir(parents=True)
    generator, shard, number = torch.Generator().manual_seed(0), {}, 0
    for name, parameter in architecture(layers).named_parameters():
        shard[name] = (torch.ones(parameter.shape) if parameter.dim() == 1
                       else torch.randn(parameter.shape, generator=generator) * 0.02)
        if sum(t.nbytes for t in shard.values()) > 1e9:
            save_file(shard, folder / f"model-{number:05}.safetensors")
            shard, number = {}, number + 1
    save_file(shard, folder / f"model-{number:05}.safetensors")


def peak() -> float:
    """Greatest resident bytes since the process began (Linux)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    options = {"recipe": "w4a16", "layers": "30", "batches": "0", "folder": ""}
    for argument in sys.argv[1:]:
        key, _, value = argument.partition("=")
        if key not in options:
            sys.exit(f"unknown option {key!r}: choose from {', '.join(options)}")
        options[key] = value
    layers, console = int(options["layers"]), Console(width=120)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options["folder"] or Path(temporary) / "float")
        if not folder.is_dir():
            writer = multiprocessing.Process(target=write, args=(folder, layers))   # its memory does not count
            writer.start()
            writer.join()
        model = architecture(layers)
        count = sum(p.numel() for p in model.parameters())
        largest = max(sum(p.numel() for p in m.parameters()) for m in units_of(model).values()) * 4
        example = {"input_ids": torch.zeros(1, 8, dtype=torch.long), "use_cache": False}
        batches = [{"input_ids": torch.randint(0, 32000, (1, 512)), "use_cache": False}
                   for _ in range(int(options["batches"]))]
        start = time.perf_counter()
        qat.stream(model, folder, Path(temporary) / "out", options["recipe"], example, batches)
        seconds = time.perf_counter() - start
        size = sum(p.stat().st_size for p in (Path(temporary) / "out").iterdir())
    console.print(f"{options['recipe']}, {count / 1e9:.2f} billion parameters, {len(batches)} batches of 512 tokens: "
                  f"{seconds:.0f} s, {count * 4 / seconds / 1e6:.0f} MB of float weights a second (target 100)")
    console.print(f"peak {peak() / 1e6:,.0f} MB, target {(1.5 * largest + 1e9) / 1e6:,.0f} MB (largest unit "
                  f"{largest / 1e6:,.0f} MB); {count * 4 / 1e6:,.0f} MB became {size / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
