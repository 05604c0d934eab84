"""A sparse mixture of experts: each token goes through a few of many SwiGLU layers (Shazeer et al. 2017,
https://arxiv.org/abs/1701.06538; with SwiGLU as in Mixtral, Jiang et al. 2024, https://arxiv.org/abs/2401.04088).

The model holds all experts and pays, for each token, the arithmetic of ``top_k`` of them.
"""

# Shape letters: B = batch, T = tokens of a row, N = tokens (B * T), D = model width, E = experts, k = experts that a
# token goes to, S = slots of a row (T * k): one for each time a token goes to an expert.

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_slm.nn.mixer import Context, Mixer, set_
from lightning_slm.nn.swiglu import SwiGLU

_FEW = 32  # tokens: below, a traced graph runs all experts, since its shapes must not depend on who was chosen


class Router(nn.Module):
    """Scores of the experts, in float32 whatever the model computes in: close ones must not be rounded to ties.

    No ``nn.Linear``, so that nothing that exchanges those (quantisation, adapters) takes it for one.

    Args:
        hidden_size: width of a token.
        experts: how many there are.
        noise: whether a second matrix learns how much noise each score gets in training.
    """

    _slm_protected = ("weight", "noise_weight")

    def __init__(self, hidden_size: int, experts: int, noise: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, hidden_size))
        self.noise_weight = nn.Parameter(torch.empty(experts, hidden_size)) if noise else None
        nn.init.normal_(self.weight, std=0.02)
        if self.noise_weight is not None:
            nn.init.zeros_(self.noise_weight)

    def init_weights_(self, config: Any) -> None:
        """Normal; the noise begins with the same size for all: softplus(0)."""
        set_(self.weight, torch.randn_like(self.weight) * config.initializer_range)
        if self.noise_weight is not None:
            set_(self.noise_weight, 0.0)

    def forward(self, x_ND: Tensor) -> Tensor:
        return _precisely_linear(x_ND, self.weight)

    def noise(self, x_ND: Tensor) -> Tensor | None:
        """Standard deviations of the noise, (N, E)."""
        return None if self.noise_weight is None else F.softplus(_precisely_linear(x_ND, self.noise_weight))


def _precisely_linear(x_ND: Tensor, weight_ED: Tensor) -> Tensor:
    dtype = torch.promote_types(x_ND.dtype, torch.float32)
    with torch.autocast(x_ND.device.type, enabled=False):
        return F.linear(x_ND.to(dtype), weight_ED.to(dtype))


class Experts(nn.ModuleList):
    """Experts in a row; they stand side by side, so that none is a block of the model (see `repeated_blocks`)."""

    are_blocks = False


