"""What every quantized module is made of.

A quantized module *is* the module it replaces (same class, same attributes, same hooks, same parameters) with three
quantizers: of its weight, its input and its output. Its forward is the same before and after ``convert``; only where
the codes of the weight come from changes: from a float master weight and its quantizer, or from packed codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qat.errors import CalibrationError, ConvertError, UnsupportedError
from qat.kernels import requantize, ste
from qat.kernels.contract import Weight
from qat.modules.adapted import Adapted
from qat.numerics import affine, packing
from qat.numerics.formats import TensorSpec
from qat.numerics.tensor import PackedTensor, QuantizedTensor
from qat.quantizers.quantizer import FrozenQuantizer, Quantizer, StaticQuantizer, make_quantizer


@dataclass
class LayerPlan:
    """What ``prepare`` decided for one module; a deployed checkpoint stores it, so that ``load`` decides the same.

    Attributes:
        kind: name of the module type in the registry (``Linear``, ``Conv2d``, ...).
        weight, input, output: specs, or None for "stays float".
        absorbs: clamp ``[floor, ceiling]`` of the activation function in front that the input quantizer takes over.
        output_absorbs: the same for the activation function behind and the output quantizer.
        batch_norm: name of the batch norm behind that is folded in eval.
        chained: the input arrives as codes from the layer in front, so there is no input quantizer.
        emits_codes: every consumer of the output takes codes, so no float tensor is made.
        requantize: the bias is a whole number of steps of the accumulator, and codes are made of codes, see
            :class:`~qat.recipe.Recipe`.
        tied_to: name of the module whose weight, and weight quantizer, this one shares.
        layout: of a parameter that functions read (see :mod:`qat.modules.parameters`): ``rows`` (..., out, in),
            ``columns`` (..., in, out), ``kernel`` or ``table``.
        parts: for a composite (see :mod:`qat.modules.composite`): the plan of each of its products.
        reason: why the specs differ from the rule, if they do; for coverage.
    """

    kind: str
    weight: TensorSpec | None = None
    input: TensorSpec | None = None
    output: TensorSpec | None = None
    absorbs: tuple[float | None, float | None] | None = None
    output_absorbs: tuple[float | None, float | None] | None = None
    batch_norm: str | None = None
    chained: bool = False
    emits_codes: bool = False
    requantize: bool = False
    tied_to: str | None = None
    reason: str = ""
    layout: str = ""
    parts: dict[str, LayerPlan] = field(default_factory=dict)

    @property
    def codes_from_sums(self) -> bool:
        """Whether the output's codes are made of the accumulators, in one multiplication: the bias is in them."""
        out = self.output
        return (self.requantize and out is not None and not out.dynamic and out.granularity == "per_tensor"
                and out.fmt.grid == "affine")

    def to_dict(self) -> dict[str, Any]:
        """A plain dict of what differs from the defaults."""
        result: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "parts":
                if value:
                    result["parts"] = {name: part.to_dict() for name, part in value.items()}
            elif f.name == "kind" or value != f.default:
                value = value.to_dict() if isinstance(value, TensorSpec) else value
                result[f.name] = list(value) if isinstance(value, tuple) else value
        return result

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerPlan:
        values = dict(data)
        for key in ("weight", "input", "output"):
            if values.get(key) is not None:
                values[key] = TensorSpec.from_dict(values[key])
        for key in ("absorbs", "output_absorbs"):
            if values.get(key) is not None:
                floor, ceiling = values[key]
                values[key] = (floor, ceiling)
        values["parts"] = {name: cls.from_dict(part) for name, part in (values.get("parts") or {}).items()}
        return cls(**values)


def adopt(mixin: type, module: nn.Module) -> Any:
    """``module`` as an instance of ``mixin`` too: its class changes; hooks, parameters, mode and all else stay."""
    if not isinstance(module, mixin):
        kind: Any = type(module)
        module.__class__ = _adopted_type(mixin, kind)
    return module


@cache
def _adopted_type(mixin: Any, kind: Any) -> Any:
    if issubclass(mixin, kind):
        return mixin
    prefix = getattr(mixin, "_prefix", None)     # of a mixin that leaves the module the type it was, to whoever asks
    name = mixin.__name__ if kind.__module__.startswith("torch.") else f"Quantized{kind.__name__}"
    return type(f"{prefix}{kind.__name__}" if prefix else name, (mixin, kind), {
        "__module__": kind.__module__ if prefix else mixin.__module__, "__doc__": mixin.__doc__,
        "_adopted": (mixin, kind),
        "__reduce_ex__": lambda self, protocol: (_rebuilt, (mixin, *adopted_layers(kind)), self.__getstate__())})


