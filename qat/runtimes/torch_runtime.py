"""torch itself: the deployed model as this package runs it, with the kernels of its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qat.deploy import save
from qat.deploy.convert import outputs
from qat.errors import UnsupportedError
from qat.runtimes.base import Operator, Read, Runtime, Session
from qat.runtimes.watch import kernels, watch
from qat.tracing import call, evaluating


class TorchSession(Session):
    """A deployed model; its operators are those of the last call."""

    def __init__(self, deployed: nn.Module) -> None:
        self.deployed = deployed
        self.last: Any = None

    def __call__(self, inputs: Any) -> list[Tensor]:
        self.last = inputs
        with evaluating(self.deployed), torch.no_grad():
            return outputs(call(self.deployed, inputs))

    def operators(self) -> list[Operator]:
        return [] if self.last is None else kernels(self.deployed, self.last)

    def codes(self, inputs: Any) -> Read:
        watched = watch(self.deployed, inputs)
        return Read(watched.codes(), watched.outputs)


class Torch(Runtime):
    """torch on the CPU; its file is the checkpoint."""

    name: ClassVar[str] = "torch"
    format: ClassVar[str] = "checkpoint"

    def export(self, deployed: nn.Module, path: Path, example_inputs: Any) -> None:
        save(deployed, path)

    def start(self, path: Path) -> Session:
        raise UnsupportedError(f"{path}: a checkpoint needs the float architecture: qat.load(path, skeleton)")

    def deploy(self, deployed: nn.Module, path: Path, example_inputs: Any) -> Session:
        self.export(deployed, path, example_inputs)
        return TorchSession(deployed)
