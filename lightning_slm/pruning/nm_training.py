"""N:M sparsity while training from scratch: SR-STE (Zhou et al. 2021, https://arxiv.org/abs/2102.04010).

The network computes with N of every M weights, the largest ones; all of them train, so that a weight may come back:

    W_{t+1} = W_t - lr * (g(m_t * W_t) + decay * (1 - m_t) * W_t),    m_t: 1 at the largest of each group of W_t

g is the gradient with respect to the weights that computed, passed straight through the mask. The second term pulls
weights that do not compute towards zero, so that the masks settle. It is part of the gradient: momentum, Adam's
moments and Muon's orthogonalisation act on both terms together, unlike the decoupled weight decay of AdamW.
"""

# Shape letters: O = outputs of a layer, I = its inputs, G = groups of a layer, M = weights of a group.

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from lightning_slm.nn.sharded import local, part_for, whole
from lightning_slm.nn.targets import Target
from lightning_slm.pruning.masks import check_targets, prune_mask


class NMWeights:
    """Weights that compute as N:M and are dense in between.

    In a loop of your own: `hide_` before the forward pass, `show_` after the backward pass, then `decay_`, then the
    optimizer's step. Works on the parameters themselves, in place: whatever reads them computes with N:M, and whole
    rows of sharded weights (DTensor) are masked where they lie. Masks follow from the weights; there is no state.

    >>> layer = torch.nn.Linear(4, 1, bias=False)
    >>> weights = NMWeights([Target("weight", layer, "weight", input_dim=1)], sparsity=0.5, group=4)
    >>> with weights.hidden():
    ...     (layer.weight == 0).sum().item()
    2
    >>> (layer.weight == 0).sum().item()
    0
    """

    def __init__(self, targets: Sequence[Target], sparsity: float = 0.5, group: int = 4) -> None:
        check_targets(targets, sparsity, group)
        self.targets, self.sparsity, self.group = list(targets), sparsity, group
        self._masks: list[Tensor] = []  # True where the weight was taken away, this rank's part
        self._taken: list[Tensor] = []  # and its value there
        self._away = False

    @torch.inference_mode(False)
    @torch.no_grad()
    def hide_(self) -> None:
        """Take the smallest weights of every group away: the rest is N:M. Sharded weights: all ranks must call this."""
        if self._away:
            return
        weights = [local(t.weight) for t in self.targets]
        self._masks = [self._mask(t) for t in self.targets]
        self._taken = [w * mask.to(w.dtype) for w, mask in zip(weights, self._masks)]
        torch._foreach_sub_(weights, self._taken)
        self._away = True

    @torch.inference_mode(False)
    @torch.no_grad()
    def show_(self) -> None:
        """Put them back, bit for bit; does nothing if none is away."""
        if self._away:
            torch._foreach_add_([local(t.weight) for t in self.targets], self._taken)
            self._away = False

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Inside, the weights are N:M."""
        self.hide_()
        try:
            yield
        finally:
            self.show_()

    @torch.no_grad()
    def decay_(self, decay: float) -> None:
        """Add ``decay`` times the weights that were last away to their gradients, once per optimizer step."""
        pairs = [(local(t.weight.grad), x) for t, x in zip(self.targets, self._taken) if t.weight.grad is not None]
        if pairs and decay:
            torch._foreach_add_([grad for grad, _ in pairs], [x.to(grad.dtype) for grad, x in pairs], alpha=decay)

    @torch.no_grad()
    def flips(self) -> float:
        """The share of weights whose mask has changed since they were last hidden (the flip rate of Hu et al. 2024,
        https://arxiv.org/abs/2404.01847). Call it after a step; all ranks must.
        """
        changed = [_over_ranks((self._mask(t) ^ mask).sum(), t.weight) for t, mask in zip(self.targets, self._masks)]
        return float(sum(changed)) / sum(t.weight.numel() for t in self.targets)

    @torch.no_grad()
    def finish_(self) -> None:
        """Leave the weights N:M for good."""
        self.hide_()
        self._taken, self._masks, self._away = [], [], False

    def _mask(self, target: Target) -> Tensor:
        weight = target.weight.detach()
        cut = isinstance(weight, DTensor) and any(p.is_shard(target.input_dim) for p in weight.placements)
        part = (whole(weight) if cut else local(weight)).abs()  # a group may lie on two ranks
        along = (lambda x: x) if target.input_dim == 1 else torch.t
        mask = along(prune_mask(along(part), self.sparsity, self.group))
        return part_for(mask, weight).to(local(weight).device) if cut else mask


def _over_ranks(count: Tensor, like: Tensor) -> Tensor:
    """The sum of what was counted on the parts of ``like``."""
    if not isinstance(like, DTensor):
        return count
    placements = [Partial() if p.is_shard() else p for p in like.placements]
    return whole(DTensor.from_local(count.to(like.device_mesh.device_type), like.device_mesh, placements))