def shed(mixin: type, module: nn.Module) -> nn.Module:
    """``module`` without ``mixin``, which it adopted: the inverse of :func:`adopt`; its attributes stay."""
    kind: Any = type(module)
    module.__class__ = _without(mixin, kind)
    return module


def _without(mixin: Any, kind: Any) -> Any:
    top, below = kind.__dict__["_adopted"]
    return below if top is mixin else _adopted_type(top, _without(mixin, below))


def adopted_layers(kind: Any) -> tuple[type, ...]:
    """The mixins of an adopted type, the last one adopted first, and the type below them: all found by name."""
    if "_adopted" not in kind.__dict__:
        return (kind,)
    mixin, below = kind.__dict__["_adopted"]
    return (mixin, *adopted_layers(below))


def _rebuilt(*layers: Any) -> Any:
    """An empty instance of an adopted type: how pickle, which cannot find the type by name, begins."""
    *mixins, made = layers
    for mixin in reversed(mixins):
        made = _adopted_type(mixin, made)
    return made.__new__(made)


def _unparametrized(kind: Any) -> Any:
    """The class that a module had before it got parametrizations, with the mixins that it has adopted since."""
    if "_adopted" not in kind.__dict__:
        return kind.__bases__[0]
    mixin, below = kind.__dict__["_adopted"]
    return _adopted_type(mixin, _unparametrized(below))


def drop_float(module: nn.Module, name: str) -> None:
    """Let ``module`` forget its parameter ``name``, and whatever computed it (weight norm, spectral norm)."""
    if nn.utils.parametrize.is_parametrized(module, name):
        parametrizations: Any = module.parametrizations
        del parametrizations[name]
        if not len(parametrizations):
            del module.parametrizations
            module.__class__ = _unparametrized(type(module))        # that class refuses to be copied
            for number, hook in list(module._load_state_dict_pre_hooks.items()):        # and this, to be pickled
                if getattr(hook, "hook", hook).__module__ == nn.utils.parametrizations.__name__:
                    del module._load_state_dict_pre_hooks[number]
    for handle, hook in list(module._forward_pre_hooks.items()):
        if type(hook).__name__ in ("WeightNorm", "SpectralNorm") and getattr(hook, "name", name) == name:
            del module._forward_pre_hooks[handle]
    for key in (name, f"{name}_g", f"{name}_v", f"{name}_orig"):
        module._parameters.pop(key, None)
        module.__dict__.pop(key, None)
    for key in (f"{name}_u", f"{name}_v"):
        module._buffers.pop(key, None)


@torch.no_grad()
def overwrite(module: nn.Module, name: str, value: Tensor) -> None:
    """Give the weight ``name`` of ``module`` this value, be it stored or computed from other parameters.

    Raises:
        CalibrationError: it is computed by something that cannot take a value for it.
    """
    if isinstance(module, Adapted) and name == "weight":
        module.overwrite(value)
        return
    stored = module._parameters.get(name)
    if stored is not None:
        stored.copy_(value)
        return
    if not nn.utils.parametrize.is_parametrized(module, name):
        raise CalibrationError(f"{name} is computed by a hook; use a parametrization of "
                               "nn.utils.parametrizations instead, or remove it first")
    try:
        setattr(module, name, value.to(getattr(module, name).dtype))
    except (NotImplementedError, RuntimeError) as error:
        raise CalibrationError(f"{name} is computed by a parametrization that cannot be given a value ({error}); "
                               "remove the parametrization first") from None


