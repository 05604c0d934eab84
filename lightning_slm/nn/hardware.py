"""What the hardware multiplies fast."""

import torch


def fast_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype of fast matrix products on ``device``: bf16 where there is hardware for it, else float32.

    A CPU without AMX or AVX512-BF16 multiplies bf16 several times *slower* than float32; with AMX, about eight times
    faster.
    """
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    has = torch.cpu.get_capabilities()
    return torch.bfloat16 if has.get("amx_bf16") or has.get("avx512_bf16") else torch.float32
