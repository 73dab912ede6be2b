"""Modules that hold several weights and make several products: recurrent layers, attention.

Such a module is a :class:`Composite`. Each of its products is a :class:`Part`: a child module with a plan, a weight
quantizer and an input quantizer of its own, whose float weight stays where it was, a parameter of the composite (whole,
or some rows of it: the q, k and v of one stacked matrix). So state-dict keys, optimizers and initializations see the
float module's parameters and nothing else, and everything that walks over quantized modules (calibrate, convert,
coverage, checkpoints) finds the parts like any other layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qat.kernels import ste, weight_only
from qat.kernels.contract import Weight
from qat.modules.base import LayerPlan, QuantizedModule, drop_float, overwrite
from qat.numerics.tensor import QuantizedTensor
from qat.quantizers.quantizer import Quantizer


@dataclass(frozen=True)
class Source:
    """Where the float weight and bias of a part live, as dotted attributes of the composite.

    Attributes:
        weight: the parameter (``weight_ih_l0``, ``out_proj.weight``).
        bias: the bias, or None.
        rows: the rows of both that belong to the part, from and to; None: all.
        bias_rows: the same for the bias, where they are others (separate matrices, one stacked bias).
    """

    weight: str
    bias: str | None = None
    rows: tuple[int, int] | None = None
    bias_rows: tuple[int, int] | None = None

    def holder(self, owner: nn.Module) -> nn.Module:
        """The module that holds the weight: the composite, or a child of it."""
        return owner.get_submodule(self.weight.rpartition(".")[0])

    @property
    def attribute(self) -> str:
        """The weight's name in its holder."""
        return self.weight.rpartition(".")[2]

    def read(self, owner: nn.Module, path: str) -> Any:
        """The part's rows of the attribute ``path``."""
        value: Any = owner
        for step in path.split("."):
            value = getattr(value, step)
        rows = self.rows_of(path)
        return value if rows is None or value is None else value[rows[0] : rows[1]]

    def rows_of(self, path: str) -> tuple[int, int] | None:
        """Which rows of the attribute ``path`` belong to the part; None: all."""
        return self.bias_rows if path == self.bias and self.bias_rows is not None else self.rows


@dataclass
class Operand:
    """The weight of a part, ready for any number of products: quantized once, not once for each product.

    Attributes:
        values: the float weight, where the product is a floating point one; else None.
        codes: the quantized weight, where the product is an integer one; else None.
        kernel: ``codes`` as kernels take them.
        bias: (out,), or None.
    """

    values: Tensor | None
    codes: QuantizedTensor | None
    kernel: Weight | None
    bias: Tensor | None


class Part(QuantizedModule):
    """One product of a composite: ``y = x @ w.T + b`` for x (..., in) and w (out, in), on integers.

    It owns no parameter: weight and bias are read from the composite until ``freeze``, then it owns the packed codes of
    its weight, while the bias stays with the composite.

    Attributes:
        source: where the weight and the bias are.
    """

    source: Source
    _owner: list[nn.Module]

    def __init__(self, owner: nn.Module, name: str, plan: LayerPlan, source: Source) -> None:
        super().__init__()
        self._owner, self.source = [owner], source      # in a list: a module in an attribute would become a child
        self.training = owner.training
        self.equip(name, plan)

    @property
    def owner(self) -> nn.Module:
        """The composite."""
        return self._owner[0]

    def __getattr__(self, name: str) -> Any:
        if name == "bias":
            return None if self.source.bias is None else self.source.read(self.owner, self.source.bias)
        if name == "weight" and not self.frozen:
            return self.source.read(self.owner, self.source.weight)
        return super().__getattr__(name)

    def channels(self, role: str) -> tuple[int, ...]:
        return (self.weight.shape[1],) if role == "input" else ()

    def device(self) -> torch.device:
        return self.weight_codes.device if self.frozen else self.weight.device

    def initial_dtype(self) -> torch.dtype:
        return self.weight.dtype

    def input_rows(self, x: Tensor | QuantizedTensor) -> Tensor:
        return self.float_input(x).reshape(1, -1, self.weight.shape[1])

    def overwrite_weight(self, value: Tensor) -> None:
        holder, rows = self.source.holder(self.owner), self.source.rows
        if rows is not None:
            whole = getattr(holder, self.source.attribute).detach().clone()
            whole[rows[0] : rows[1]] = value
            value = whole
        overwrite(holder, self.source.attribute, value)

    def drop_float_weight(self) -> None:
        """Let the composite forget the parameter, once no part needs it any more."""
        readers = [p for p in self.owner.children() if isinstance(p, Part) and p.source.weight == self.source.weight]
        if all(p.frozen for p in readers):
            drop_float(self.source.holder(self.owner), self.source.attribute)

    def operand(self, dtype: torch.dtype) -> Operand:
        """The weight, for products with activations of ``dtype``."""
        if self.calibrating or self.plan.weight is None:
            return Operand(self.float_weight().to(dtype), None, None, self.bias)
        weight = self.quantized_weight()
        if self.plan.input is None:
            return Operand(weight.dequantize(dtype), None, None, self.bias)
        return Operand(None, weight, self.kernel_weight(weight) or Weight.of(weight), self.bias)

    def forward(self, input: Tensor | QuantizedTensor, operand: Operand | None = None,
                dtype: torch.dtype | None = None) -> Tensor:
        """The product.

        Args:
            input: (..., in), floating point or codes.
            operand: what :meth:`operand` returned, where it is used more than once.
            dtype: of the result; None: what the float layer would return.
        """
        x = input
        operand = operand or self.operand(x.dtype)
        if operand.codes is None:
            assert operand.values is not None
            y = weight_only.linear(self.float_input(x), operand.values, operand.bias)
            return y if dtype is None else y.to(dtype)
        codes = self.quantized_input(x)
        call = ste.Product(codes, operand.codes, operand.kernel, backward_dtype=self.backward_type(codes),
                           whole_bias=self.plan.requantize)
        return ste.product(call, operand.bias, dtype or self.result_dtype(codes))

    def extra_repr(self) -> str:
        return ", ".join([f"{self.source.weight}{'' if self.source.rows is None else list(self.source.rows)}",
                          *(t for t in (super().extra_repr(),) if t)])


