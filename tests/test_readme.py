"""What the README says is true: its Python runs, its commands run or compose, its files and presets exist."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import zoo
from hydra import compose, initialize_config_dir

import qat
from qat.pipeline import run_config
from qat.recipe import PRESETS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SCRIPTS = [text for kind, text in BLOCKS if kind == "python" and not re.match(r"# \S+\.py\n", text)]
FILES = {found[1]: text for _, text in BLOCKS if (found := re.match(r"# (\S+\.(?:py|yaml))\n", text))}
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line.strip()]
FAST = "trainer.fast_dev_run=true"
EXECUTED = [c for c in COMMANDS if re.search(r"runs/|photos|model=mine|models/mine|plan=", c)]
"""In the README's order: the later ones use what the earlier ones leave. The rest is composed here, and executed by
``tests/e2e`` and the benchmarks."""


def run(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "GOMP_SPINCOUNT": "5000", "COLUMNS": "120"},
    )  # fmt: skip
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README's reader has it: the scripts, the configuration, the README's files, some photos."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("checkout")
    for name in ("train.py", "evaluate.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "conf", folder / "conf")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    for split in ("train", "test"):
        for kind, color in (("cat", 60), ("dog", 200)):
            (folder / "photos" / split / kind).mkdir(parents=True)
            for i in range(12):
                Image.new("RGB", (40, 36), (color, 10 * i, 90)).save(folder / "photos" / split / kind / f"{i}.png")
    zoo.language_model_folder(folder / "models" / "mine")
    (folder / "book.txt").write_text("the quick brown fox jumps over the lazy dog. " * 2000)
    return folder


def test_it_opens_with_the_two_commands() -> None:
    kind, first = BLOCKS[0]
    assert kind == "bash"
    assert [line.split("#")[0].strip() for line in first.splitlines()] == ["make run", "make test"]
    assert README.index("make run") < 40


def test_make_knows_its_targets() -> None:
    for command in COMMANDS:
        if command.startswith("make "):
            target = shlex.split(command, comments=True)[1]
            subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_what_make_run_prints_is_the_table(checkout: Path) -> None:
    """The text block has the lines of a run of today, figures apart."""
    [shown] = [text for kind, text in BLOCKS if kind == "text" and "test examples" in text]
    arguments = ["logger.tensorboard=false", FAST, "hydra.run.dir=runs/shown"]

    def shape(text: str) -> list[str]:
        kept = [re.sub(r"\s+", " ", re.sub(r"[-\d.,:%_x]+", "#", line)).strip() for line in text.splitlines()]
        return [line for line in kept if line and not line.startswith(("run folder", "report", "#/#"))]

    assert shape(shown)[-11:] == shape(run(checkout, "train.py", *arguments))[-11:]


def test_python_runs(tmp_path: Path) -> None:
    assert len(SCRIPTS) >= 4
    (tmp_path / "readme.py").write_text("\n".join(SCRIPTS))
    output = run(tmp_path, "readme.py")
    assert "2 layers, 128 samples: greatest code difference 0" in output
    assert output.count("bit for bit") == 1


def test_recipe_presets_and_names() -> None:
    table = README[README.index("| preset |") : README.index("Below 8 bits")]
    rows = [line.split("|")[1] for line in table.splitlines()[2:] if line.startswith("|")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(PRESETS)
    [change] = re.findall(r"`(qat\.Recipe\.preset\([^`]*\))`", README)
    assert eval(change, {"qat": qat}).edges == "same"
    for name in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"python (\S+\.py)", README):
        assert (ROOT / name).exists(), name


def test_commands_are_shell_and_compose() -> None:
    for command in COMMANDS:
        subprocess.run(["bash", "-n", "-c", command], check=True)
        words = shlex.split(command, comments=True)
        if words[:2] != ["python", "train.py"] or command in EXECUTED:
            continue
        choices = [w for w in words[2:] if w != "-m"]
        lists = next((w.split("=")[1].split(",") for w in choices if w.startswith("recipe=")), [None])
        for recipe in lists:
            overrides = [f"recipe={recipe}" if w.startswith("recipe=") else w for w in choices]
            with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
                run_config(compose("config", overrides))


def test_commands_run(checkout: Path) -> None:
    assert len(EXECUTED) == 12
    for command in EXECUTED:
        words = shlex.split(command, comments=True)[1:]
        if words[0] == "train.py" and not any(w.startswith("resume=") for w in words):
            words += [FAST, "data.batch_size=8", "logger.tensorboard=false"]
            words += ["model.width=4", "model.stages=2"] if "model=cnn" in words else []
        output = run(checkout, *words)
        if "plan=" in command:
            assert "INT4" in output
        elif words[0] == "evaluate.py":
            assert "Every figure equals" in output
        else:
            assert "test examples" in output
