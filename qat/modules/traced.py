"""Sums, concatenations and products that a forward makes with functions, turned into modules by tracing.

``a + b``, ``a += b``, ``torch.add``, ``torch.cat``, ``a @ b``, ``torch.matmul`` and ``torch.bmm`` become
:class:`~qat.modules.functional.Add`, ``Concat`` and ``MatMul`` children of the module whose forward makes the call. Its
parameters, children, hooks and state-dict keys stay; only its forward becomes the traced one.

A trace is one path through a forward, so a forward is only taken where there is no other: no optional arguments, the
same graph in training and in eval, nothing that torch.fx cannot follow.
"""

from __future__ import annotations

import inspect
import itertools
import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import fx, nn

from qat.modules.base import adopt
from qat.modules.functional import Add, Concat, MatMul

FUNCTIONS: dict[Any, type[nn.Module]] = {
    operator.add: Add, operator.iadd: Add, torch.add: Add, "add": Add, "add_": Add, torch.cat: Concat,
    torch.concat: Concat, operator.matmul: MatMul, torch.matmul: MatMul, torch.bmm: MatMul, "matmul": MatMul,
    "bmm": MatMul,
}
"""Function, or name of a method -> the module that does the same."""
IN_PLACE = (operator.iadd, "add_")
NO_TENSORS = ("size", "dim", "numel", "shape", "ndim", "__len__", "dtype", "device")
"""Methods and attributes of a tensor whose results are not tensors."""
KINDS: dict[str, type[nn.Module]] = {"Add": Add, "Concat": Concat, "MatMul": MatMul}


class Traced(nn.Module):
    """Mixin of a module whose forward is a traced one, with modules in the place of functions.

    Attributes:
        replaced: names of the children that took the place of functions -> their kind.
        traced_forward: the generated forward; it takes the module as its first argument.
    """

    replaced: dict[str, str]
    traced_forward: Callable[..., Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.traced_forward(self, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "traced_forward"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        graph = _trace(self, _own_forward(self))
        assert graph is not None
        _generate(self, graph, dict(self.replaced))


class _Proxy(fx.Proxy):
    """Tells ``a += b`` from ``a + b``, which torch.fx does not."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Shallow(fx.Tracer):
    """Follows one forward and enters no child."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _own_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward that the author of a module wrote."""
    return next(c.__dict__["forward"] for c in type(module).__mro__ if "forward" in c.__dict__ and c is not Traced)


def _trace(module: nn.Module, forward: Callable[..., Any]) -> fx.Graph | None:
    """The graph of ``forward``; None if there is no single path to trace. ``module`` is left as it was."""
    if any(p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
           for p in list(inspect.signature(forward).parameters.values())[1:]):
        return None
    graphs, kind = [], type(module)
    parts = [(m, m.training) for m in module.modules()]
    try:
        module.__class__ = type(kind.__name__, (kind,), {"forward": forward})
        for training in (True, False):
            for part, _ in parts:
                part.training = training
            graphs.append(_Shallow().trace(module))
    except Exception:  # whatever a forward does with what it is given: then it is not traced
        return None
    finally:
        module.__class__ = kind
        for part, mode in parts:
            part.training = mode
    texts = {g.python_code("self").src for g in graphs}
    return graphs[0] if len(texts) == 1 else None


def _kind(node: fx.Node, module: nn.Module) -> str | None:
    """``Add``, ``Concat`` or ``MatMul`` for a call that such a module can stand in for."""
    if node.op not in ("call_function", "call_method") or node.target not in FUNCTIONS:
        return None
    kind = FUNCTIONS[node.target]
    if kind is Concat:
        parts = node.args[0] if node.args else None
        known = set(node.kwargs) <= {"dim"} and isinstance(_dim(node), int)
        return "Concat" if isinstance(parts, list | tuple) and known and all(map(_is_tensor, parts)) else None
    if node.kwargs or len(node.args) != 2 or not all(map(_is_tensor, node.args)):
        return None
    if node.target in IN_PLACE and not _is_fresh(node.args[0], module, node):
        return None                     # somebody else may see what is overwritten
    if kind is MatMul and any(a.op == "get_attr" for a in node.args):  # type: ignore[union-attr]
        return None                     # a weight: the product is not between activations
    return kind.__name__


def _is_fresh(value: Any, module: nn.Module, reader: fx.Node) -> bool:
    """Whether a node is a tensor that only ``reader`` sees: the result of a layer with parameters, or of a sum."""
    if list(value.users) != [reader]:
        return False
    if value.op == "call_module":
        layer = module.get_submodule(str(value.target))
        return any(True for _ in layer.parameters()) or type(layer) in KINDS.values()
    return value.op == "call_function" and value.target in (operator.add, torch.add, torch.cat, torch.matmul)


def _dim(node: fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)


def _is_tensor(value: Any) -> bool:
    """Whether a node is a tensor, as far as a graph shows; numbers and sizes are not."""
    if not isinstance(value, fx.Node):
        return False
    if value.op == "call_method":
        return value.target not in NO_TENSORS
    if value.op == "call_function" and value.target is getattr:
        return value.args[1] not in NO_TENSORS
    if value.op == "call_function" and getattr(value.target, "__module__", "") in ("_operator", "builtins", "math"):
        return any(_is_tensor(a) for a in value.args)
    return True


def replace_functions(module: nn.Module, kinds: Collection[str]) -> dict[str, str]:
    """Give ``module`` children for the functions of these kinds that its forward calls, in place.

    Returns:
        The names of the new children (``add``, ``add_1``, ...) with their kinds; none where nothing was replaced.
    """
    forward = _own_forward(module)
    if isinstance(module, Traced) or type(module) in KINDS.values() or "forward" in module.__dict__ \
            or forward.__module__.startswith("torch."):
        return {}
    graph = _trace(module, forward)
    if graph is None:
        return {}
    made: dict[str, str] = {}
    for node in graph.nodes:
        kind = _kind(node, module)
        if kind is None or kind not in kinds:
            continue
        name = next(n for n in (kind.lower() + (f"_{i}" if i else "") for i in itertools.count())
                    if not hasattr(module, n))
        child = Concat(_dim(node)) if kind == "Concat" else KINDS[kind]()
        child.training = module.training
        module.add_module(name, child)
        made[name] = kind
    if made:
        adopted: Traced = adopt(Traced, module)
        adopted.replaced = made
        _generate(adopted, graph, dict(made))
    return made


def _generate(module: Traced, graph: fx.Graph, names: dict[str, str]) -> None:
    """Let the forward of ``module`` be that of ``graph``, with the children ``names`` for functions of their kinds."""
    found = [(node, _kind(node, module)) for node in graph.nodes]       # before the first of them changes
    for node, kind in found:
        if kind is None or kind not in names.values():
            continue
        name = next(iter(names))
        assert names.pop(name) == kind
        with graph.inserting_before(node):
            new = graph.call_module(name, tuple(node.args[0]) if kind == "Concat" else node.args)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    module.traced_forward = type(fx.GraphModule(module, graph)).forward


def restore(module: nn.Module) -> None:
    """Undo :func:`replace_functions`."""
    if isinstance(module, Traced):
        for name in module.replaced:
            delattr(module, name)
        del module.replaced, module.traced_forward
        module.__class__ = type(module).__mro__[2]
