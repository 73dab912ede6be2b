"""What does not fit together in a run, known before anything is trained."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torchmetrics import Metric

from qat.errors import ConfigError
from qat.training.build import build
from qat.training.module import call_network, shapes


def check_fit(network: nn.Module, example: Any) -> Any:
    """What the network says of one example of the data.

    Raises:
        ConfigError: it cannot take it (a wrong number of inputs or channels, say).
    """
    try:
        with torch.no_grad(), torch.random.fork_rng():
            return call_network(network.eval(), example)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        said = json.dumps(shapes(example))
        raise ConfigError(f"model: {type(network).__name__} cannot take the inputs that data gives, {said}: "
                          f"{str(error).strip().splitlines()[0]}. Set the options of model= to fit data=.") from error


def check_measures(config: Mapping[str, Any], output: Any, target: Any) -> None:
    """Try the loss and the metrics of ``config`` on what the network says of an example, and on its target.

    Raises:
        ConfigError: one of them cannot compare these.
    """
    for where, measure in (("loss", config["loss"]),
                           *((f"metrics.{name}", metric) for name, metric in config["metrics"].items())):
        measure_of = build(measure, where)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", "Using a target size", UserWarning)  # it would be broadcast
                measure_of.update(output, target) if isinstance(measure_of, Metric) else measure_of(output, target)
        except (RuntimeError, TypeError, ValueError, IndexError, UserWarning) as error:
            raise ConfigError(
                f"{where}: {type(measure_of).__name__} cannot compare what model gives, "
                f"{json.dumps(shapes(output))}, with the target that data gives, {json.dumps(shapes(target))}: "
                f"{str(error).strip().splitlines()[0]}") from error


def check_vocabulary(network: nn.Module, batches: Iterable[Any]) -> None:
    """Refuse tokens that a language model without weights, which cannot be tried yet, has no embedding for.

    Raises:
        ConfigError: there are some.
    """
    table = getattr(network, "get_input_embeddings", lambda: None)()
    tokens = [b for b in batches if isinstance(b, torch.Tensor) and not b.is_floating_point()]
    greatest = max((int(b.max()) for b in tokens), default=0)
    if isinstance(table, nn.Embedding) and greatest >= table.num_embeddings:
        raise ConfigError(f"data gives token {greatest}, but the model knows tokens below {table.num_embeddings} only: "
                          "set data.tokenizer to the folder of its own tokenizer.")
