"""Quantized modules. Importing this package registers all of them."""

from qat.modules import attention, composite, convolution, functional, linear, normalization, precision, recurrent
from qat.modules.base import REGISTRY, LayerPlan, QuantizedModule, register
from qat.modules.functional import Add, Concat, MatMul

__all__ = ["REGISTRY", "Add", "Concat", "LayerPlan", "MatMul", "QuantizedModule", "attention", "composite",
           "convolution", "functional", "linear", "normalization", "precision", "recurrent", "register"]
