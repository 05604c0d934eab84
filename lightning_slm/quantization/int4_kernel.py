"""Packed layers in the layout of PyTorch's own 4-bit CPU kernel: the fast way to write text in bfloat16.

The kernel multiplies bfloat16 by 4-bit codes with a scale and an offset per group, adds in float32 and rounds its sums
to bfloat16. Codes of 2 bits, and BitNet's, take 4 bits there; codes of 8 bits are two digits of 4. Outputs are those of
the packed layer but for that rounding, and for that of its weights, which the kernel leaves out.
"""

# Shape letters: O = outputs, I = inputs, G = groups of a row, N = tokens.

import torch
from torch import Tensor, nn

from lightning_slm.quantization.bitnet import quantize_tokens, scaled_sums, unit_rms
from lightning_slm.quantization.fake import fake_quantize_activation
from lightning_slm.quantization.packed import PackedBitLinear, PackedLinear, joined, unpack, unpack_bits

_GROUPS = (32, 64, 128, 256)  # the kernel's
_ROWS = 16  # the kernel's outputs come in so many
_TOKENS = 64  # at a time: with some hundred at once the kernel is several times slower
_BLOCK = 2**22  # codes of a head that are laid out at a time: on the way they take 4 bytes each


def use_int4_kernel_(model: nn.Module) -> list[str]:
    """Let the packed linear layers of a bfloat16 model multiply by PyTorch's 4-bit CPU kernel, in place.

    For writing token by token; a long prompt takes about twice the time of dense bfloat16 layers. The layers keep
    nothing but the kernel's layout, which depends on the CPU: export a model before, not after. Where an embedding
    shares the codes of a layer, it keeps them, and the layer has its own.

    Returns: the names of the layers that use the kernel now.

    Raises:
        ValueError: no packed layer, a model in another dtype or on another device, or sizes that the kernel does not
            know; names the layer. Nothing was changed.
        RuntimeError: this PyTorch has no such kernel.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear | PackedBitLinear)}
    done = [n for n, m in model.named_modules() if isinstance(m, Int4KernelLinear | Int4KernelBitLinear)]
    if not layers and not done:
        raise ValueError("The model has no packed linear layers; load a folder that save_hf_folder has packed.")
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        raise RuntimeError(f"torch {torch.__version__} has no 4-bit CPU kernel; use the packed layers as they are.")
    others = {p.dtype for p in model.parameters() if p.is_floating_point()} - {torch.bfloat16}
    if others or any(p.device.type != "cpu" for p in model.parameters()):
        raise ValueError(
            f"The kernel multiplies bfloat16 on the CPU, and this model is on {next(model.parameters()).device} with "
            f"parameters of {', '.join(map(str, others)) or 'bfloat16'}: load it with dtype=torch.bfloat16."
        )
    for name, layer in layers.items():  # all checks before any change
        if reason := _misfit(layer):
            raise ValueError(f"{name!r} {reason}; use the packed layers as they are.")
    for name, layer in layers.items():
        kind = Int4KernelBitLinear if isinstance(layer, PackedBitLinear) else Int4KernelLinear
        model.set_submodule(name, kind(layer))  # type: ignore[arg-type]
    return [*done, *layers]


class Int4KernelLinear(nn.Module):
    """`PackedLinear` by the kernel: groups of 2, 4 or 8 bits."""

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = packed.in_features, packed.out_features, packed.bias
        self.int8_activations, self.digits = packed.int8_activations, 2 if packed.bits == 8 else 1
        rows = _BLOCK // self.in_features // _ROWS * _ROWS or _ROWS
        blocks = zip(packed.weight.split(rows), packed.weight_scale.split(rows))
        self.products = nn.ModuleList(
            _Kernel(*_digits(unpack(codes_OP, packed.bits), scale_OG.float(), packed.bits), packed.group)
            for codes_OP, scale_OG in blocks
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.int8_activations:
            x = fake_quantize_activation(x)
        x_NI = x.reshape(-1, self.in_features)
        x_NI = x_NI if self.digits == 1 else x_NI.repeat(1, self.digits)
        y_NO = joined([product(x_NI) for product in self.products], dim=1)
        y = y_NO.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def _digits(codes_OI: Tensor, scale_OG: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of 4 bits side by side, their scales, and what is added to a code times its scale."""
    zero_OG = torch.zeros_like(scale_OG)
    if bits < 8:
        return codes_OI, scale_OG, zero_OG
    # code = 16 x (code >> 4) + (code & 15), and the kernel takes 8 off each digit.
    codes_OI = torch.cat([codes_OI >> 4, (codes_OI & 15) - 8], dim=1)
    return codes_OI, torch.cat([16 * scale_OG, scale_OG], 1), torch.cat([zero_OG, 8 * scale_OG], 1)


class Int4KernelBitLinear(nn.Module):
    """`PackedBitLinear` by the kernel: codes of inputs and weights are whole numbers, which bfloat16 holds exactly."""

    def __init__(self, packed: PackedBitLinear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = packed.in_features, packed.out_features, packed.bias
        self.settings = packed.settings
        self.register_buffer("weight_scale", packed.weight_scale)
        group = max(g for g in _GROUPS if self.in_features % g == 0)
        ones_OG = torch.ones(self.out_features, self.in_features // group)
        codes_OI = unpack_bits(packed.weight, packed.settings)
        self.product = _Kernel(codes_OI, ones_OG, torch.zeros_like(ones_OG), group)

    def forward(self, x: Tensor) -> Tensor:
        if self.settings.sub_norm:
            x = unit_rms(x)
        codes_NI, step_N1 = quantize_tokens(x.reshape(-1, self.in_features))
        scale = self.weight_scale.view(torch.float32)  # type: ignore[operator]
        y_NO = scaled_sums(self.product(codes_NI.bfloat16()), step_N1, scale, self.bias, x.dtype)
        return y_NO.view(*x.shape[:-1], self.out_features)


class _Kernel(nn.Module):
    """``x @ (codes x scale + zero).T`` of codes from -8 to 7."""

    codes: Tensor
    scale_and_zero: Tensor

    def __init__(self, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group: int) -> None:
        super().__init__()
        self.group = group
        aten = torch.ops.aten
        codes = aten._convert_weight_to_int4pack_for_cpu(codes_OI.int() + 8, 1)  # 1: not used on a CPU
        self.register_buffer("codes", codes)
        self.register_buffer("scale_and_zero", torch.stack([scale_OG.T, zero_OG.T], dim=-1).bfloat16().contiguous())

    def forward(self, x_NI: Tensor) -> Tensor:
        parts = [
            torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.codes, self.group, self.scale_and_zero)
            for x in x_NI.split(_TOKENS)
        ]
        return joined(parts, dim=0)


def _misfit(layer: PackedLinear | PackedBitLinear) -> str | None:
    if layer.out_features % _ROWS:
        return f"has {layer.out_features} outputs, and the kernel wants a multiple of {_ROWS}"
    if isinstance(layer, PackedBitLinear):
        return f"has rows of {layer.in_features}, and 32 must divide them" if layer.in_features % 32 else None
    return None if layer.group in _GROUPS else f"has groups of {layer.group}, and the kernel knows {_GROUPS}"
