"""The teacher of a run: which one it is, and what it computes, kept on disk."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qat
from qat.compression.distillation import Distiller
from qat.compression.teacher_outputs import Origin, TaughtExamples, TeacherOutputs, digest_of_examples, digest_of_model
from qat.errors import ConfigError
from qat.pipeline.config import OF_THE_TEACHER, OWN, teacher_place
from qat.pipeline.evaluation import load_model, move
from qat.pipeline.storage import write_text
from qat.training.build import build
from qat.training.data import ResumableLoader


def load_teacher(config: Mapping[str, Any], folder: Path, example_inputs: Any) -> nn.Module:
    """The teacher that ``config`` (of the run in ``folder``) names, in eval mode.

    Raises:
        CheckpointError: its weights are missing or damaged.
        ConfigError: it is not where it was.
    """
    section = config["distill"]
    if section["teacher"] == OWN:
        return load_model(config, folder, OWN, example_inputs)
    root, model, described = teacher_place(Path(section["teacher"]), section["teacher_model"])
    if model == "deployed":
        return qat.load(root, build(described["model"], "distill.teacher_model")).eval()
    return load_model(described, root, model, example_inputs)


def check_distillation(
    config: Mapping[str, Any], folder: Path, student: nn.Module, example_inputs: Any
) -> str | None:
    """Let the teacher meet the (float) student before anything is trained; the digest of a teacher from elsewhere.

    Raises:
        ConfigError: they do not fit.
    """
    section = config["distill"]
    own = section["teacher"] == OWN
    teacher = build(config["model"], "model") if own else load_teacher(config, folder, example_inputs)
    distiller = Distiller(options(section), teacher, student, example_inputs)
    prepared = qat.prepare(student, qat.Recipe.from_dict(config["recipe"]), example_inputs)
    distiller.check(prepared)
    return None if own else digest_of_model(teacher)


def remember_teacher(folder: Path, digest: str | None) -> None:
    """Write down who teaches the run in ``folder``.

    Raises:
        ConfigError: it is another one than when the run began.
    """
    path, text = folder / "teacher.json", json.dumps({"sha256": digest})
    if not path.exists():
        write_text(path, text)
    elif path.read_text(encoding="utf-8") != text:
        raise ConfigError(f"The teacher of {folder} is not the one any more that the run began with: start a new run.")


def options(section: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``distill`` that `qat.Distillation` takes."""
    return {key: value for key, value in section.items() if key not in OF_THE_TEACHER}


def check_cache(loader: Any) -> ResumableLoader:
    """The training loader, if what a teacher computes on its examples can be looked up.

    Raises:
        ConfigError: the loader has no numbered examples, or changes them.
    """
    if not isinstance(loader, ResumableLoader):
        raise ConfigError("distill.cache needs a data module whose training loader is a ResumableLoader, which knows "
                          "the number of each example. Set distill.cache=false.")  # fmt: skip
    if loader.augment is not None:
        raise ConfigError("distill.cache keeps what the teacher computes on each example as it is, but augmentation "
                          "changes the examples. Set distill.cache=false, or data.augment=0 and no flips.")  # fmt: skip
    return loader


@contextlib.contextmanager
def taught(data: Any, distiller: Distiller, cache: bool | str, folder: Path, device: torch.device) -> Iterator[bool]:
    """Inside the block, the training batches of ``data`` say what the teacher computes; the teacher is released.

    The table lies in ``folder`` (``cache=True``) or in the folder that ``cache`` names, below a name made of the
    digests of teacher and examples, so that several runs can share it.

    Yields:
        Whether the table was there already.
    """
    data.setup("fit")
    loader = check_cache(data.train_dataloader())
    examples, teacher = loader.examples, distiller.teacher
    assert teacher is not None
    if getattr(data, "train", None) is not examples:
        raise ConfigError("distill.cache needs a data module that loads its training examples from its attribute "
                          "`train`. Set distill.cache=false.")  # fmt: skip
    origin = Origin(digest_of_model(teacher), digest_of_examples(examples, loader.batch_size), distiller.places())
    table = (Path(cache) if isinstance(cache, str) else folder / "teacher") / origin.name()
    found = table.exists()
    if found:
        outputs = TeacherOutputs.open(table, origin)
    else:
        teacher.to(device)
        outputs = TeacherOutputs.make(
            table, lambda inputs: distiller.ask(move(inputs, device)), examples, loader.batch_size, origin
        )
    distiller.release()
    data.train = TaughtExamples(examples, outputs)
    try:
        yield found
    finally:
        data.train = examples
