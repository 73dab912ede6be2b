"""llama.cpp itself: it computes the model that was exported, and quantizes activations as its kernels say.

The environment variable QAT_LLAMA_CPP_PYTHON names the Python that has llama_cpp, where this one has not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

from qat.deploy.export import export
from qat.errors import CheckpointError, UnsupportedError
from qat.rewriter import quantized_modules

pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")

from deploy.test_gguf import BLOCKS, GROUP, LLAMA3, deployed_model  # noqa: E402

from qat.deploy import gguf as writer  # noqa: E402
from qat.runtimes.llama_cpp import LlamaCpp, LlamaCppSession, python  # noqa: E402

pytestmark = pytest.mark.slow
RUNTIME = LlamaCpp()
try:
    RUNTIME.check()
except UnsupportedError as error:
    pytest.skip(str(error), allow_module_level=True)


@contextmanager
def opened(path: Path) -> Iterator[LlamaCppSession]:
    session = RUNTIME.open(path)
    try:
        yield session
    finally:
        session.close()


def blocks_of_32(x: Tensor) -> Tensor:
    """What llama.cpp makes of activations before Q4_0 and Q8_0: int8 and a float16 scale for each 32."""
    rows = x.unflatten(-1, (-1, 32))
    scale = rows.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, rows / scale, 0.0).round()
    return (codes * scale.half().float()).flatten(-2)


def blocks_of_256(x: Tensor) -> Tensor:
    """The same before ternary weights: the largest value is -127, the scale float32."""
    rows = x.unflatten(-1, (-1, 256))
    most = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
    scale = -most / 127
    codes = torch.where(scale != 0, rows / scale, 0.0).round().clamp(max=127)
    return (codes * scale).flatten(-2)


def logits(deployed: Any, tokens: Tensor, activations: dict[str, Any] | None = None) -> Tensor:
    """The deployed model's, with the inputs of some layers changed."""
    hooks = [deployed.get_submodule(name).register_forward_pre_hook(lambda m, args, change=change: change(args[0]))
             for name, change in (activations or {}).items()]
    with torch.no_grad():
        result: Tensor = deployed(tokens).logits.float()
    for hook in hooks:
        hook.remove()
    return result


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


