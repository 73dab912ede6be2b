"""Pure functions on tensors: number formats, the one rounding, packing. Rests on nothing but torch."""
