"""vLLM itself: it loads the folders, runs its integer kernels, and computes the model that was exported.

The environment variable QAT_VLLM_PYTHON names the Python that has vllm, where this one has not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor

import qat
from qat.deploy.export import export
from qat.errors import UnsupportedError
from qat.rewriter import quantized_modules

transformers = pytest.importorskip("transformers")

PYTHON = os.environ.get("QAT_VLLM_PYTHON")
LINEAR = {"type": "Linear"}
SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 301}      # vLLM needs heads of 64 or more


@pytest.fixture(scope="module")
def python() -> str:
    if PYTHON is None:
        pytest.importorskip("vllm")
    return PYTHON or sys.executable


def rules(weight: Any, activation: Any = None, **match: str) -> list[dict[str, Any]]:
    return [{"match": match or LINEAR, "weight": weight} | ({"input": activation} if activation else {})]


def deployed_model(folder: Path, recipe: Any, dtype: torch.dtype) -> Any:
    zoo.language_model_folder(folder, **SIZES)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    batch = {"input_ids": torch.randint(0, 300, (2, 9))}
    return qat.convert(zoo.prepared(model, recipe, [batch]), [batch])[0]


def run(python: str, folder: Path, tokens: Tensor) -> dict[str, Any]:
    given, out = folder.parent / "tokens.json", folder.parent / "out.json"
    given.write_text(json.dumps(tokens[0].tolist()))
    done = subprocess.run([python, str(Path(__file__).with_name("vllm_worker.py")), str(folder), str(given), str(out)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def per_token(x: Tensor) -> Tensor:
    """Dynamic inputs as vLLM has them: ``max / 127``, where compressed-tensors and this package have 127.5."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, x / scale, 0.0).round() * scale


INT8, CPU8, CPU4 = {"format": "int8", "dynamic": True}, "CPUInt8ScaledMMLinearKernel", "CPUWNA16LinearKernel"
NARROW = {"format": "int4", "scale_dtype": "bfloat16"}
GROUPS = {**NARROW, "granularity": "per_group", "group_size": 32}
CASES: dict[str, tuple[torch.dtype, Any, str, float]] = {
    "w8a8 static": (torch.float32, rules("int8", {"format": "int8", "symmetric": True}), CPU8, 1e-5),
    "w8a8 static, zero point": (torch.float32, rules("int8", "int8"), CPU8, 1e-5),
    "w8a8 dynamic": (torch.float32, rules("int8", INT8), CPU8, 1e-5),
    "w8a8 tensor": (torch.float32, rules({"format": "int8", "granularity": "per_tensor"}, "int8"), CPU8, 1e-5),
    "w8a8, head kept": (torch.float32, [{"match": {"name": "lm_head"}, "keep": "float32"}, *rules("int8", "int8")],
                        CPU8, 1e-5),
    "w4a16 groups": (torch.bfloat16, rules(GROUPS), CPU4, 0.03),
    "w4a16 channels": (torch.bfloat16, rules(NARROW), CPU4, 0.03),
    "ternary": (torch.bfloat16, rules({**NARROW, "format": "ternary"}), CPU4, 0.03),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_vllm_computes_the_model(python: str, tmp_path: Path, case: str) -> None:
    dtype, recipe, kernel, tolerance = CASES[case]
    deployed = deployed_model(tmp_path / "float", {"rules": recipe}, dtype)
    export(deployed, tmp_path / "out", "compressed-tensors", target="vllm", source=tmp_path / "float")
    layers = [name for name, module in quantized_modules(deployed).items() if module.plan.weight]
    if "dynamic" in case:
        for name in layers:
            deployed.get_submodule(name).register_forward_hook(
                lambda module, args, _: F.linear(per_token(args[0]), module.weight, module.bias))
    tokens = torch.randint(0, 300, (1, 24))
    with torch.no_grad():
        expected = deployed(tokens).logits[0, :-1].float().log_softmax(-1)
        greedy = deployed.generate(tokens[:, :8], max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 8:].tolist()
    found = run(python, tmp_path / "out", tokens)
    actual = torch.tensor(found["logprobs"])
    assert f"vllm serve . --dtype {str(dtype)[6:]}" in (tmp_path / "out" / "README.md").read_text()
    rows = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    if "dynamic" in case:       # where float32 sums differ, a code flips now and then: all tokens after it see that
        assert rows.quantile(0.2) < tolerance
        assert rows.max() < 0.01
    else:
        assert rows.max() < tolerance
    assert (actual.argmax(-1) == expected.argmax(-1)).float().mean() >= (1.0 if tolerance < 1e-3 else 0.9)
    if tolerance < 1e-3 and "dynamic" not in case:
        assert found["greedy"] == greedy
    assert set(found["kernels"].values()) == {kernel}
    assert ("lm_head" in found["kernels"]) == ("lm_head" in layers)
    assert len(found["kernels"]) == 2 * 4 + ("lm_head" in layers)       # q, k, v in one, gate and up in one


def test_what_vllm_computes_as_one_is_one(tmp_path: Path) -> None:
    different = {"rules": [*rules("int4", type="Linear", name="*k_proj"), *rules("int8")]}
    deployed = deployed_model(tmp_path / "float", different, torch.float32)
    with pytest.raises(UnsupportedError, match=r"self_attn\.k_proj: vLLM .*q_proj.*v_proj as one.*one rule"):
        export(deployed, tmp_path / "out", "compressed-tensors", target="vllm")
    export(deployed, tmp_path / "out", "compressed-tensors", target="transformers")
    deployed = deployed_model(tmp_path / "float", {"rules": rules("int8", "int8")}, torch.float32)
    up = deployed.model.layers[1].mlp.up_proj.input_quantizer
    up.scale.mul_(2)
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp\.up_proj: vLLM .*gate_proj.*input differ"):
        export(deployed, tmp_path / "other", "compressed-tensors", target="vllm")
    assert not (tmp_path / "other").exists()
