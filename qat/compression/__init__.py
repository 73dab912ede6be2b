"""Smaller models by other means than number formats, and what helps narrow ones to learn: low-rank adapters, pruned
weights that are level 0 in the packed integers, narrower layers, teachers."""

from qat.compression.adapters import adapter_state, add_adapters, load_adapter_state, merge_adapters
from qat.compression.channels import ChannelReport, prune_channels
from qat.compression.distillation import Distillation, Distiller
from qat.compression.pruning import Pruning, prune, sparsity

__all__ = ["ChannelReport", "Distillation", "Distiller", "Pruning", "adapter_state", "add_adapters",
           "load_adapter_state", "merge_adapters", "prune", "prune_channels", "sparsity"]