FLOATS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, odd vocabulary": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "llama, biases, llama3": ("Llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "llama, linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, wide heads": ("Llama", {"head_dim": 24, "num_key_value_heads": 1}),
    "llama, all heads, three": ("Llama", {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}),
    "mistral": ("Mistral", {"sliding_window": 64}),
    "qwen2": ("Qwen2", {"num_attention_heads": 2, "num_key_value_heads": 1}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", FLOATS)
def test_the_architecture_is_the_same(tmp_path: Path, case: str) -> None:
    """Dequantized layers: everything but the quantized products agrees to the rounding of float32."""
    kind, options = FLOATS[case]
    deployed = deployed_model(kind, "w8a16", **options)
    export(deployed, tmp_path / "m.gguf", "gguf", dequantize=True)
    tokens = torch.randint(0, 300, (2, 40))
    with opened(tmp_path / "m.gguf") as session:
        actual, = session(tokens)
    expected = logits(deployed, tokens)
    assert actual.shape == expected.shape == (2, 40, 301)
    assert error(actual, expected) < 1e-5


CASES = {**{case: ("Llama", spec, {}) for case, spec in BLOCKS.items() if "mid-rise" not in case},
         "Q4_0 mid-rise": ("Llama", {"format": "int2_midrise", **GROUP}, {}),
         "Q4_0 tied, odd blocks": ("Llama", {"format": "int4", **GROUP},
                                   {"hidden_size": 96, "intermediate_size": 160, "tie_word_embeddings": True}),
         "Q8_0 biases": ("Qwen2", {"format": "int8", **GROUP}, {}),
         "Q4_0 norms of heads": ("Qwen3", {"format": "int4", **GROUP}, {"head_dim": 16})}


@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_int8_activations(tmp_path: Path, case: str) -> None:
    kind, spec, options = CASES[case]
    type_ = case.split()[0]
    if "TQ" in type_:
        options = {"hidden_size": 256, "intermediate_size": 512} | options
    recipe = {"rules": [{"weight": spec, "match": {"type": layer}} for layer in ("Linear", "Embedding")]}
    deployed = deployed_model(kind, recipe, **options)
    tokens = torch.randint(0, 300, (2, 40))
    path = tmp_path / "m.gguf"
    export(deployed, path, "gguf", **({"ternary": type_} if "TQ" in type_ else {}))
    with opened(path) as session:
        actual, = session({"input_ids": tokens})
        operators = {operator.layer: operator for operator in session.operators()}
        alone, = session(tokens[1:])
        few, = session(tokens[:, :3])
    layers = [name for name, module in quantized_modules(deployed).items() if module.plan.weight]
    assert sorted(operators) == sorted(layers)
    for name in layers:
        operator = operators[name]
        assert operator.integer
        assert operator.count == 1
        if name == "model.embed_tokens":
            assert operator.operands == ("s32", type_.lower())
        else:
            assert operator.operands == ("q8_k" if "TQ" in type_ else "q8_0", type_.lower())
            assert operator.operator.startswith("MUL_MAT")
    blocks = blocks_of_256 if "TQ" in type_ else blocks_of_32
    plain = logits(deployed, tokens)
    emulated = logits(deployed, tokens, {name: blocks for name in layers if name != "model.embed_tokens"})
    assert error(actual, plain) < 0.1
    assert (actual.argmax(-1) == plain.argmax(-1)).float().mean() > 0.9
    rows = (actual - emulated).norm(dim=-1) / emulated.norm(dim=-1)
    assert rows.median() < 1e-6             # not all: where float32 sums differ, a code flips now and then
    assert error(alone, actual[1:]) < 0.02
    assert error(few, actual[:, :3]) < 0.02


def test_the_tokenizer_is_the_same(tmp_path: Path) -> None:
    source = zoo.language_model_folder(tmp_path / "float")
    export(deployed_model("Llama", writer.recipe()), tmp_path / "m.gguf", "gguf", source=source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    texts = ["the quick brown fox", " jumps  over\n\nthe lazy dog 12345 and then", "Ünïcode, it's!", "more<end>the"]
    with opened(tmp_path / "m.gguf") as session:
        for text in texts:
            assert session.tokenize(text) == tokenizer(text).input_ids, text


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    export(deployed_model("Llama", writer.recipe()), path, "gguf")
    good = path.read_bytes()
    damages = {"cut": good[:-100], "longer": good + b"\0", "half": good[:len(good) // 2], "empty": b"",
               "header": good[:20], "other": b"PK" + good[2:], "bit": good[:-50] + bytes([good[-50] ^ 1]) + good[-49:],
               "setting": good.replace(b"llama.block_count", b"llama.block_cound")}
    for damage, content in damages.items():
        assert content != good, damage
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"m\.gguf"):
            RUNTIME.open(path)
    with pytest.raises(CheckpointError, match="nothing"):
        RUNTIME.open(tmp_path / "nothing.gguf")
    (tmp_path / "m.gguf.json").unlink()
    path.write_bytes(good[:-100])               # as of others, without a manifest: llama.cpp checks the sizes
    with pytest.raises(CheckpointError, match=r"llama\.cpp"):
        RUNTIME.open(path)


def test_what_it_does_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.gguf"
    export(deployed_model("Llama", writer.recipe()), path, "gguf")
    with opened(path) as session:
        for wrong in (torch.zeros(2, 3), torch.zeros(3, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int64)):
            with pytest.raises(UnsupportedError, match="integer tensor"):
                session(wrong)
        with pytest.raises(UnsupportedError, match=r"the vocabulary of .* has 301"):
            session(torch.tensor([[301]]))
        with pytest.raises(UnsupportedError, match="attention_mask"):
            session({"input_ids": torch.zeros(1, 2, dtype=torch.int64), "attention_mask": torch.tensor([[0, 1]])})
        with pytest.raises(CheckpointError, match="no tokenizer: give source="):
            session.tokenize("the")
        assert session(torch.tensor([[300]]))[0].shape == (1, 1, 301)
    assert python()
    monkeypatch.setenv("QAT_LLAMA_CPP_PYTHON", str(tmp_path / "nothing"))
    for call in (RUNTIME.check, lambda: RUNTIME.open(path)):
        with pytest.raises(UnsupportedError, match="QAT_LLAMA_CPP_PYTHON"):
            call()
