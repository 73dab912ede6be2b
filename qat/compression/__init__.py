"""Smaller than quantized: pruned weights that are level 0 in the packed integers, and layers with fewer channels."""

from qat.compression.channels import ChannelReport, prune_channels
from qat.compression.pruning import Pruning, prune, sparsity

__all__ = ["ChannelReport", "Pruning", "prune", "prune_channels", "sparsity"]
