"""Measure the models of a run on its whole test set, from what is on disk."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

import qat
from qat.compression.channels import take_shapes
from qat.deploy.streaming import read_weights, without_weights
from qat.errors import CheckpointError
from qat.pipeline.storage import load_weights, read_json
from qat.reporting import Results, Row
from qat.runtimes.timing import alternating_times
from qat.training.build import build
from qat.training.module import call_network
from qat.training.pretrained import decoding

MODELS = ("float", "control", "ptq", "qat", "deployed")


def weights_file(folder: Path, model: str) -> Path:
    """Where the run ``folder`` keeps the weights of a model of the table: a file, or the folder of a deployed one."""
    return folder / "deployed" if model == "deployed" else folder / model / "weights.safetensors"


def float_source(config: Mapping[str, Any], folder: Path) -> Path:
    """The folder of a pretrained model's weights by the network's own names: its own, or one in the run folder."""
    renamed = folder / "renamed"
    return renamed if renamed.is_dir() else Path(config["pretrained"])


def stored_bytes(path: Path) -> int:
    """Bytes of a file of weights, or of all those in a folder."""
    return sum(p.stat().st_size for p in (path.glob("*.safetensors") if path.is_dir() else [path]))


def fits_in_memory(size: int) -> bool:
    """Whether so many bytes of weights leave room enough to work with them."""
    return size < 0.6 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def channel_shapes(folder: Path) -> dict[str, list[int]]:
    """Shapes of the tensors that channel pruning made smaller in the run ``folder``; empty without it.

    Raises:
        CheckpointError: the file that holds them is damaged.
    """
    path = folder / "ptq" / "pruned_shapes.json"
    return read_json(path) if path.exists() else {}


def load_model(config: Mapping[str, Any], folder: Path, model: str, example_inputs: Any) -> nn.Module:
    """One model of the table, in eval mode, with the weights of the run ``folder``.

    ``example_inputs`` show ``qat.prepare`` the structure of the network, as they did when it was trained.

    Raises:
        CheckpointError: the stage that makes it has not finished, or its files are damaged.
    """
    if config.get("pretrained") and model == "float":
        with without_weights():
            network: nn.Module = build(config["model"], "model")
        return read_weights(network, float_source(config, folder)).eval()
    network = build(config["model"], "model")
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
    prepared: str = "qat",
) -> Results:
    """Score, agreement, parity and latency of ``models`` (by their names in the table), batch by batch, in one pass.

    Args:
        models: in eval mode; one whose parameters have no storage (it reads them as it goes) is not timed.
        sizes: bytes of each model's weights file.
        batches: (inputs, target).
        metrics: configs of torchmetrics by name; the first one is the score.
        loss: says where the output has its classes (see `predictions`).
        device: where to run.
        repeats: timed passes for each model over the first batch.
        prepared: which model the deployed one was made of.
    """
    metric_name, metric_config = next(iter(metrics.items()))
    metric: Metric = build(metric_config, f"metrics.{metric_name}")
    scores: dict[str, Metric] = {name: metric.clone().to(device) for name in models}
    divergence = {name: MeanMetric().to(device) for name in models}
    agreement = {
        (name, other): MeanMetric().to(device) for name in models for other in ("float", prepared) if other in models
    }
    examples, first, bit_equal, difference = 0, None, True, 0.0
    there = {name: model for name, model in models.items() if not any(p.is_meta for p in model.parameters())}
    for model in there.values():
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
            if "float" in models and getattr(loss, "class_dim", 1) == -1:
                for name, mean in divergence.items():
                    mean.update(kl(outputs["float"], outputs[name]))
            if "deployed" in models and prepared in models:
                deployed, before = outputs["deployed"], outputs[prepared]
                bit_equal &= torch.equal(deployed, before)
                difference = max(difference, (deployed.double() - before.double()).abs().max().item())
            examples += len(target)
        if first is None:
            raise CheckpointError("The test set is empty: there is nothing to measure.")
        latency = alternating_times({n: functools.partial(call_network, m, first) for n, m in there.items()}, repeats,
                                    device)
        steps = {n: step for n, m in there.items() if isinstance(first, Tensor) and (step := decoding(m, first[:1]))}
        decode = alternating_times(steps, repeats, device)
    shares = {pair: float(mean.compute()) for pair, mean in agreement.items() if mean.update_called}
    compared = "deployed" in models and prepared in models
    return Results(
        metric=metric_name,
        rows=[
            Row(
                name,
                float(scores[name].compute()),
                shares.get((name, "float")),
                shares.get((name, prepared)),
                sizes[name],
                latency.get(name),
                float(divergence[name].compute()) if divergence[name].update_called else None,
                decode.get(name),
                qat.resident_bytes(models[name]) if name in there else None,
            )
            for name in models
        ],
        bit_equal=bit_equal if compared else None,
        greatest_difference=difference if compared else None,
        examples=examples,
        batch_size=batch_size(first),
        tokens=first.numel() if decode and isinstance(first, Tensor) else None,
        higher_is_better=metric.higher_is_better is not False,
        prepared=prepared,
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


def kl(expected: Tensor, output: Tensor) -> Tensor:
    """Mean Kullback-Leibler divergence, in nats, of what a model says from what the float model says: logits
    (..., classes)."""
    wanted, said = (t.float().log_softmax(-1).flatten(0, -2) for t in (expected, output))
    return nn.functional.kl_div(said, wanted, log_target=True, reduction="batchmean")


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
