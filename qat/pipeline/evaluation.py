"""Measure the models of a run on its whole test set, from what is on disk."""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

import qat
from qat.compression.channels import take_shapes
from qat.errors import CheckpointError
from qat.pipeline.storage import load_weights
from qat.reporting import Results, Row
from qat.training.build import build
from qat.training.module import call_network

MODELS = ("float", "control", "ptq", "qat", "deployed")


def weights_file(folder: Path, model: str) -> Path:
    """Where the run ``folder`` keeps the weights of a model of the table."""
    return folder / "deployed" / "model.safetensors" if model == "deployed" else folder / model / "weights.safetensors"


def channel_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of the tensors that channel pruning made smaller in the run ``folder``; empty without it.

    Raises:
        CheckpointError: the file that holds them is damaged.
    """
    path = folder / "ptq" / "pruned_shapes.json"
    if not path.exists():
        return {}
    try:
        shapes = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return shapes


def load_model(config: Mapping[str, Any], folder: Path, model: str, example_inputs: Any) -> nn.Module:
    """One model of the table, in eval mode, with the weights of the run ``folder``.

    ``example_inputs`` show ``qat.prepare`` the structure of the network, as they did when it was trained.

    Raises:
        CheckpointError: the stage that makes it has not finished, or its files are damaged.
    """
    network: nn.Module = build(config["model"], "model")
    if model == "deployed":
        return qat.load(folder / "deployed", network).eval()
    if model in ("ptq", "qat"):
        network = take_shapes(network, channel_shapes(folder))
        network = qat.prepare(network, qat.Recipe.from_dict(config["recipe"]), example_inputs)
    load_weights(network, weights_file(folder, model))
    return network.eval()


def measure(
    models: Mapping[str, nn.Module],
    sizes: Mapping[str, int],
    batches: Iterable[tuple[Any, Tensor]],
    metrics: Mapping[str, Any],
    loss: nn.Module,
    device: torch.device,
    repeats: int,
) -> Results:
    """Score, agreement, parity and latency of ``models`` (by their names in the table), batch by batch, in one pass.

    Args:
        models: in eval mode.
        sizes: bytes of each model's weights file.
        batches: (inputs, target).
        metrics: configs of torchmetrics by name; the first one is the score.
        loss: says where the output has its classes (see `predictions`).
        device: where to run.
        repeats: timed passes for each model over the first batch.
    """
    metric_name, metric_config = next(iter(metrics.items()))
    metric: Metric = build(metric_config, f"metrics.{metric_name}")
    scores: dict[str, Metric] = {name: metric.clone().to(device) for name in models}
    agreement = {
        (name, other): MeanMetric().to(device) for name in models for other in ("float", "qat") if other in models
    }
    examples, first, bit_equal, difference = 0, None, True, 0.0
    for model in models.values():
        model.to(device)
    with torch.no_grad():
        for batch in batches:
            inputs, target = move(batch, device)
            first = inputs if first is None else first
            outputs = {name: call_network(model, inputs) for name, model in models.items()}
            for name, output in outputs.items():
                scores[name].update(output, target)
            predicted = {name: predictions(output, target, loss) for name, output in outputs.items()}
            for (name, other), mean in agreement.items():
                one, two = predicted[name], predicted[other]
                if one is not None and two is not None:
                    mean.update((one == two).float())
            if "deployed" in models and "qat" in models:
                deployed, prepared = outputs["deployed"], outputs["qat"]
                bit_equal &= torch.equal(deployed, prepared)
                difference = max(difference, (deployed.double() - prepared.double()).abs().max().item())
            examples += len(target)
        if first is None:
            raise CheckpointError("The test set is empty: there is nothing to measure.")
        latency = alternating_latency(models, first, repeats, device)
    shares = {pair: float(mean.compute()) for pair, mean in agreement.items() if mean.update_called}
    compared = "deployed" in models and "qat" in models
    return Results(
        metric=metric_name,
        rows=[
            Row(
                name,
                float(scores[name].compute()),
                shares.get((name, "float")),
                shares.get((name, "qat")),
                sizes[name],
                latency[name],
            )
            for name in models
        ],
        bit_equal=bit_equal if compared else None,
        greatest_difference=difference if compared else None,
        examples=examples,
        batch_size=batch_size(first),
        higher_is_better=metric.higher_is_better is not False,
        proportion=(metric.plot_lower_bound, metric.plot_upper_bound) == (0.0, 1.0),
    )


def predictions(output: Tensor, target: Tensor, loss: nn.Module) -> Tensor | None:
    """The predicted class of each example, or of each position that counts; flat.

    The classes are dimension ``loss.class_dim`` of the output; 1, as for torch's own losses, where the loss does not
    say. None where there is no class to predict: the target is floating point, or the output has no such dimension.
    """
    dim = getattr(loss, "class_dim", 1)
    if target.is_floating_point() or not -output.ndim <= dim < output.ndim:
        return None
    predicted = output.argmax(dim)
    ignored = getattr(loss, "ignore_index", None)
    if ignored is not None and predicted.shape == target.shape:
        return predicted[target != ignored]
    return predicted.flatten()


def alternating_latency(
    models: Mapping[str, nn.Module], inputs: Any, repeats: int, device: torch.device
) -> dict[str, float]:
    """Median milliseconds of a forward pass. The models take turns, so that a disturbance meets all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for turn, (name, model) in itertools.product(range(repeats + 2), models.items()):
        _wait(device)
        start = time.perf_counter()
        call_network(model, inputs)
        _wait(device)
        if turn >= 2:  # the first turns warm caches up
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def move(inputs: Any, device: torch.device) -> Any:
    """Inputs (a tensor, a tuple or a dict of them) on ``device``."""
    return _map(inputs, lambda tensor: tensor.to(device))


def first_example(inputs: Any) -> Any:
    """The first example of a batch of inputs, as a batch of one."""
    return _map(inputs, lambda tensor: tensor[:1])


def batch_size(inputs: Any) -> int:
    """Examples in a batch of inputs."""
    while not isinstance(inputs, Tensor):
        inputs = next(iter(inputs.values() if isinstance(inputs, Mapping) else inputs))
    return len(inputs)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Mapping):
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_map(item, change) for item in value)
    return change(value)