class QuantizedModule(nn.Module):
    """Mixin for modules with a quantized weight, input or output. Subclasses say how they compute.

    Attributes:
        plan: what ``prepare`` decided.
        weight_quantizer, input_quantizer, output_quantizer: quantizers, or None.
        calibrating: compute in floating point and only observe.
        checking: while calibrating, fold batch norms all the same (``prepare`` checks that this changes nothing).
        backward_dtype: ``auto`` (bfloat16 under autocast and for bfloat16 models, else float32), or a dtype's name.
    """

    replaces: ClassVar[type[nn.Module]]
    takes_input_spec: ClassVar[bool] = True
    takes_output_spec: ClassVar[bool] = True
    roles: ClassVar[tuple[str, ...]] = ("input", "output")
    """Which activations have quantizers: ``<role>_quantizer``."""

    name: str
    plan: LayerPlan
    calibrating: bool
    checking: bool
    backward_dtype: str
    float_dtype: torch.dtype
    weight: Any
    weight_codes: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_shape: tuple[int, ...]
    _batch_norm: list[Any]
    _kernel: Weight | None
    _codes: QuantizedTensor | None
    _one_row: Any
    _whole: Any
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    output_quantizer: Quantizer | None

    @classmethod
    def swap(cls, module: nn.Module, name: str, plan: LayerPlan, weight_quantizer: Quantizer | None = None) -> Any:
        """Turn ``module`` into a quantized one, in place.

        Args:
            weight_quantizer: that of the module whose weight this one is tied to.
        """
        adopted: QuantizedModule = adopt(cls, module)
        adopted.equip(name, plan, weight_quantizer)
        return adopted

    def equip(self, name: str, plan: LayerPlan, weight_quantizer: Quantizer | None = None) -> None:
        """Set up what a quantized module has beside the float one: its plan, its state, its quantizers."""
        self.plan = plan
        self.name = name
        self.calibrating = self.checking = False
        self.backward_dtype = "auto"
        self._batch_norm = []
        self._kernel = self._codes = self._one_row = self._whole = None
        self.float_dtype = self.initial_dtype()
        if weight_quantizer is None and plan.weight is not None:
            weight_quantizer = make_quantizer(plan.weight, self.weight_matrix().shape)
        self.weight_quantizer = weight_quantizer
        self.make_activation_quantizers()
        for role in ("weight", *self.roles):
            quantizer = getattr(self, f"{role}_quantizer")
            if quantizer is not None:
                quantizer.train(self.training)
                if not quantizer.name:
                    quantizer.name = f"{name}.{role}"
                device = self.device()
                if device is not None and device.type != "meta":
                    quantizer.to(device)

    def initial_dtype(self) -> torch.dtype:
        """The dtype of the float module."""
        return next((p.dtype for p in self._parameters.values() if p is not None), torch.float32)

    def make_activation_quantizers(self) -> None:
        """Build the quantizer of each of ``roles`` from the plan."""
        plan = self.plan
        self.input_quantizer = self.output_quantizer = None
        if plan.input is not None and not plan.chained:
            self.input_quantizer = make_quantizer(plan.input, channels=self.channels("input"))
        if plan.output is not None:
            self.output_quantizer = make_quantizer(plan.output, channels=self.channels("output"))
        if self.input_quantizer is not None and plan.absorbs:
            self.input_quantizer.absorb(*plan.absorbs)
        if self.output_quantizer is not None and plan.output_absorbs:
            self.output_quantizer.absorb(*plan.output_absorbs)

    def activation_quantizers(self) -> dict[str, Quantizer]:
        """The quantizers of activations that there are, by the name of their attribute."""
        found = {f"{role}_quantizer": getattr(self, f"{role}_quantizer") for role in self.roles}
        return {name: quantizer for name, quantizer in found.items() if quantizer is not None}

    def quantizer_of(self, operand: int) -> Quantizer | None:
        """The quantizer of the operand at this position of the call."""
        return self.input_quantizer

    def channels(self, role: str) -> tuple[int, ...]:
        """The shape in which one number for each channel of the ``input`` or ``output`` broadcasts; () if unknown."""
        return ()

    def device(self) -> torch.device | None:
        """Where this module's weight lives; None if it has none."""
        tensor = next(iter([*self._parameters.values(), *self._buffers.values()]), None)
        return None if tensor is None else tensor.device

    # ---------------------------------------------------------------- the weight and its codes

    @property
    def frozen(self) -> bool:
        """Whether the weight is packed codes."""
        return "weight_codes" in self._buffers

    def weight_matrix(self) -> Tensor:
        """The float weight with output channels first, as the kernels and the scales see it."""
        weight = self.weight
        assert isinstance(weight, Tensor)
        return weight

    def weight_from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`weight_matrix`."""
        return matrix

    @torch.no_grad()
    def write_weight(self, matrix: Tensor) -> None:
        """Overwrite the float weight; ``matrix`` has output channels first, as :meth:`weight_matrix`.

        Raises:
            CalibrationError: the weight is computed from others, by something that cannot take a value for it.
        """
        try:
            self.overwrite_weight(self.weight_from_matrix(matrix))
        except CalibrationError as error:
            raise CalibrationError(f"{self.name}: its {error}") from None

    def overwrite_weight(self, value: Tensor) -> None:
        """Give the float weight this value, in its own shape, wherever it lives."""
        overwrite(self, "weight", value)

    @property
    def shows_rows(self) -> bool:
        """Whether :meth:`input_rows` can say."""
        return type(self).input_rows is not QuantizedModule.input_rows

    def input_rows(self, x: Tensor | QuantizedTensor) -> Tensor:
        """An input as the product sees it: (groups, rows, inputs), a row for each product with the weight matrix.

        The weight matrix is (groups * outputs, inputs) then, all its dimensions but the first flattened.

        Raises:
            UnsupportedError: this kind of layer cannot say.
        """
        raise UnsupportedError(f"{self.name}: a {self.plan.kind} does not show its inputs as rows of a matrix")

    def float_weight(self) -> Tensor:
        """The float weight as the float module would use it, with pruned values at zero."""
        quantizer = self.weight_quantizer
        if quantizer is None or quantizer.mask is None:
            return self.weight
        return self.weight_from_matrix(quantizer.masked(self.weight_matrix()))

    def quantized_weight(self) -> QuantizedTensor:
        """The weight's codes, with output channels first."""
        if self.frozen:
            spec = self.plan.weight
            assert spec is not None
            if self._codes is None:
                self._unpack(spec)
            assert self._codes is not None
            return self._codes
        assert self.weight_quantizer is not None
        return self.weight_quantizer.quantize(self.weight_matrix())

    @torch.compiler.disable
    def _unpack(self, spec: TensorSpec) -> None:
        packed = PackedTensor(self.weight_codes, tuple(self.weight_shape), self.weight_scale, self.weight_zero_point,
                              spec.for_weight())
        with torch.inference_mode(False):       # a later call may have a gradient to go through them
            self._codes = packed if self.stays_packed(spec) else packed.unpacked()

    def stays_packed(self, spec: TensorSpec) -> bool:
        """Whether a frozen module unpacks its codes where they are asked for, instead of holding them unpacked too."""
        return False

    def kernel_weight(self, weight: QuantizedTensor) -> Weight | None:
        """The weight as kernels take it; a frozen module keeps it, with whatever kernels derive from it."""
        if not self.frozen:
            return None
        if self._kernel is None:
            self._make_kernel(weight)
        return self._kernel

    @torch.compiler.disable
    def _make_kernel(self, weight: QuantizedTensor) -> None:
        self._kernel = Weight.of(weight, lasting=True)

    def folded(self) -> tuple[Tensor | None, Tensor | None]:
        """Gain and bias with the batch norm behind folded in, where it is folded; else None and the bias."""
        bias = getattr(self, "bias", None)
        if not self.folds():
            return None, bias
        gain, offset = self._batch_norm[0].gain_and_offset()
        return gain, offset if bias is None else bias.float() * gain + offset

    def folds(self) -> bool:
        """Whether the batch norm behind is folded now: both are in eval, and nothing is being observed."""
        return bool(self._batch_norm) and not (self.training or self._batch_norm[0].training
                                               or (self.calibrating and not self.checking))

    def freeze(self) -> None:
        """Replace the float weight by packed codes, and the quantizers by frozen ones. ``forward`` does not change.

        Raises:
            ConvertError: the module is frozen already.
            NotCalibratedError: a range is missing.
        """
        if self.frozen:
            raise ConvertError(f"{self.name} is frozen already")
        gain, bias = self.folded()
        if self.weight_quantizer is not None:
            weight = self.quantized_weight()
            spec = weight.spec
            scale = weight.scale.clone() if weight.scale.dim() or gain is None else weight.scale.expand(len(gain))
            if gain is not None:
                scale = scale * (gain.detach() if scale.dim() == 1 else gain.detach().unsqueeze(-1))
                if spec.granularity == "per_tensor":
                    spec = spec.replace(granularity="per_channel")
            self.plan.weight = spec
            self.register_buffer("weight_codes", packing.pack(weight.codes, spec.fmt))
            self.register_buffer("weight_scale", scale)
            zero_point = weight.zero_point
            if isinstance(zero_point, int):
                zero_point = torch.tensor(zero_point, dtype=torch.int32)
            self.register_buffer("weight_zero_point", zero_point)
            self.weight_shape = tuple(weight.codes.shape)
            self.drop_float_weight()
            self.weight_quantizer = None
            if self._batch_norm:
                assert bias is not None
                self._parameters["bias"] = nn.Parameter(bias.detach().clone(), requires_grad=False)
                self._batch_norm = []
        for role, quantizer in self.activation_quantizers().items():
            setattr(self, role, quantizer.freeze())

    def drop_float_weight(self) -> None:
        """Forget the float weight, and whatever computed it."""
        drop_float(self, "weight")

    def skeleton(self) -> None:
        """Replace the float weight of a freshly built module by empty packed codes, to load a checkpoint into."""
        spec = self.plan.weight
        if spec is not None:
            matrix = self.weight_matrix()
            shape, device = tuple(matrix.shape), matrix.device
            size = affine.scale_shape(matrix.shape, spec)
            self.weight_shape = shape
            count = packing.packed_size(matrix.numel(), spec.bits)
            self.register_buffer("weight_codes", torch.zeros(count, dtype=torch.uint8, device=device))
            self.register_buffer("weight_scale", torch.ones(size, device=device))
            zero_point = torch.zeros(size, dtype=torch.int32, device=device) if spec.symmetric is False else None
            self.register_buffer("weight_zero_point", zero_point)
            self.drop_float_weight()
            self.weight_quantizer = None
            if self.plan.batch_norm:
                self._parameters["bias"] = nn.Parameter(torch.zeros(shape[0], device=device), requires_grad=False)
                self._batch_norm = []
        for role, quantizer in self.activation_quantizers().items():
            if isinstance(quantizer, StaticQuantizer):
                setattr(self, role, FrozenQuantizer.holding(quantizer, torch.ones_like(quantizer.scale), 0))

    def __getattr__(self, name: str) -> Any:
        """A frozen module still answers to ``weight``: dequantized anew at each access, never stored."""
        if name == "weight" and "weight_codes" in self.__dict__.get("_buffers", {}):
            return self.weight_from_matrix(self.quantized_weight().dequantize(self.float_dtype))
        return super().__getattr__(name)

    def _apply(self, fn, recurse=True):
        scale = self._buffers.get("weight_scale")
        super()._apply(fn, recurse)
        self.float_dtype = fn(torch.zeros((), dtype=self.float_dtype)).dtype
        if scale is not None and self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        self._kernel = self._codes = self._one_row = self._whole = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copies derive anew what cannot be copied: packed weights, and weights that a hook computes."""
        own = {k: v.detach() if isinstance(v, Tensor) else v for k, v in self.__dict__.items()}
        return {**own, "_kernel": None, "_codes": None, "_one_row": None, "_whole": None}

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self._kernel = self._codes = self._one_row = self._whole = None

    # ---------------------------------------------------------------- the forward

    def quantized_input(self, x: Tensor | QuantizedTensor) -> QuantizedTensor:
        """The input as codes: as they came, or from the input quantizer."""
        if isinstance(x, QuantizedTensor):
            return x
        if self.input_quantizer is None:
            raise UnsupportedError(f"{self.name} expects codes from the layer in front of it but got a float tensor: "
                                   "the model took another path than the one prepare traced; drop `output:` from its "
                                   "rule")
        return self.input_quantizer.quantize(x)

    def float_input(self, x: Tensor | QuantizedTensor) -> Tensor:
        """The input in floating point, with an absorbed activation function applied; observed while calibrating."""
        return self.float_operand(x, self.input_quantizer)

    def float_operand(self, x: Tensor | QuantizedTensor, quantizer: Quantizer | None) -> Tensor:
        """An operand in floating point, as its quantizer lets it through; observed while calibrating."""
        if isinstance(x, QuantizedTensor):
            return x.dequantize()
        if quantizer is None:
            return x
        if self.calibrating:
            if quantizer.observing:
                quantizer.observe(x)
            return quantizer.clamp(x)
        return quantizer(x)

    def product(self, x: QuantizedTensor, weight: QuantizedTensor, **geometry: Any) -> Tensor | QuantizedTensor:
        """The integer product, in the dtype the float layer would return; or the codes of the output already, where
        they are made of the accumulators."""
        gain, bias = self.folded()
        call = ste.Product(x, weight, self.kernel_weight(weight), gain, backward_dtype=self.backward_type(x),
                           whole_bias=self.plan.requantize, **geometry)
        if call.whole_bias and bias is not None and self.frozen and not torch.compiler.is_compiling():
            if self._whole is None and x.scale.dim() == 0:
                self._whole = call.split(bias.detach().float())
            call.whole = self._whole
        if self.plan.codes_from_sums and x.scale.dim() == 0 and (not self._batch_norm or self.folds()):
            return self.requantized(call, bias)
        return ste.product(call, bias, self.result_dtype(x))

    def requantized(self, call: ste.Product, bias: Tensor | None) -> QuantizedTensor:
        """The output quantizer's codes, made of the accumulators as integer runtimes make them."""
        quantizer, dtype = self.output_quantizer, self.result_dtype(call.x)
        assert quantizer is not None
        if isinstance(quantizer, FrozenQuantizer) and not torch.is_grad_enabled():
            sums = call.sums(None if bias is None else bias.float())
            scale, zero_point = quantizer.present()
            return QuantizedTensor(requantize.product(sums, scale, zero_point, quantizer.grid()), scale, zero_point,
                                   quantizer.spec, None, dtype)
        call.requantizes = True
        made = quantizer.quantize(ste.product(call, bias, dtype))
        assert call.kept is not None
        return replace(made, codes=requantize.product(call.kept, made.scale, made.zero_point, quantizer.grid()))

    def result_dtype(self, x: QuantizedTensor) -> torch.dtype:
        device = x.codes.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

    def backward_type(self, x: Tensor | QuantizedTensor) -> torch.dtype:
        if self.backward_dtype != "auto":
            return getattr(torch, self.backward_dtype)
        low = torch.is_autocast_enabled(x.device.type) or x.dtype in (torch.bfloat16, torch.float16)
        return torch.bfloat16 if low else torch.float32

    def finish(self, y: Any) -> Tensor | QuantizedTensor:
        """The output: as it is, or quantized where an output spec asks for it and no batch norm comes in between."""
        if isinstance(y, QuantizedTensor):
            return y if self.plan.emits_codes else y.dequantize()
        if self.calibrating and self.folds():
            y = self._batch_norm[0].normalize(y)
        if self.output_quantizer is None or (self._batch_norm and not self.folds()):
            return y
        return self.quantize_output(y)

    def quantize_output(self, y: Tensor) -> Tensor | QuantizedTensor:
        """The output quantizer's codes, or their values where a consumer needs floats."""
        assert self.output_quantizer is not None
        if self.calibrating:
            if self.output_quantizer.observing:
                self.output_quantizer.observe(y)
            return self.output_quantizer.clamp(y)
        codes = self.output_quantizer.quantize(y)
        return codes if self.plan.emits_codes else codes.dequantize(y.dtype)

    def extra_repr(self) -> str:
        parts = [super().extra_repr()]
        for role in ("weight", "input", "output"):
            spec = getattr(self.plan, role)
            if spec is not None:
                parts.append(f"{role}={spec}")
        return ", ".join(p for p in parts if p)