class MoE(Mixer):
    """The weighted sum of the ``top_k`` experts whose scores are highest, the weights being the softmax of the scores.

    Experts are modules of their own with plain ``nn.Linear`` layers, so that whatever prunes, quantises or adapts
    matrices works on them. In training the router's losses go to ``context.losses``.

    Args:
        hidden_size: width of input and output.
        intermediate_size: width inside each expert.
        experts: how many there are.
        top_k: how many of them a token goes to.
        normalize_topk: whether the chosen weights are made to sum to one (Mixtral does, Jamba does not).
        balance: weight of `balance_loss`; 0: none.
        z_loss: weight of the mean squared logsumexp of the scores, which keeps them small (Zoph et al. 2022,
            https://arxiv.org/abs/2202.08906); 0: none.
        capacity: in training, an expert takes at most ``capacity * top_k / experts`` of the tokens of a row, the first
            ones; what comes later goes past it. None: it takes all that come, as always in evaluation.
        shared: experts that every token goes through, beside the chosen (as one wider SwiGLU).
        noisy: whether, in training, scores get noise whose size is learned (Shazeer et al. 2017).
        cv_loss: weight of the squared coefficients of variation of the experts' importance and, if ``noisy``, of
            their load: the paper's own way to balance; 0: none.

    Attributes:
        last_load: fraction of the slots that each expert got in the last training batch, (E,); None before.

    Raises:
        ValueError: a number that has no meaning.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        experts: int = 8,
        top_k: int = 2,
        normalize_topk: bool = True,
        balance: float = 0.01,
        z_loss: float = 1e-3,
        capacity: float | None = None,
        shared: int = 0,
        noisy: bool = False,
        cv_loss: float = 0.0,
    ) -> None:
        super().__init__()
        _check(experts, top_k, capacity, shared)
        self.top_k, self.normalize_topk, self.capacity = top_k, normalize_topk, capacity
        self.balance, self.z_loss, self.cv_loss = balance, z_loss, cv_loss
        self.router = Router(hidden_size, experts, noisy)
        self.experts = Experts(SwiGLU(hidden_size, intermediate_size) for _ in range(experts))
        self.shared_expert = SwiGLU(hidden_size, shared * intermediate_size) if shared else None
        self.last_load: Tensor | None = None

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        experts: int = 8,
        top_k: int = 2,
        intermediate_size: int | None = None,
        normalize_topk: bool = True,
        balance: float = 0.01,
        z_loss: float = 1e-3,
        capacity: float | None = None,
        shared: int = 0,
        noisy: bool = False,
        cv_loss: float = 0.0,
    ) -> Self:
        return cls(
            config.hidden_size,
            intermediate_size or config.intermediate_size,
            experts=experts,
            top_k=top_k,
            normalize_topk=normalize_topk,
            balance=balance,
            z_loss=z_loss,
            capacity=capacity,
            shared=shared,
            noisy=noisy,
            cv_loss=cv_loss,
        )

    def forward(self, x_BTD: Tensor, context: Context, layer_idx: int) -> Tensor:
        B, T, D = x_BTD.shape
        x_ND = x_BTD.reshape(-1, D)
        clean_NE = scores_NE = self.router(x_ND)
        std_NE = self.router.noise(x_ND) if self.training else None
        if std_NE is not None:
            scores_NE = clean_NE + std_NE * torch.randn_like(std_NE)
        probs_NE = scores_NE.softmax(-1)
        gate_Nk, chosen_Nk = probs_NE.topk(self.top_k, -1)
        if self.normalize_topk:
            gate_Nk = gate_Nk / gate_Nk.sum(-1, keepdim=True)
        if self.training:
            tokens_BT = None if context.tokens_BS is None else context.tokens_BS[:, -T:]
            real_N1 = _weights(probs_NE, tokens_BT)
            loss = self._losses(scores_NE, probs_NE, chosen_Nk, real_N1)
            if self.cv_loss:
                loss = loss + self.cv_loss * self._variation(clean_NE, scores_NE, std_NE, gate_Nk, chosen_Nk, real_N1)
            context.losses.append(loss)
            chosen_Nk = self._drop(chosen_Nk, B, tokens_BT)
        y_ND = self._mix(x_ND, gate_Nk, chosen_Nk, one_each=T == 1)
        if self.shared_expert is not None:
            y_ND = y_ND + self.shared_expert(x_ND, context, layer_idx)
        return y_ND.view(B, T, D)

    def _losses(self, scores_NE: Tensor, probs_NE: Tensor, chosen_Nk: Tensor, real_N1: Tensor) -> Tensor:
        """Balance and z-loss, weighted, over tokens that are no padding; notes the load."""
        real_N1 = real_N1 / real_N1.sum().clamp(min=1)
        slots_Nk = real_N1.expand(-1, self.top_k) / self.top_k
        load_E = probs_NE.new_zeros(len(self.experts)).scatter_add(0, chosen_Nk.flatten(), slots_Nk.flatten())
        self.last_load = load_E.detach()
        squares_N1 = scores_NE.logsumexp(-1, keepdim=True).square()
        balance = balance_loss(load_E, (probs_NE * real_N1).sum(0))
        return self.balance * balance + self.z_loss * (squares_N1 * real_N1).sum()

    def _variation(
        self, clean_NE: Tensor, scores_NE: Tensor, std_NE: Tensor | None, gate_Nk: Tensor, chosen_Nk: Tensor,
        real_N1: Tensor,
    ) -> Tensor:  # fmt: skip
        """Of the experts' importance (the sum of their weights) and, under noise, of their load."""
        gates_NE = torch.zeros_like(clean_NE).scatter(1, chosen_Nk, gate_Nk * real_N1)
        variation = squared_variation(gates_NE.sum(0))
        if std_NE is None:
            return variation
        load_NE = smooth_load(clean_NE, scores_NE, std_NE, self.top_k)
        return variation + squared_variation((load_NE * real_N1).sum(0))

    def _drop(self, chosen_Nk: Tensor, rows: int, tokens_BT: Tensor | None) -> Tensor:
        """The same with E in place of experts that have no place left."""
        if self.capacity is None:
            return chosen_Nk
        slots_BS, E = chosen_Nk.view(rows, -1), len(self.experts)
        most = math.ceil(self.capacity * slots_BS.shape[1] / E)
        fits_BS = within_capacity(slots_BS, E, most, tokens_BT)
        return slots_BS.masked_fill(~fits_BS, E).view_as(chosen_Nk)

    def _mix(self, x_ND: Tensor, gate_Nk: Tensor, chosen_Nk: Tensor, one_each: bool) -> Tensor:
        """The experts' weighted sum, (N, D); ``chosen_Nk`` is E where a token goes to none."""
        if torch.compiler.is_compiling() and (one_each or len(x_ND) <= _FEW):
            return all_experts(self.experts, x_ND, gate_Nk, chosen_Nk)
        return sorted_experts(self.experts, x_ND, gate_Nk, chosen_Nk)


