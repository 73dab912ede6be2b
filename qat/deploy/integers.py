"""Weights as the integers that files of other runtimes hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from qat.modules.base import QuantizedModule


class Integers:
    """A weight as runtimes hold it: ``(codes - zero_point) * scale``, output channels first.

    Codes of grids other than affine are stored as the levels they stand for. Where a folded batch norm has made a scale
    negative, codes and zero point are mirrored, so that all scales are positive and no value changes; of a symmetric
    channel that holds the lowest code, which has no mirror image, the negative scale stays.

    Attributes:
        dead: channels (or groups) whose weights are all zero; their scale is any.
        codes: int8 or uint8. ``scale``: float32, () or (out,) or (out, groups). ``zero_point``: likewise, or None.
        group: inputs that share a scale, or None.
        bits: 4 or 8, the narrowest of those that holds them.
    """

    def __init__(self, layer: QuantizedModule) -> None:
        weight = layer.quantized_weight()
        fmt, spec = weight.spec.fmt, weight.spec
        codes: Any = fmt.levels(weight.codes).numpy().copy()
        scale: Any = (weight.scale * fmt.unit).numpy().astype(np.float32)
        point = None if weight.zero_point is None else torch.as_tensor(weight.zero_point).numpy()
        lo, hi = (0, 255) if codes.dtype == np.uint8 else (-128, 127)
        self.group = spec.group_size
        flat = codes.reshape(*scale.shape, -1) if scale.ndim else codes.reshape(1, -1)
        points: Any = None if point is None else np.broadcast_to(point, scale.shape).copy()
        rows: Any = np.atleast_1d(scale)
        if point is None:
            dead = (rows == 0) | ~flat.any(-1)
            flat[dead] = 0
            mirrored = (rows < 0) & (flat.min(-1) > lo)
            flat[mirrored] = -flat[mirrored]
        else:
            points = np.atleast_1d(points)
            dead = (rows == 0) | (flat == points[..., None]).all(-1)
            flat[dead] = points[dead][..., None].astype(codes.dtype)
            mirrored = rows < 0
            flat[mirrored] = (lo + hi - flat[mirrored].astype(np.int16)).astype(codes.dtype)
            points[mirrored] = lo + hi - points[mirrored]
        rows = np.where(mirrored, -rows, np.where(dead, np.float32(1.0), rows)).astype(np.float32)
        self.dead = dead
        self.codes = flat.reshape(codes.shape)
        self.scale = rows.reshape(scale.shape)
        self.zero_point = None if points is None else points.reshape(scale.shape).astype(codes.dtype)
        every = self.codes if points is None else np.concatenate([self.codes.ravel(), points.ravel()])
        four = (0, 15) if codes.dtype == np.uint8 else (-8, 7)
        self.bits = 4 if fmt.bits <= 4 and every.min() >= four[0] and every.max() <= four[1] else 8

    @property
    def per_channel(self) -> bool:
        return self.scale.ndim == 1

    @property
    def signed(self) -> bool:
        return self.codes.dtype == np.int8
