"""What lies beside every export: a manifest that vouches for its files, and a card whose code works."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import nn

import qat
from qat.deploy.card import LOADING
from qat.deploy.export import FORMATS, MANIFEST, Exported, _digest, export, own_target, verify
from qat.errors import CheckpointError, UnsupportedError

WEIGHTS = {"rules": [{"match": {"type": kind}, "weight": {"format": "int8", "granularity": "per_group",
                                                          "group_size": 32, "scale_dtype": "float16"}}
                     for kind in ("Linear", "Embedding")]}


@pytest.fixture(scope="module")
def deployed() -> nn.Module:
    x = torch.randn(8, 12)
    return qat.convert(zoo.prepared(zoo.mlp(), "w8a8", [x]), [x])[0]


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    transformers = pytest.importorskip("transformers")
    source = zoo.language_model_folder(tmp_path_factory.mktemp("float"), num_hidden_layers=1)
    model = transformers.AutoModelForCausalLM.from_pretrained(source).eval()
    batch = {"input_ids": torch.randint(0, 300, (2, 9)), "use_cache": False}
    return qat.convert(zoo.prepared(model, WEIGHTS, [batch]), [batch])[0], source


@pytest.fixture(scope="module")
def single(language_model: Any) -> Callable[..., Exported]:
    """Writes a format of one file."""
    pytest.importorskip("gguf")
    return lambda path, **options: export(language_model[0], path, "gguf", **options)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


# -------------------------------------------------------------------------------------------------- manifests


def test_a_manifest_says_what_was_written(single: Any, tmp_path: Path) -> None:
    made = single(tmp_path / "m.gguf", dequantize=True, metrics={"accuracy, deployed": 0.987654321})
    assert names(tmp_path) == ["README.md", "m.gguf", "m.gguf.json"]
    assert (made.card, made.manifest) == (tmp_path / "README.md", tmp_path / "m.gguf.json")
    manifest = qat.verify_export(tmp_path / "m.gguf")
    assert manifest["format"] == "gguf"
    assert manifest["options"] == {"dequantize": True}
    assert qat.Recipe.from_dict(manifest["recipe"]) == qat.Recipe.from_dict(WEIGHTS)
    assert manifest["certificate"]["equal"] is True
    assert manifest["files"]["m.gguf"]["bytes"] == (tmp_path / "m.gguf").stat().st_size == made.files["m.gguf"]
    assert str(tmp_path) not in (tmp_path / "m.gguf.json").read_text()
    card = made.card.read_text()
    assert "| accuracy, deployed | 0.987654 |" in card
    assert "equal bit for bit" in card


def test_exporting_twice_gives_the_same_bytes_described_too(
        language_model: Any, deployed: nn.Module, single: Any, tmp_path: Path) -> None:
    model, source = language_model
    for folder in ("a", "b", "b"):
        export(model, tmp_path / folder / "hf", "compressed-tensors", source=source)
        single(tmp_path / folder / "gguf" / "m.gguf")
        export(deployed, tmp_path / folder / "pt2" / "m.pt2", "torch-export", example_inputs=torch.randn(3, 12))
    for made in ("hf", "gguf", "pt2"):
        assert contents(tmp_path / "a" / made) == contents(tmp_path / "b" / made)
    assert verify(tmp_path / "a" / "hf")["options"] == {"source": source.name}


def damaged(what: str, path: Path) -> None:
    content = path.read_bytes()
    if what == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": content[:-1], "longer": content + b"\0", "empty": b"",
                          "altered": content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]}[what])


@pytest.mark.parametrize("what", ["truncated", "longer", "altered", "empty", "missing"])
def test_damage_to_any_file_is_found(language_model: Any, tmp_path: Path, what: str) -> None:
    deployed, source = language_model
    folder = tmp_path / "hf"
    export(deployed, folder, "compressed-tensors", source=source)
    before = contents(folder)
    assert set(verify(folder)["files"]) == set(before) - {"README.md", MANIFEST}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        damaged(what, folder / name)
        with pytest.raises(CheckpointError, match=f"{re.escape(name)} .*(bytes|checksum|missing)"):
            verify(folder)
        (folder / name).write_bytes(before[name])
    if what != "missing":
        damaged(what, folder / MANIFEST)
        with pytest.raises(CheckpointError, match=f"{MANIFEST} .*damaged"):
            verify(folder)
        (folder / MANIFEST).write_bytes(before[MANIFEST])
    (folder / "README.md").write_text("mine")          # a card is for people
    assert verify(folder)["format"] == "compressed-tensors"


def test_a_manifest_that_is_none_of_ours_or_names_other_places(single: Any, tmp_path: Path) -> None:
    single(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="is missing"):
        verify(tmp_path / "other.gguf")
    (tmp_path / "free.gguf").write_bytes(b"anything")
    assert verify(tmp_path / "free.gguf") == {}
    assert verify(tmp_path) == {}
    good = json.loads((tmp_path / "m.gguf.json").read_text())
    del good["digest"]
    outside = {**good, "files": {"../m.gguf": good["files"]["m.gguf"]}}
    for wrong, said in ((outside, "damaged"), ({**good, "qat_export": 9}, "version 9"), ([], "not the manifest"),
                        ({**good, "files": {"m.gguf": 3}}, "damaged"), ({"name": "mine"}, "not the manifest")):
        if isinstance(wrong, dict):
            wrong = {**wrong, "digest": _digest(wrong)}
        (tmp_path / "m.gguf.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=said):
            verify(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match="not the manifest"):     # not ours, so not replaced
        single(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").rename(tmp_path / "n.gguf")
    (tmp_path / "n.gguf.json").write_text(json.dumps({**good, "digest": _digest(good)}))
    with pytest.raises(CheckpointError, match=r"says nothing of n\.gguf"):
        verify(tmp_path / "n.gguf")


def test_an_interrupted_replacement_leaves_no_manifest_that_lies(single: Any, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    single(tmp_path / "m.gguf")
    real = os.replace

    def stops(source: Any, target: Any) -> None:
        real(source, target)
        if Path(target).name == "m.gguf":
            raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stops)
    with pytest.raises(KeyboardInterrupt):
        single(tmp_path / "m.gguf", dequantize=True)
    assert names(tmp_path) == ["README.md", "m.gguf"]
    assert verify(tmp_path / "m.gguf") == {}


def test_a_failed_export_leaves_what_was_there(single: Any, tmp_path: Path) -> None:
    single(tmp_path / "m.gguf")
    before = contents(tmp_path)
    with pytest.raises(UnsupportedError):
        single(tmp_path / "m.gguf", target="vllm")
    with pytest.raises(UnsupportedError):
        single(tmp_path / "new" / "m.gguf", target="vllm")
    assert contents(tmp_path) == before


# -------------------------------------------------------------------------------------------------- cards


def test_a_readme_of_somebody_else_stays(single: Any, tmp_path: Path) -> None:
    """In a folder of the user's own, each file has a card of its own name."""
    for name in ("README.md", "readme.rst"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("my project")
        for _ in range(2):
            assert single(folder / "m.gguf").card == folder / "m.gguf.md"
        assert (folder / name).read_text() == "my project"
        assert names(folder) == sorted([name, "m.gguf", "m.gguf.json", "m.gguf.md"])


def test_a_card_that_was_edited_stays(single: Any, tmp_path: Path) -> None:
    assert single(tmp_path / "m.gguf").card.name == "README.md"
    assert single(tmp_path / "n.gguf").card.name == "n.gguf.md"       # README.md is about m.gguf
    assert single(tmp_path / "m.gguf", dequantize=True).card.name == "README.md"
    (tmp_path / "README.md").write_text("edited")
    assert single(tmp_path / "m.gguf").card.name == "m.gguf.md"
    assert (tmp_path / "README.md").read_text() == "edited"
    (tmp_path / "m.gguf.md").write_text("edited too")
    with pytest.raises(CheckpointError, match=r"m\.gguf\.md is there already"):
        single(tmp_path / "m.gguf")


def test_a_folder_with_more_than_an_export_stays(language_model: Any, tmp_path: Path) -> None:
    deployed, _ = language_model
    folder = tmp_path / "hf"
    export(deployed, folder, "compressed-tensors")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"also holds notes\.txt"):
        export(deployed, folder, "compressed-tensors")
    (folder / "notes.txt").unlink()
    (folder / "README.md").write_text("edited")
    with pytest.raises(CheckpointError, match=r"an edited README\.md"):
        export(deployed, folder, "compressed-tensors")
    (folder / "README.md").unlink()
    (folder / "model.safetensors").write_bytes(b"damaged")
    export(deployed, folder, "compressed-tensors")
    assert verify(folder)


