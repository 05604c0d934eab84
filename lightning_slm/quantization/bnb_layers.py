"""Linear layers with frozen weights in 4 or 8 bits, on the operators of bitsandbytes.

They do not build on its ``Linear4bit`` and ``Linear8bitLt``: those rewrite the dtype of trained biases, and on a CPU
cannot train after an evaluation (``Linear4bit``, with AVX512-BF16) or do not round inputs in training
(``Linear8bitLt``).
"""

# Shape letters: M = tokens, I = inputs, O = outputs, P = bytes of a row (I / 2), K = blocks (O * I / block),
# S = blocks of blocks (K / 256).

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_slm.nn.sharded import local, part_for, whole
from lightning_slm.quantization.int8 import as_autocast


def _quiet_import() -> Any:
    """On a CPU with AVX512-BF16 bitsandbytes complains at import of a kernel it lacks, which nothing here calls."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before, logger.disabled = logger.disabled, True
    try:
        import bitsandbytes
    finally:
        logger.disabled = before
    return bitsandbytes


_functional = _quiet_import().functional
_ops = torch.ops.bitsandbytes


@dataclass(frozen=True, slots=True)
class NF4:
    """How one layer keeps its weights."""

    double_quant: bool  # whether the blocks' largest magnitudes are in 8 bits too
    block: int  # consecutive inputs that share a magnitude
    compute_dtype: torch.dtype | None = None  # of the product; None: as the input comes


@dataclass(frozen=True, slots=True)
class LLMInt8:
    """How one layer multiplies."""

    threshold: float  # inputs with a magnitude from here on are multiplied in full precision; 0: none


class FrozenLinear(nn.Linear):
    """``nn.Linear`` with quantised weights and nothing to train in them.

    The parameter ``weight`` holds the codes. State dicts hold the plain weight that the codes stand for, under its
    plain name, and are read back to the same codes: they load into an ``nn.Linear``, and from one.
    """

    rounds_inputs: ClassVar[bool]  # so that a plain layer of the same weights computes something else
    settings: Any
    plain_dtype: torch.dtype  # of the weights in a state dict

    def quantize_(self, weight_OI: Tensor) -> None:
        """Hold the codes of ``weight_OI``, whole and plain."""
        raise NotImplementedError

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        """The whole weight matrix that the codes stand for, (O, I); of a sharded layer, on all ranks at once."""
        raise NotImplementedError

    def packed_state(self) -> dict[str, Tensor]:
        """The codes and all that belongs to them, by the names of bitsandbytes' own layers."""
        raise NotImplementedError

    def statistics(self) -> dict[str, Tensor]:
        """What the codes are multiplied by, by name."""
        return {n: b if b.dtype == torch.uint8 else b.view(torch.float32) for n, b in self.named_buffers(recurse=False)}

    def set_statistics_(self, statistics: dict[str, Tensor]) -> None:
        """Put others in their place."""
        for name, values in statistics.items():
            # Floats as integers: ``module.to(torch.bfloat16)`` would round them.
            bits = values if values.dtype == torch.uint8 else values.detach().view(torch.int32)
            if name in self._buffers:
                self.get_buffer(name).copy_(bits)
            else:
                self.register_buffer(name, bits.clone(), persistent=False)

    @torch.no_grad()
    def _hold_(self, codes: Tensor, statistics: dict[str, Tensor]) -> None:
        weight = self.weight
        if weight.is_floating_point():  # so far; the Parameter stays the same object
            self.plain_dtype, weight.grad = weight.dtype, None
            weight.requires_grad_(False)
            weight.data = codes
        else:
            local(weight).copy_(part_for(codes, weight))
        self.set_statistics_(statistics)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        plain_OI, weight = self.dequantized(), self.weight
        if isinstance(weight, DTensor):
            layout: dict[str, Any] = {"shape": plain_OI.shape, "stride": plain_OI.stride(), "run_check": False}
            part_OI = part_for(plain_OI, weight).clone()
            plain_OI = DTensor.from_local(part_OI, weight.device_mesh, weight.placements, **layout)
        # On the CPU, for the device need not have room for all plain weights at once.
        destination[f"{prefix}weight"] = plain_OI if isinstance(weight, DTensor) else plain_OI.cpu()
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        key, codes = f"{prefix}weight", self._parameters.pop("weight")
        rest = {name: value for name, value in state_dict.items() if name != key}
        missing.extend([key] if strict and key not in state_dict else [])
        try:
            super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)
        finally:
            bias = self._parameters.pop("bias")
            self._parameters.update(weight=codes, bias=bias)
        if key not in state_dict:
            return
        if (given := tuple(state_dict[key].shape)) != (self.out_features, self.in_features):
            wanted = (self.out_features, self.in_features)
            errors.append(f"size mismatch for {key}: {given} in the checkpoint, {wanted} in the model.")
        else:
            device = local(codes).device  # type: ignore[arg-type]
            self.quantize_(whole(state_dict[key].detach()).to(device, self.plain_dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.settings}"


class NF4Linear(FrozenLinear):
    """``nn.Linear`` whose weights are 4-bit codes, two to a byte: (O, I / 2)."""

    rounds_inputs = False
    settings: NF4

    def forward(self, x: Tensor) -> Tensor:
        given = as_autocast(x)
        x = given.to(self.settings.compute_dtype or given.dtype)
        bias_O = None if self.bias is None else self.bias.to(x.dtype)
        y = _NF4Product.apply(x, bias_O, self.weight, self.settings.block, *self._magnitudes())
        return y.to(given.dtype)

    def quantize_(self, weight_OI: Tensor) -> None:
        block, double = self.settings.block, self.settings.double_quant
        packed, state = _functional.quantize_4bit(weight_OI.detach().contiguous(), None, None, block, double, "nf4")
        statistics = {"absmax": state.absmax}
        if double:
            nested = {"absmax_scale": state.state2.absmax, "absmax_code": state.state2.code}
            statistics |= {**nested, "absmax_offset": state.offset}
        self._hold_(packed.view(self.out_features, -1), statistics)

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        packed_OP = whole(self.weight.detach())
        return _dequantize(packed_OP, self.settings.block, dtype or self.plain_dtype, *self._magnitudes())

    def packed_state(self) -> dict[str, Tensor]:
        absmax, scale_S, code, offset = self._magnitudes()
        levels = _functional.get_4bit_type("nf4", device=local(self.weight).device)
        shape = torch.Size((self.out_features, self.in_features))
        options = {"shape": shape, "code": levels, "blocksize": self.settings.block, "quant_type": "nf4"}
        nested = None if scale_S is None else _functional.QuantState(scale_S, None, code, 256, None, torch.float32)
        state = _functional.QuantState(absmax, dtype=self.plain_dtype, offset=offset, state2=nested, **options)
        packed = whole(self.weight.detach()).reshape(-1, 1)
        return {"weight": packed, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}

    def _magnitudes(self) -> tuple[Any, ...]:
        held = self.statistics()
        return tuple(held.get(name) for name in ("absmax", "absmax_scale", "absmax_code", "absmax_offset"))


def _dequantize(packed_OP: Tensor, block: int, dtype: torch.dtype, absmax: Tensor, *nested: Tensor | None) -> Tensor:
    """The weights that the codes stand for, (O, I)."""
    O, P = packed_OP.shape
    scale_S, code, offset = nested
    if scale_S is not None:
        absmax = _ops.dequantize_blockwise(absmax, scale_S, code, 256, torch.float32) + offset
    return _ops.dequantize_4bit(packed_OP.reshape(-1, 1), absmax, block, "nf4", [O, 2 * P], dtype)


class _NF4Product(torch.autograd.Function):
    """Keeps the codes for the backward pass, not the weights."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias_O: Tensor | None, packed_OP: Tensor, block: int, absmax: Tensor, *nested: Any
    ) -> Tensor:
        ctx.save_for_backward(packed_OP, absmax, *nested)
        ctx.block = block
        (O, P), (scale_S, code, offset) = packed_OP.shape, nested
        packed, shape = packed_OP.view(-1, 1), [O, 2 * P]
        if scale_S is None:
            return _ops.gemm_4bit(x, packed, shape, absmax, block, "nf4", bias_O)
        return _ops.gemm_4bit(x, packed, shape, scale_S, block, "nf4", bias_O, absmax, code, offset)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        packed_OP, *magnitudes = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _dequantize(packed_OP, ctx.block, grad.dtype, *magnitudes)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_bias, *[None] * 6


class LLMInt8Linear(FrozenLinear):
    """``nn.Linear`` whose weights are int8 codes, (O, I), with a scale per row, and whose inputs are rounded alike."""

    rounds_inputs = True
    settings: LLMInt8

    def forward(self, x: Tensor) -> Tensor:
        x = as_autocast(x)
        bias_O = None if self.bias is None else self.bias.to(x.dtype)
        x_MI, scale_O = x.reshape(-1, x.shape[-1]), self.statistics()["scale"]
        return self._product(x_MI, bias_O, scale_O).view(*x.shape[:-1], self.out_features)

    def packed_state(self) -> dict[str, Tensor]:
        row_major = torch.tensor(0, dtype=torch.uint8)  # bitsandbytes' number for it
        return {"weight": whole(self.weight.detach()), "SCB": self.statistics()["scale"], "weight_format": row_major}

    @torch.compiler.disable  # how many columns have outliers is known only when it runs
    def _product(self, x_MI: Tensor, bias_O: Tensor | None, scale_O: Tensor) -> Tensor:
        return _Int8Product.apply(x_MI, bias_O, self.weight, scale_O, self.settings.threshold)

    def quantize_(self, weight_OI: Tensor) -> None:
        codes_OI, scale_O, _ = _ops.int8_vectorwise_quant(weight_OI.detach().to(torch.float16, copy=True))
        self._hold_(codes_OI, {"scale": scale_O})

    def dequantized(self, dtype: torch.dtype | None = None) -> Tensor:
        codes_OI = whole(self.weight.detach())
        return _from_rows(codes_OI, self.statistics()["scale"], torch.float32).to(dtype or self.plain_dtype)


def _from_rows(codes_OI: Tensor, scale_O: Tensor, dtype: torch.dtype) -> Tensor:
    return codes_OI.to(dtype).mul_((scale_O * (1 / 127)).unsqueeze(1))


class _Int8Product(torch.autograd.Function):
    """The gradient is that of the product with the dequantised weights: rounding inputs counts as the identity."""

    @staticmethod
    def forward(
        ctx: Any, x_MI: Tensor, bias_O: Tensor | None, codes_OI: Tensor, scale_O: Tensor, threshold: float
    ) -> Tensor:
        ctx.save_for_backward(codes_OI, scale_O)
        rounded_MI, scale_M, outliers = _ops.int8_vectorwise_quant(x_MI.to(torch.float16), threshold)
        if threshold == 0:
            return _ops.int8_scaled_mm(rounded_MI, codes_OI, scale_M, scale_O, bias_O, x_MI.dtype)
        return _ops.int8_mixed_scaled_mm(x_MI, rounded_MI, codes_OI, scale_M, scale_O, outliers, bias_O)[0]

    @staticmethod
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        codes_OI, scale_O = ctx.saved_tensors
        grad_x = grad_MO @ _from_rows(codes_OI, scale_O, grad_MO.dtype) if ctx.needs_input_grad[0] else None
        grad_bias = grad_MO.sum(0) if ctx.needs_input_grad[1] else None
        return grad_x, grad_bias, None, None, None
