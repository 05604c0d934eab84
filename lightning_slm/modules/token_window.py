"""Gradient accumulation and ranks that weigh every token alike.

Lightning divides each micro-batch's loss by the number of micro-batches, and ranks average their gradients; with means
as losses, a token of a short micro-batch would count more than one of a long. So a micro-batch's loss is its *sum*,
divided by the tokens of the first micro-batch on all ranks; before the optimizer steps, when the tokens of the whole
window are known, the gradients are multiplied by what that was wrong by: one exactly, if nothing accumulates.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class TokenWindow:
    """Sums over the micro-batches between two optimizer steps.

    On CUDA nothing here waits for the device but `result`, and that only for the last forward pass, not the backward
    pass behind it.

    Args:
        ranks: processes that train together.
    """

    def __init__(self, ranks: int = 1) -> None:
        self.ranks = ranks
        self.micro_batches = 0
        self._sums = self._host = torch.empty(0)
        self._reference = torch.empty(0)
        self._copied: torch.cuda.Event | None = None

    def loss(self, summed_loss: Tensor, tokens: Tensor) -> Tensor:
        """What a training step returns for a micro-batch of this rank, with so many predicted tokens."""
        dtype = torch.float32 if tokens.device.type == "mps" else torch.float64
        if not self.micro_batches:
            self._reference = self._over_ranks(tokens.to(dtype, copy=True)).clamp_(min=1)
            self._sums = torch.zeros(2, dtype=dtype, device=tokens.device)
        self._sums += torch.stack([summed_loss.detach().to(dtype), tokens.to(dtype)])
        self.micro_batches += 1
        self._to_host(torch.cat([self._over_ranks(self._sums.clone()), self._reference[None]]))
        return summed_loss * (self.ranks / self._reference).to(summed_loss.dtype)

    def result(self, accumulate: int) -> tuple[float, float]:
        """Ends the window: the mean loss per token, and what the gradients must be multiplied by.

        Args:
            accumulate: what Lightning divided each loss by; a window at the end of an epoch may have had fewer.
        """
        if self._copied is not None:
            self._copied.synchronize()
        summed, tokens, reference = self._host.tolist()
        tokens = max(tokens, 1.0)
        self.micro_batches = 0
        return summed / tokens, reference * accumulate / tokens

    def _over_ranks(self, tensor: Tensor) -> Tensor:
        if self.ranks > 1:
            dist.all_reduce(tensor)
        return tensor

    def _to_host(self, sums: Tensor) -> None:
        if sums.device.type != "cuda":
            self._host = sums
            return
        self._host = torch.empty_like(sums, device="cpu", pin_memory=True)
        self._host.copy_(sums, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()
