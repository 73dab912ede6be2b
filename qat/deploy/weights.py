"""The layers of a deployed model as files see them: held against a target; or linear layers and embeddings alone."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from torch import Tensor, nn

from qat import targets
from qat.errors import UnsupportedError
from qat.modules.base import QuantizedModule
from qat.modules.composite import Composite
from qat.rewriter import prepared_state, quantized_modules

T = TypeVar("T")


def check_layers(model: nn.Module, aim: targets.Target) -> None:
    """Hold every quantized layer of a prepared or deployed model against a target.

    Raises:
        UnsupportedError: one that the target cannot run, by name.
    """
    for name, module in quantized_modules(model).items():
        if not isinstance(module, Composite):
            given = module.plan.input if module.input_quantizer is None else module.input_quantizer.spec
            targets.check(aim, name, module.plan.kind, module.plan.weight, given, module.plan.output,
                          str(module.float_dtype).removeprefix("torch."))


def weight_layers(deployed: nn.Module) -> dict[str, QuantizedModule]:
    """The linear layers and embeddings with integer weights, by name.

    Raises:
        UnsupportedError: something else is quantized; a layer's output is.
    """
    traced = {f"{owner}.{child}".lstrip(".") for owner, made in prepared_state(deployed).plan.traced.items()
              for child in made}
    found: dict[str, QuantizedModule] = {}
    for name, module in quantized_modules(deployed).items():
        plan = module.plan
        if not (plan.weight or plan.input or plan.output or plan.parts):
            continue
        if name in traced or plan.weight is None or plan.parts or plan.kind not in ("Linear", "Embedding"):
            what = f"a quantized {plan.kind}" + (", which was a function call" if name in traced else "")
            raise UnsupportedError(f"{name}: the format holds weights of linear layers and embeddings, not {what}: "
                                   "limit the rules, with match: {type: Linear} say, or keep it float32")
        if plan.output is not None or plan.chained:
            raise UnsupportedError(f"{name}: its output is quantized, which these runtimes do not do: leave out its "
                                   "output spec")
        found[name] = module
    return found


def other_tensors(deployed: nn.Module, layers: dict[str, QuantizedModule]) -> Iterator[tuple[str, Tensor]]:
    """What stays in floating point, biases of ``layers`` included, by name; what is shared comes once."""
    seen: set[tuple[int, int]] = set()
    for name, value in deployed.state_dict().items():
        owner, _, key = name.rpartition(".")
        inside = any(owner == layer or owner.startswith(f"{layer}.") for layer in layers)
        address = (value.data_ptr(), value.numel())
        if (inside and not (owner in layers and key in layers[owner]._parameters)) or address in seen:
            continue
        if value.numel():
            seen.add(address)
        yield name, value.detach().cpu()


def exactly(name: str, write: Callable[[], T], otherwise: Callable[[], T], dequantize: bool | Iterable[str]) -> T:
    """What ``write`` makes of a layer; where it cannot, and ``dequantize`` allows it, what ``otherwise`` does.

    Args:
        dequantize: True, or globs of names.

    Raises:
        UnsupportedError: that of ``write``, with this remedy added.
    """
    try:
        return write()
    except UnsupportedError as error:
        if dequantize is True or any(fnmatch.fnmatchcase(name, glob) for glob in dequantize or ()):
            return otherwise()
        raise UnsupportedError(f"{error}; or dequantize=[{name!r}] to write this layer in floating point") from None