def _check(experts: int, top_k: int, capacity: float | None, shared: int) -> None:
    if not 1 <= top_k <= experts:
        raise ValueError(f"moe: top_k={top_k} must be between 1 and experts={experts}.")
    if capacity is not None and capacity <= 0:
        raise ValueError(f"moe: capacity={capacity} must be above 0 (1.25 is usual); None: every token is taken.")
    if shared < 0:
        raise ValueError(f"moe: shared={shared} must not be negative.")


def _weights(like_NE: Tensor, tokens_BT: Tensor | None) -> Tensor:
    """1 for tokens and 0 for padding, (N, 1)."""
    if tokens_BT is None:
        return like_NE.new_ones(len(like_NE), 1)
    return tokens_BT.reshape(-1, 1).to(like_NE.dtype)


@torch.compiler.disable
def sorted_experts(experts: nn.ModuleList, x_ND: Tensor, gate_Nk: Tensor, chosen_Nk: Tensor) -> Tensor:
    """Slots sorted by expert: each runs once, on all its tokens; a compiled block steps out of its graph here.

    An expert without tokens still takes part in training, with a row that is thrown away: its gradients are zeros then
    and not missing, which replicas that average gradients rely on.
    """
    (N, k), training = gate_Nk.shape, torch.is_grad_enabled()
    if N == 1 and not training:  # decoding
        y_kD = torch.cat([experts[e](x_ND, _NOTHING, 0) for e in chosen_Nk[0].tolist()])
        return (gate_Nk.to(y_kD.dtype) @ y_kD).to(x_ND.dtype)
    slots = chosen_Nk.flatten()
    order = slots.argsort(stable=True)
    counts = slots.bincount(minlength=len(experts)).tolist()[: len(experts)]
    order = order[: sum(counts)]
    token = order // k
    outputs = []
    for expert, rows in zip(experts, x_ND.index_select(0, token).split(counts)):
        if len(rows):
            outputs.append(expert(rows, _NOTHING, 0))
        elif training:
            outputs.append(expert(rows.new_zeros(1, rows.shape[1]), _NOTHING, 0)[:0])
    weighted = torch.cat(outputs) * gate_Nk.flatten().index_select(0, order)[:, None]
    return torch.zeros_like(x_ND).index_add(0, token, weighted.to(x_ND.dtype))