class Composite(QuantizedModule):
    """A module whose products are parts. It has no weight and no input quantizer itself; it may have an output's."""

    is_composite: ClassVar[bool] = True
    products: ClassVar[dict[str, Any]] = {}
    """Products of two activations: name -> class of the child, built from (composite, dotted name, plan)."""

    @classmethod
    def sources(cls, module: nn.Module) -> dict[str, Source]:
        """The parts of a float module of the type that ``cls`` replaces: name -> where its weight is, in the order in
        which they run."""
        raise NotImplementedError

    @classmethod
    def edge(cls, names: Sequence[str], first: bool) -> Sequence[str]:
        """Which of its parts count as the model's first (or last) layer where the composite is that layer."""
        return names[:1] if first else names[-1:]

    @classmethod
    def swap(cls, module: nn.Module, name: str, plan: LayerPlan, weight_quantizer: Quantizer | None = None) -> Any:
        adopted = super().swap(module, name, plan)
        for part, source in cls.sources(module).items():
            adopted.add_module(part, Part(adopted, f"{name}.{part}" if name else part, plan.parts[part], source))
        for product, kind in cls.products.items():
            adopted.add_module(product, kind(adopted, f"{name}.{product}" if name else product, plan.parts[product]))
        return adopted

    @property
    def between_activations(self) -> dict[str, QuantizedModule]:
        """The products of two activations, by name."""
        return {n: self._modules[n] for n in self.products}  # type: ignore[misc]

    @property
    def parts(self) -> dict[str, Part]:
        """The products, by name."""
        return {n: m for n, m in self._modules.items() if isinstance(m, Part)}

    def finished(self, y: Tensor) -> Tensor:
        """The output, on the grid of the output quantizer if there is one; composites pass values on, not codes."""
        result = self.finish(y)
        assert isinstance(result, Tensor)
        return result

    def part_macs(self, total: int) -> dict[str, int]:
        """The multiply-accumulates of each part where the composite made ``total``: each weight is used as often."""
        sizes = {n: p.weight.numel() for n, p in self.parts.items()}
        return {n: total * size // max(1, sum(sizes.values())) for n, size in sizes.items()}

    def __getattr__(self, name: str) -> Any:
        """A frozen composite still answers to its weights: dequantized anew at each access, never stored."""
        readers = [m for m in self.__dict__.get("_modules", {}).values()
                   if isinstance(m, Part) and m.source.weight == name and m.frozen]
        if readers and name not in self._parameters:
            readers.sort(key=lambda p: p.source.rows or (0, 0))
            return readers[0].weight if len(readers) == 1 else torch.cat([p.weight for p in readers])
        return super().__getattr__(name)
