"""Low-rank adapters: a frozen weight plus a trained correction of low rank, seen by everyone as one weight.

    weight = base + alpha / rank * (adapter_up @ adapter_down)

(Hu et al. 2021, LoRA.) The quantizer behind it puts *that* weight on its grid, so the adapters are trained against the
very codes that are deployed, and merging them changes no code.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

FACTORS = ("adapter_down", "adapter_up")
SCALING = "adapter_scaling"


class Adapted(nn.Module):
    """Mixin for a module whose ``weight`` is its stored one (the base, frozen) plus a low-rank correction.

    The factors are parameters beside the base, so the state-dict keys are a superset of the plain module's.

    Attributes:
        adapter_down: (rank, weight.numel() / rows), ``rows`` being the first dimension of the weight.
        adapter_up: (rows, rank).
        adapter_scaling: alpha / rank, a buffer: () (so that a checkpoint cannot meet another one unnoticed).
    """

    _prefix: ClassVar[str] = "Adapted"

    adapter_down: Any
    adapter_up: Any
    adapter_scaling: Tensor

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)       # of a weight that functions read it is a view, of what is corrected
        corrected = name == "weight" and found is not None and found is self._parameters.get(name)
        return self.corrected() if corrected and self._parameters.get(FACTORS[0]) is not None else found

    def corrected(self) -> Tensor:
        """The weight that everyone sees, in floating point."""
        base, down, up = (self._parameters[name] for name in ("weight", *FACTORS))
        assert base is not None
        assert down is not None
        assert up is not None
        return adapted_weight(base, down, up, self.adapter_scaling)

    @torch.no_grad()
    def overwrite(self, value: Tensor) -> None:
        """Give the weight that everyone sees this value: the base takes what the correction leaves of it."""
        base = self._parameters["weight"]
        assert base is not None
        dtype = torch.promote_types(base.dtype, torch.float32)
        base.copy_(value.to(dtype) - (self.corrected().to(dtype) - base.to(dtype)))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        """A state dict without the factors is one of the base: nothing is missing then, and the factors stay."""
        absent: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, absent, unexpected, errors)
        factors = [prefix + name for name in (*FACTORS, SCALING)]
        missing += [key for key in absent if key not in factors or any(f in state_dict for f in factors)]


def adapted_weight(base: Tensor, down: Tensor, up: Tensor, scaling: Tensor) -> Tensor:
    """``base + scaling * (up @ down)`` in the shape and dtype of ``base``, computed in float32 at least.

    Autocast is off: the weight that training quantizes has the bits of the one that ``convert`` merges.
    """
    dtype = torch.promote_types(base.dtype, torch.float32)
    with torch.autocast(base.device.type, enabled=False):
        correction = (up.to(dtype) @ down.to(dtype)).mul(scaling)
        return (base.to(dtype) + correction.reshape(base.shape)).to(base.dtype)
