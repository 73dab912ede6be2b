"""Recipes: rules, presets, YAML and dicts, and what is refused (fault 17)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
import zoo
from torch import nn

import qat
from qat.errors import RecipeError
from qat.recipe import PRESETS

REFUSED: list[tuple[Any, str]] = [
    ({"ruels": []}, "'rules'"), ({"rules": [], "edges": "int4"}, "int8, same"),
    ({"rules": [], "backward_dtype": "fp32"}, "float32"),
    ({"rules": [{"match": {"name": "x"}}]}, "needs a weight"), ({"rules": [{"weight": "int9"}]}, "'int8'"),
    ({"rules": [{"weigth": "int8"}]}, "'weight'"), ({"rules": [{"match": {"nmae": "x"}, "weight": "int8"}]}, "'name'"),
    ({"rules": [{"weight": {"format": "int8", "granularity": "per_token", "dynamic": True}}]},
     "weights have no tokens"),
    ({"rules": [{"weight": {"format": "int0"}}]}, "int0"), ({"rules": [{"weight": "uint8"}]}, "negative"),
    ({"rules": [{"input": {"format": "int8", "granularity": "per_channel"}}]}, "integer sum"),
    ({"rules": [{"keep": "float31"}]}, "float32"), ({"rules": [{"keep": "float32", "weight": "int8"}]}, "no place"),
    ({"preset": "w8a9"}, "'w8a8'"), ({"preset": "w8a8", "wieght": {}}, "'weight'"),
    ({"preset": "fp16", "weight": {}}, "no weight"),
    ({"preset": "w8a16", "input": {"format": "int8"}}, "no input"), ({"rules": [], "calibration": ["gtpq"]}, "gtpq"),
    ([], "mapping"), (None, "mapping"), (5, "mapping"), ("w8a8", "mapping"), ({"rules": 5}, "list"),
    ({"rules": {}, "edges": ["int8"]}, "edges"),
    ({"rules": [5]}, "mapping"), ({"rules": [{"match": 5, "weight": "int8"}]}, "mapping"),
    ({"rules": [{"weight": 5}]}, "mapping"), ({"rules": [{"weight": {"format": ["int8"]}}]}, "format"),
    ({"rules": [{"keep": ["float32"]}]}, "keep"), ({"preset": "w8a8", "weight": 5}, "weight"),
    ({"preset": "w8a8", "rules": 5}, "rules"), ({"rules": [], "calibration": 5}, "calibration"),
    ({"rules": [], "calibration": {"gptq": {"dump": 1}}}, "'damp'"),
    ({"rules": [], "calibration": ["gptq", "adaround"]}, "adaround"), ({"preset": ["w8a8"]}, "preset"),
]


@pytest.mark.parametrize(("data", "says"), REFUSED, ids=lambda v: str(v)[:60])
def test_wrong_recipes_are_refused_at_once(data: Any, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        qat.Recipe.from_dict(data)


def test_rules_may_be_mappings_wherever_a_recipe_is_made() -> None:
    rule = {"weight": {"format": "int8", "granularity": "per_channel"}}
    made = qat.Recipe(rules=[rule])
    assert made == qat.Recipe.from_dict({"rules": [rule]}) == qat.Recipe((qat.Rule.from_dict(rule),))
    for wrong, says in ((5, "list of rules"), (["w8a8"], "a rule is a mapping"), ([{"wieght": 1}], "'weight'")):
        with pytest.raises(RecipeError, match=says):
            qat.Recipe(rules=wrong)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_way_to_a_file_and_back(name: str, tmp_path: Path) -> None:
    recipe = qat.Recipe.preset(name)
    recipe.save(tmp_path / "recipe.yaml")
    again = qat.Recipe.load(tmp_path / "recipe.yaml")
    assert again == recipe
    assert again.name == name
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == recipe.to_dict()
    assert qat.Recipe.from_dict({"preset": name}) == recipe


def test_the_presets_of_the_design_exist() -> None:
    assert set(PRESETS) >= {"w8a8", "w8a8_dynamic", "w8a16", "w4a16", "w4a8", "w8a4", "w4a4", "w3a8", "w2a8", "w2a2",
                            "w158a8", "w1a8", "w1a1", "w3a16", "w2a16", "w1a16", "fp16", "bf16"}
    assert all(qat.Recipe.preset(n).edges == "int8" for n in PRESETS if n[1] in "1234" and n[0] == "w")


def test_presets_take_overrides() -> None:
    recipe = qat.Recipe.preset("w4a16", weight={"group_size": 32}, edges="same",
                               rules=[{"match": {"name": "head"}, "keep": "float32"}])
    assert recipe.rules[0].keep == "float32"
    assert recipe.rules[-1].weight is not None
    assert recipe.rules[-1].weight.group_size == 32
    assert recipe.edges == "same"
    assert qat.Recipe.preset("w4a16").edges == "int8", "the preset itself was changed"


@pytest.mark.parametrize(("content", "says"),
                         [(b"rules: [", "not YAML"), (b"\xff\xfe\x00", "not YAML"), (b"", "mapping"),
                                               (b"- 1", "mapping"), (b"rulse: []", "'rules'")])
def test_files_are_named_in_errors(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=rf"mine\.yaml.*{says}"):
        qat.Recipe.load(path)
    with pytest.raises(RecipeError, match="nowhere"):
        qat.Recipe.load(tmp_path / "nowhere.yaml")


def test_yaml_cannot_name_code(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (tmp_path / "bad.yaml").write_text(f"rules: !!python/object/apply:os.mkdir ['{marker}']")
    with pytest.raises(RecipeError):
        qat.Recipe.load(tmp_path / "bad.yaml")
    assert not marker.exists()


# ------------------------------------------------------------------------------------------------ matching


def status(recipe: dict[str, Any], model: nn.Module | None = None) -> dict[str, str]:
    model = model if model is not None else nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 1), nn.LayerNorm(4))
    rows = qat.coverage(qat.prepare(model, recipe)).rows
    return {r.name: r.weight or r.reason for r in rows if r.kind != "function"}


def test_the_first_rule_that_matches_wins() -> None:
    rules = [{"match": {"name": "0"}, "weight": "int4"}, {"match": {"type": "Linear"}, "weight": "int8",
                                                          "optional": True},
             {"weight": "int3"}]
    result = status({"rules": rules})
    assert result["0"].startswith("int4")
    assert result["1"].startswith("int3")
    assert "LayerNorm" in result["2"]


def test_globs_types_and_base_types() -> None:
    model = nn.ModuleDict({"enc": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "head": nn.Linear(4, 2)})
    assert status({"rules": [{"match": {"name": "enc.*"}, "weight": "int8"}]}, model)["head"] == "no rule matches"
    result = status({"rules": [{"match": {"name": "head", "type": "Linear"}, "weight": "int8"}]}, model)
    assert result["enc.0"] == "no rule matches"
    assert result["head"].startswith("int8")
    assert status({"rules": [{"match": {"type": "_ConvNd"}, "weight": "int8"}]})["1"].startswith("int8")


@pytest.mark.parametrize("rule", [
    {"match": {"name": "haed"}, "weight": "int8"}, {"match": {"type": "Conv2d"}, "weight": "int8"},
    {"match": {"name": "0", "type": "Conv1d"}, "weight": "int8"}, {"match": {"type": "linear"}, "weight": "int8"},
    {"match": {"type": "LayerNorm"}, "weight": "int8"}, {"match": {"name": "nothing*"}, "keep": "float32"}], ids=str)
def test_a_rule_that_matches_nothing_is_an_error(rule: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="matches nothing"):
        status({"rules": [rule, {"weight": "int8"}]})
    status({"rules": [{**rule, "optional": True}, {"weight": "int8"}]})


def test_edges_are_int8_unless_they_are_named() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    rules = [{"weight": "int4", "input": "int4"}]
    for traced in (torch.randn(2, 4), None):
        rows = qat.coverage(qat.prepare(model, {"rules": rules, "edges": "int8"}, example_inputs=traced)).rows
        bits = [(r.weight.split()[0], r.input.split()[0]) for r in rows if r.kind == "Linear"]
        assert bits == [("int8", "int8"), ("int4", "int4"), ("int4", "int4"), ("int8", "int8")]
        assert "edge" in rows[0].reason
    named = [{"match": {"name": "3"}, "weight": "int2", "input": "int8"}, *rules]
    rows = qat.coverage(qat.prepare(model, {"rules": named, "edges": "int8"})).rows
    assert rows[3].weight.startswith("int2")
    same = qat.coverage(qat.prepare(model, {"rules": rules})).rows
    assert same[0].weight.startswith("int4")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("model", [*zoo.ZOO, "only linear", "only conv", "only embedding"])
def test_every_preset_prepares_every_model(preset: str, model: str) -> None:
    """Presets serve any model: none of their rules is an error where it happens to match nothing."""
    if preset == "w1a1" and model in ("transposed", "1d", "3d"):
        return
    small: dict[str, nn.Module] = {"only linear": nn.Linear(8, 8), "only conv": nn.Conv2d(8, 8, 1),
                                   "only embedding": nn.Embedding(8, 8)}
    built = small[model] if model in small else zoo.build(model)
    assert qat.coverage(qat.prepare(built, preset)).rows
