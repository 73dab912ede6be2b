"""torch.export: a file in torch's own operators that computes what the deployed model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import nn

import qat
from qat.deploy import torch_export
from qat.deploy.export import export
from qat.errors import CheckpointError, UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


def deployed_model(model: nn.Module, recipe: Any, x: Any) -> nn.Module:
    return qat.convert(zoo.prepared(model, recipe, [x]), [x])[0]


def assert_integers_alone(program: torch.export.ExportedProgram, deployed: nn.Module) -> None:
    """The file's tensors are those of the deployed model, which has no float copy of a weight, and a few small ones."""
    own = deployed.state_dict()
    for name, value in torch_export.stored(program).items():        # small: frequencies of a rotary embedding, say
        assert value.numel() <= 16 if name not in own else torch.equal(value, own[name]), name
    assert not [n for n in program.graph.nodes if str(n.target).startswith("qat.")]


CASES = [("mlp", "w8a8"), ("mlp", "w4a16"), ("mlp", "w158a8"), ("conv", "w8a8"), ("tied", "w8a8")]


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_loaded_program_computes_the_same(tmp_path: Path, name: str, recipe: str) -> None:
    x, other = zoo.inputs(name, 20), zoo.inputs(name, 33)
    deployed = deployed_model(zoo.build(name), recipe, x)
    export(deployed, tmp_path / "model.pt2", "torch-export", example_inputs=x)
    program = torch.export.load(tmp_path / "model.pt2")
    assert_integers_alone(program, deployed)
    run = program.module()
    with torch.no_grad():
        for batch in (x, other):        # the batch may vary
            assert torch.equal(run(batch), deployed(batch))


def test_language_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        zoo.language_model_folder(tmp_path / "float", tie_word_embeddings=True, num_hidden_layers=1)).eval()
    batch = {"input_ids": torch.randint(0, 300, (3, 7)), "use_cache": False}
    deployed = deployed_model(model, "w8a8", batch)
    export(deployed, tmp_path / "model.pt2", "torch-export", example_inputs=batch)
    program = torch.export.load(tmp_path / "model.pt2")
    assert_integers_alone(program, deployed)
    tokens = torch.randint(0, 300, (5, 7))
    with torch.no_grad():
        loaded = program.module()(input_ids=tokens, use_cache=False).logits
        assert torch.equal(loaded, deployed(input_ids=tokens).logits)


def test_same_bytes_twice_without_paths(tmp_path: Path) -> None:
    x = zoo.inputs("mlp", 3)
    deployed = deployed_model(zoo.build("mlp"), "w8a8", x)
    for name in ("a.pt2", "b.pt2"):
        export(deployed, tmp_path / name, "torch-export", example_inputs=x, dynamic_shapes=None)
    content = (tmp_path / "a.pt2").read_bytes()
    assert content == (tmp_path / "b.pt2").read_bytes()
    assert str(Path(qat.__file__).parent).encode() not in content
    assert torch.export.load(tmp_path / "a.pt2").example_inputs is None, "data of whoever exported"


class Choosing(nn.Module):
    """A path that depends on values: nothing that torch.export follows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        return y if bool(y.sum() > 0) else -y


def test_what_cannot_be_followed_is_an_error_and_no_file(tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    deployed = deployed_model(Choosing(), {"rules": [{"match": {"type": "Linear"}, "weight": "int8"}]}, x)
    with pytest.raises(UnsupportedError, match="cannot follow Choosing"):
        export(deployed, tmp_path / "model.pt2", "torch-export", example_inputs=x)
    with pytest.raises(UnsupportedError, match="example_inputs"):
        export(deployed, tmp_path / "model.pt2", "torch-export")
    with pytest.raises(UnsupportedError, match="target"):
        export(deployed, tmp_path / "model.pt2", "torch-export", example_inputs=x, target="tensorrt")
    with pytest.raises(CheckpointError, match="folder"):
        export(deployed_model(zoo.mlp(), "w8a16", torch.randn(2, 12)), tmp_path, "torch-export",
               example_inputs=torch.randn(2, 12))
    assert not list(tmp_path.iterdir())