def python_of(card: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)


def works(code: str, folder: Path) -> None:
    """Run it in a process of its own, where this package cannot be imported."""
    code = f"import sys\nsys.modules['qat'] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_code_of_cards_works_torch_export(language_model: Any, deployed: nn.Module, tmp_path: Path) -> None:
    """Without this package, and with nothing but integers where a weight would be."""
    model, _ = language_model
    inputs = {"input_ids": torch.randint(0, 300, (2, 5)), "use_cache": False}
    [lm] = python_of(export(model, tmp_path / "lm" / "m.pt2", "torch-export", example_inputs=inputs).card)
    x = torch.randn(5, 12)
    made = export(deployed, tmp_path / "m.pt2", "torch-export", example_inputs=torch.randn(3, 12))
    [code] = python_of(made.card)
    torch.save((x, deployed(x)), tmp_path / "expected.pt")
    works(code + """
x, expected = torch.load('expected.pt')
with torch.no_grad():
    assert torch.equal(model(x), expected)
held = [*model.parameters(), *model.buffers()]
assert not any(t.is_floating_point() and t.numel() > 7 for t in held), 'the smallest weight has 15 numbers'
assert sum(t.dtype in (torch.int8, torch.uint8) for t in held) >= 3
import os
os.chdir('lm')
""" + lm + "assert output.logits.shape == (2, 5, 300)\n", tmp_path)