_NOTHING = Context()  # experts look at nothing but their tokens


def all_experts(experts: nn.ModuleList, x_ND: Tensor, gate_Nk: Tensor, chosen_Nk: Tensor) -> Tensor:
    """The same in shapes that do not depend on the choice: every expert runs on every token, most with weight 0."""
    gates_NE = gate_Nk.new_zeros(len(x_ND), len(experts) + 1).scatter(1, chosen_Nk, gate_Nk)
    weighted = [expert(x_ND, _NOTHING, 0) * gate for expert, gate in zip(experts, gates_NE.split(1, 1))]
    return torch.stack(weighted).sum(0).to(x_ND.dtype)


def naive_experts(experts: nn.ModuleList, x_ND: Tensor, gate_Nk: Tensor, chosen_Nk: Tensor) -> Tensor:
    """The twin of both: token by token."""
    rows = []
    for x_D, gate_k, chosen_k in zip(x_ND, gate_Nk, chosen_Nk):
        parts = [g * experts[e](x_D[None], _NOTHING, 0)[0] for g, e in zip(gate_k, chosen_k) if e < len(experts)]
        rows.append(sum(parts, torch.zeros_like(x_D)))
    return torch.stack(rows)


def within_capacity(slots_BS: Tensor, experts: int, most: int, tokens_BT: Tensor | None = None) -> Tensor:
    """Which slots are among the first ``most`` of their expert in their row, (B, S).

    By position, and not (as in GShard) first choices of all tokens before second choices: so what becomes of a token
    depends on nothing that follows it. Padding has no place.
    """
    taken_BSE = F.one_hot(slots_BS, experts)
    if tokens_BT is not None:
        B, T = tokens_BT.shape
        taken_BSE = taken_BSE * tokens_BT.view(B, T, 1, 1).expand(B, T, slots_BS.shape[1] // T, 1).reshape(B, -1, 1)
    rank_BS = (taken_BSE.cumsum(1) * taken_BSE).sum(-1)
    return (rank_BS > 0) & (rank_BS <= most)


def balance_loss(load_E: Tensor, probability_E: Tensor) -> Tensor:
    """E times the sum of load times mean probability (Fedus et al. 2021, https://arxiv.org/abs/2101.03961).

    It is 1 where all experts get the same; E where one gets all.

    Args:
        load_E: fraction of the slots that each expert got; sums to 1.
        probability_E: mean probability of each expert; the gradient goes through it.
    """
    return len(load_E) * (load_E * probability_E).sum()


def squared_variation(x_E: Tensor) -> Tensor:
    """Variance over squared mean (Shazeer et al. 2017); 0 where all are equal, E - 1 where one has all."""
    return x_E.var(unbiased=False) / x_E.mean().square().clamp(min=1e-10)


def smooth_load(clean_NE: Tensor, noisy_NE: Tensor, std_NE: Tensor, top_k: int) -> Tensor:
    """Probability that a token goes to each expert, over another draw of this expert's noise (Shazeer et al. 2017,
    appendix A): the number of tokens that it gets, made differentiable.

    Args:
        clean_NE: scores without noise.
        noisy_NE: scores that the choice was made by.
        std_NE: standard deviations of the noise.
        top_k: experts that a token goes to.
    """
    if top_k == clean_NE.shape[1]:
        return torch.ones_like(clean_NE)
    best = noisy_NE.topk(top_k + 1, -1).values
    next_N1, last_N1 = best[:, -1:], best[:, -2:-1]
    threshold_NE = torch.where(noisy_NE > next_N1, next_N1, last_N1)  # to beat: the k-th of the others
    return torch.special.ndtr((clean_NE - threshold_NE) / std_NE)
