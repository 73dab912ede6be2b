"""Quantizing unit by unit: what comes out is what quantizing the whole model in memory gives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import qat
from qat.deploy.streaming import TensorFolder, stream, units_of, without_weights
from qat.errors import CheckpointError, NotCalibratedError, PrepareError


class Block(nn.Module):
    def __init__(self, width: int, experts: int = 0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.act, self.down = nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, None]:
        h = self.down(self.act(self.up(self.norm(x))))
        for i, expert in enumerate(self.experts):
            h = h + expert(x) if float(x.detach().mean()) > i - 0.5 else h
        return x + scale * h, None


class Model(nn.Module):
    """A language model with a parameter outside of all units, and keyword arguments between its blocks."""

    def __init__(self, tied: bool = False, experts: int = 0, width: int = 16) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(11, width), nn.Parameter(torch.randn(6, width))
        self.blocks = nn.ModuleList(Block(width, experts) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embedding(x) + self.position[: x.shape[1]]
        for block in self.blocks:
            h, _ = block(h, scale=0.5)
        return self.head(self.norm(h))


def cnn() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


IDS = [torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(i)) for i in range(3)]
IMAGES = [torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(i)) for i in range(3)]


def folder(model: nn.Module, path: Path, files: int = 2) -> Path:
    """The weights of a model in a folder of safetensors, each tied one once."""
    path.mkdir()
    tensors = {n: t for n, t in model.state_dict().items() if n not in ("head.weight",) or
               model.head.weight is not model.embedding.weight}
    names = list(tensors)
    for i in range(files):
        save_file({n: tensors[n].contiguous() for n in names[i::files]}, path / f"model-{i}.safetensors")
    return path


def float_model(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
    return model


def empty(build: Callable[[], nn.Module]) -> nn.Module:
    with without_weights():
        return build()


CASES: dict[str, tuple[Callable[[], nn.Module], list[torch.Tensor]]] = {
    "language model": (Model, IDS), "tied": (lambda: Model(tied=True), IDS), "experts": (lambda: Model(experts=2), IDS),
    "cnn": (cnn, IMAGES)}


TERNARY = {"rules": [{"weight": "ternary", "input": {"format": "int8", "dynamic": True}}]}


@pytest.mark.parametrize(("case", "recipe"), [*((c, r) for c in CASES for r in ("w4a16", "w8a8_dynamic", "bf16")),
                                              ("language model", TERNARY), ("tied", TERNARY)], ids=str)
@pytest.mark.filterwarnings("ignore:always zero in calibration")
def test_streamed_is_what_it_would_be_in_memory(case: str, recipe: Any, tmp_path: Path) -> None:
    """(Static ranges differ from those of the float model, on which calibrate finds them all.)"""
    build, batches = CASES[case]
    model = float_model(build)
    seen: list[tuple[str, int, int]] = []
    certificate = stream(empty(build), folder(model, tmp_path / "float"), tmp_path / "out", recipe, batches[0], batches,
                         lambda *a: seen.append(a))
    assert seen == [("quantize", i, len(seen)) for i in range(1, len(units_of(model)) + 1)]
    prepared = qat.calibrate(qat.prepare(model, recipe, batches[0]), batches)
    expected, proof = qat.convert(prepared, batches)
    deployed = qat.load(tmp_path / "out", build())
    for batch in batches:
        assert torch.equal(deployed(batch), expected(batch))
    def told(model: nn.Module) -> list[Any]:
        return [replace(row, macs=0) for row in qat.coverage(model).rows]   # made-up weights take another way
    assert told(deployed) == told(expected)
    assert certificate.sparsity == proof.sparsity
    assert certificate.equal
    if case == "tied":
        assert deployed.head._buffers.get("weight_codes") is deployed.embedding._buffers.get("weight_codes")
    qat.save(deployed, tmp_path / "again")
    again = qat.load(tmp_path / "again", build())
    assert torch.equal(again(batches[0]), expected(batches[0]))


def test_static_ranges_are_found_unit_by_unit(tmp_path: Path) -> None:
    model = float_model(Model)
    stream(empty(Model), folder(model, tmp_path / "float"), tmp_path / "out", "w8a8", IDS[0], IDS)
    deployed = qat.load(tmp_path / "out", Model())
    expected, got = model(IDS[0]).detach(), deployed(IDS[0])
    assert 0 < float((expected - got).abs().max()) < 0.05 * float(expected.abs().max())
    with pytest.raises(NotCalibratedError, match=r"blocks\.0"):
        stream(empty(Model), tmp_path / "float", tmp_path / "other", "w8a8", IDS[0])


def test_interrupted_work_goes_on_where_it_stopped(tmp_path: Path) -> None:
    model = float_model(lambda: Model(tied=True))
    source = folder(model, tmp_path / "float")
    def build() -> nn.Module:
        return empty(lambda: Model(tied=True))
    stream(build(), source, tmp_path / "whole", "w8a8", IDS[0], IDS)
    for stop in range(1, 5):
        def interrupt(_: str, done: int, of: int, stop: int = stop) -> None:
            assert done >= stop
            if done == stop:
                raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt):
            stream(build(), source, tmp_path / "out", "w8a8", IDS[0], IDS, interrupt)
        assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="another model, recipe or other data"):
        stream(build(), source, tmp_path / "out", "w8a8", IDS[0], IDS[1:])
    stream(build(), source, tmp_path / "out", "w8a8", IDS[0], IDS)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert not list(tmp_path.glob(".*"))


def digests(path: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(path.iterdir())}


def test_a_checkpoint_that_was_there_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    source = folder(float_model(Model), tmp_path / "float")
    stream(empty(Model), source, tmp_path / "out", "w8a16", IDS[0])
    before = digests(tmp_path / "out")

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(empty(Model), source, tmp_path / "out", "w4a16", IDS[0], progress=interrupt)
    assert digests(tmp_path / "out") == before
    stream(empty(Model), source, tmp_path / "out", "w4a16", IDS[0])
    assert digests(tmp_path / "out") != before
    assert not list(tmp_path.glob(".*"))


def test_what_is_wrong_with_a_source_is_said(tmp_path: Path) -> None:
    model = float_model(Model)
    with pytest.raises(CheckpointError, match="not a folder with safetensors"):
        stream(empty(Model), tmp_path / "nothing", tmp_path / "out", "w8a16", IDS[0])
    with pytest.raises(PrepareError, match="without_weights"):
        stream(Model(), folder(model, tmp_path / "float"), tmp_path / "out", "w8a16", IDS[0])
    with pytest.raises(CheckpointError, match=r"position has shape \(6, 16\)"):
        stream(empty(lambda: Model(width=8)), tmp_path / "float", tmp_path / "out", "w8a16", IDS[0])
    with pytest.raises(CheckpointError, match=r"no tensor blocks\.0\.experts\.0"):
        stream(empty(lambda: Model(experts=1)), tmp_path / "float", tmp_path / "a", "w8a16", IDS[0])
    data = (tmp_path / "float/model-0.safetensors").read_bytes()
    (tmp_path / "float/model-0.safetensors").write_bytes(data[:-5])
    with pytest.raises(CheckpointError, match=r"model-0\.safetensors is not a whole"):
        stream(empty(Model), tmp_path / "float", tmp_path / "b", "w8a16", IDS[0])
    (tmp_path / "c").write_text("mine")
    (tmp_path / "float/model-0.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        stream(empty(Model), tmp_path / "float", tmp_path / "c", "w8a16", IDS[0])
    assert (tmp_path / "c").read_text() == "mine"


def test_a_tensor_folder_reads_single_tensors_and_refuses_a_name_held_twice(tmp_path: Path) -> None:
    folder(float_model(Model), tmp_path / "float")
    tensors = TensorFolder(tmp_path / "float")
    assert "head.weight" in tensors
    assert set(tensors.read(["head.weight"])) == {"head.weight"}
    save_file({"head.weight": torch.zeros(1)}, tmp_path / "float/z.safetensors")
    with pytest.raises(CheckpointError, match=r"head\.weight is in .* and in z\.safetensors"):
        TensorFolder(tmp_path / "float")


@pytest.mark.parametrize("recipe", ["w8a16", "w8a8_dynamic"])
def test_weights_that_another_unit_reads_stay_in_memory_until_the_end(recipe: str, tmp_path: Path) -> None:
    class Reads(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(super().forward(x) @ self.head.weight, self.embedding.weight)

    model = float_model(Reads)
    stream(empty(Reads), folder(model, tmp_path / "float"), tmp_path / "out", recipe, IDS[0], IDS)
    expected, _ = qat.convert(qat.prepare(model, recipe, IDS[0]), IDS)
    assert torch.equal(qat.load(tmp_path / "out", Reads())(IDS[1]), expected(IDS[1]))


def test_without_weights_keeps_ties_and_buffers_and_ends() -> None:
    model = empty(lambda: Model(tied=True))
    assert all(p.is_meta for p in model.parameters())
    assert model.head.weight is model.embedding.weight
    assert not any(b.is_meta for b in empty(cnn).buffers())
    assert not nn.Linear(2, 2).weight.is_meta


def test_units_are_blocks_and_what_is_beside_them() -> None:
    assert list(units_of(Model(experts=2))) == ["embedding", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert list(units_of(cnn())) == ["0", "3", "7"]