def test_code_of_cards_works_transformers(language_model: Any, tmp_path: Path) -> None:
    for package in ("compressed_tensors", "gguf", "accelerate"):
        pytest.importorskip(package)
    model, source = language_model
    made = export(model, tmp_path / "hf", "compressed-tensors", source=source, target="transformers")
    [code] = python_of(made.card)
    file = export(model, tmp_path / "gguf" / "m.gguf", "gguf", source=source, target="llama_cpp")
    [other] = python_of(file.card)
    assert "llama-cli --model m.gguf" in file.card.read_text()
    tokens = torch.randint(0, 300, (3, 7))
    torch.save((tokens, model(tokens).logits), tmp_path / "expected.pt")
    check = ("import torch\ntokens, expected = torch.load('../expected.pt')\nwith torch.no_grad():\n"
             "    assert torch.equal(model(tokens).logits, expected)\n")
    works(f"import os\nos.chdir('hf')\n{code}{check}os.chdir('../gguf')\n{other}{check}", tmp_path)


@pytest.mark.parametrize(("recipe", "target"), [("w8a8", None), ("w4a16", "onnxruntime"), ("w8a16", "openvino")])
def test_code_of_cards_works_onnx(tmp_path: Path, recipe: str, target: str | None) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime", *(["openvino"] if target == "openvino" else [])):
        pytest.importorskip(package)
    x = torch.randn(4, 32)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 3))
    fitted = qat.targets.adjust(qat.Recipe.preset(recipe), target or "generic")[0]
    model = qat.convert(zoo.prepared(model, fitted, [x]), [x])[0]
    made = export(model, tmp_path / "m.onnx", "onnx", example_inputs=x, target=target)
    card = made.card.read_text()
    assert ("accuracy_level" in card) == (target == "onnxruntime")
    [code] = python_of(made.card)
    works(code + "assert outputs[0].shape == (1, 3)", tmp_path)
    assert verify(tmp_path / "m.onnx")["target"] == target


def test_every_format_has_loading_code_and_its_own_targets() -> None:
    assert LOADING.keys() == FORMATS.keys()
    for format, target, expected in (("gguf", "llama_cpp", "llama_cpp"), ("gguf", "vllm", None),
                                     ("compressed-tensors", "vllm", "vllm"), ("torch-export", "vllm", None)):
        assert own_target(format, target) == expected
