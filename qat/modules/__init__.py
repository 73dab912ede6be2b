"""Quantized modules. Importing this package registers all of them."""

from qat.modules import convolution, functional, linear, normalization, precision
from qat.modules.base import REGISTRY, LayerPlan, QuantizedModule, register
from qat.modules.functional import Add, Concat, MatMul

__all__ = ["REGISTRY", "Add", "Concat", "LayerPlan", "MatMul", "QuantizedModule", "convolution", "functional", "linear",
           "normalization", "precision", "register"]