REGISTRY: dict[type[nn.Module], type[QuantizedModule]] = {}
"""Float module type -> quantized module type."""


def register(cls: type[QuantizedModule]) -> type[QuantizedModule]:
    """Class decorator: ``prepare`` swaps ``cls.replaces`` for ``cls`` from now on."""
    REGISTRY[cls.replaces] = cls
    return cls


BY_NAME: dict[str, type[QuantizedModule]] = {}
"""Dotted name of a module type of another library -> its quantized form; that library is never imported for it."""


def register_by_name(*names: str) -> Any:
    """Class decorator: ``prepare`` swaps modules of types with these dotted names for ``cls``, which leaves out
    ``replaces``."""
    def add(cls: type[QuantizedModule]) -> type[QuantizedModule]:
        BY_NAME.update(dict.fromkeys(names, cls))
        return cls
    return add


def quantized_type(module: nn.Module) -> type[QuantizedModule] | None:
    """The quantized class for a module: by its type, or a base type whose forward it did not override."""
    kind: Any = type(module)
    if nn.utils.parametrize.is_parametrized(module):
        kind = kind.__bases__[0]
    for base in kind.__mro__:
        foreign = BY_NAME.get(f"{base.__module__}.{base.__qualname__}")
        if foreign is not None and kind.forward is base.forward:
            foreign.replaces = base
            return foreign
    if kind in REGISTRY:
        return REGISTRY[kind]
    for base in kind.__mro__:
        if base in REGISTRY and kind.forward is base.forward and kind.__call__ is base.__call__:
            return REGISTRY[base]
    return None
