"""Modules that stay in floating point but in a narrower type: ``keep: float16`` and ``keep: bfloat16``.

In training the float32 master parameters are rounded to the type at every forward; ``freeze`` rounds them once. The
same values enter the same kernels, so prepared and deployed agree.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qat.modules.base import adopt

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class NarrowFloat(nn.Module):
    """Mixin for a module without children that computes in ``narrow``.

    Inputs and parameters are cast to it, outputs back to the dtype that came in.
    """

    narrow: torch.dtype
    frozen_narrow: bool
    float_dtype: torch.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        came = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]
        args = tuple(_cast(a, self.narrow) for a in args)
        kwargs = {k: _cast(v, self.narrow) for k, v in kwargs.items()}
        device = next((t.device.type for t in (*self.parameters(), *came)), "cpu")
        caster = self
        if not self.frozen_narrow:  # a shallow double, so that threads do not see each other's casts
            caster = object.__new__(type(self))
            caster.__dict__.update(self.__dict__)
            caster.__dict__["_parameters"] = {k: _cast(p, self.narrow) for k, p in self._parameters.items()}
        with torch.autocast(device, enabled=False):
            result = super(NarrowFloat, caster).forward(*args, **kwargs)
        return _cast(result, came[0].dtype if came else self.float_dtype)

    def freeze(self) -> None:
        """Round the parameters for good."""
        self.frozen_narrow = True
        for p in self.parameters():
            p.requires_grad_(False)
            p.data = p.data.to(self.narrow)

    skeleton = freeze


def keep_in(module: nn.Module, dtype: str) -> nn.Module:
    """Let a leaf ``module`` compute in ``float16`` or ``bfloat16``, in place; ``float32`` changes nothing."""
    if dtype == "float32":
        return module
    adopted: NarrowFloat = adopt(NarrowFloat, module)
    adopted.narrow, adopted.frozen_narrow = DTYPES[dtype], False
    adopted.float_dtype = next((p.dtype for p in module.parameters()), torch.float32)
    return adopted


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """``value`` with every floating point tensor in it (a recurrent layer's state is a tuple of them) in ``dtype``."""
    return pytree.tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, value)
