"""llama.cpp: GGUF files, run by ``llama-cpp-python`` in a process of its own.

llama.cpp ends the process on what it did not expect, and is often built in an environment of its own: the environment
variable ``QAT_LLAMA_CPP_PYTHON`` names the Python that has it (without the variable: this one).

On CPUs, llama.cpp quantizes the inputs of each product with quantized weights: blocks of 32 to int8 (``q8_0``) before
Q4_0 and Q8_0 weights, of 256 (``q8_K``) before ternary ones. No setting turns that off; files whose layers are written
in floating point (``dequantize=True``) are computed in floating point. Keys and values are kept in float32 here.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from qat.deploy.gguf import layer_names
from qat.errors import CheckpointError, UnsupportedError
from qat.runtimes.base import Operator, Runtime, Session

PYTHON = "QAT_LLAMA_CPP_PYTHON"
WORKER = Path(__file__).with_name("llama_cpp_worker.py")
TYPES = {"i32": "s32", "f32": "f32", "f16": "f16", "bf16": "bf16"}


def python() -> str:
    """The Python that has llama.cpp."""
    return os.environ.get(PYTHON) or sys.executable


class LlamaCppSession(Session):
    """An opened file; inputs are tokens (batch, length), or a dict with ``input_ids``.

    Attributes:
        description: what llama.cpp calls the model, its vocabulary, the length it was trained for, the features of the
            CPU in use.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  close() closes it
        try:
            self.process = subprocess.Popen(
                [python(), str(WORKER), str(path), str(torch.get_num_threads())], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=self._said)
        except OSError as error:
            self._said.close()
            raise UnsupportedError(f"{PYTHON}={python()!r} cannot be started: {error}") from None
        self._operators: list[Operator] = []
        try:
            self.description = self._reply()
        except CheckpointError:
            self.close()
            raise
        self.names = layer_names(self.description["architecture"], self.description["blocks"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):      # the reply, or the lack of it, tells why
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            self._said.seek(0)
            said = self._said.read().decode(errors="replace").strip().splitlines()[-3:]
            raise CheckpointError(f"{self.path}: llama.cpp ended with status {status}: {'; '.join(said)}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise CheckpointError(f"{self.path}: llama.cpp: {reply['error']}")
        return reply

    def __call__(self, inputs: Any) -> list[Tensor]:
        """Logits (batch, length, vocabulary), float32.

        Raises:
            UnsupportedError: not tokens of equal lengths, or tokens that the vocabulary has not.
            CheckpointError: llama.cpp failed.
        """
        tokens = _tokens(inputs)
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.description["vocabulary"]:
            raise UnsupportedError(f"tokens from {int(tokens.min())} to {int(tokens.max())}: the vocabulary of "
                                   f"{self.path} has {self.description['vocabulary']}")
        assert self.process.stdout is not None
        reply = self._ask({"tokens": tokens.tolist()})
        data = bytearray(self.process.stdout.read(4 * torch.Size(reply["shape"]).numel()))
        self._operators = [self._operator(*row) for row in reply["operators"]]
        return [torch.frombuffer(data, dtype=torch.float32).view(reply["shape"])]

    def _operator(self, weight: str, operator: str, buffer: str, values: str, kind: str, result: str,
                  count: int) -> Operator:
        layer = self.names.get(weight, "")
        if weight == "token_embd.weight" and operator != "GET_ROWS":
            layer = "lm_head"                           # reads the table where there is no output.weight
        operands = [TYPES.get(name.lower(), name.lower()) for name in (values, kind)]
        return Operator(layer, f"{operator} ({buffer})", (operands[0], operands[1]), TYPES.get(result, result), count)

    def operators(self) -> Sequence[Operator]:
        """What the last call computed, from llama.cpp's graph; the type of activations is that which its table of
        kernels has for the weight's type."""
        return self._operators

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text, by the tokenizer in the file, with what it puts at the beginning and the end.

        Raises:
            CheckpointError: the file has no tokenizer: give ``source=`` when exporting.
        """
        tokens: list[int] = self._ask({"text": text})["tokens"]
        return tokens

    def close(self) -> None:
        """End the process."""
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self.process.kill()
        self.process.wait()
        self._said.close()


def _tokens(inputs: Any) -> Tensor:
    """The tokens (batch, length) among a model's inputs."""
    if isinstance(inputs, dict):
        mask = inputs.get("attention_mask")
        if mask is not None and not bool(mask.all()):
            raise UnsupportedError("an attention_mask with gaps: give llama.cpp sequences of one length")
        inputs = inputs.get("input_ids")
    elif isinstance(inputs, tuple | list):
        inputs = inputs[0]
    if not isinstance(inputs, Tensor) or inputs.dim() != 2 or inputs.is_floating_point() or not inputs.numel():
        raise UnsupportedError("llama.cpp takes tokens: an integer tensor (batch, length), or {'input_ids': tokens}")
    return inputs


class LlamaCpp(Runtime):
    """llama.cpp on the CPU."""

    name: ClassVar[str] = "llama.cpp"
    format: ClassVar[str] = "gguf"
    suffix: ClassVar[str] = ".gguf"
    package: ClassVar[str] = "llama_cpp"
    extra: ClassVar[str | None] = "llama-cpp"

    def check(self) -> None:
        """Raises:
            UnsupportedError: no Python has llama.cpp.
        """
        try:
            found = subprocess.run([python(), "-c", f"import {self.package}"], capture_output=True, text=True)
        except OSError as error:
            raise UnsupportedError(f"{PYTHON}={python()!r} cannot be started: {error}") from None
        if found.returncode:
            raise UnsupportedError(f"runtime {self.name}: {python()} has no {self.package}: pip install "
                                   f"llama-cpp-python, or name the Python that has it in {PYTHON} "
                                   f"({found.stderr.strip().splitlines()[-1]})")

    def start(self, path: Path) -> LlamaCppSession:
        return LlamaCppSession(path)
