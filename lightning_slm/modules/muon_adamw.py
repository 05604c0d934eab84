"""Muon for hidden matrices and AdamW for the rest, as one optimizer: Lightning's automatic optimization takes one.

Muon: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/ ; AdamW: Loshchilov & Hutter 2019,
https://arxiv.org/abs/1711.05101. The update of each matrix is that of ``torch.optim.Muon``, but matrices of one shape
go through Newton-Schulz together.
"""

# Shape letters: K = matrices of one shape, M, N = rows and columns of a matrix, M <= N.

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from lightning_slm.errors import NoEffectWarning
from lightning_slm.nn.hardware import fast_dtype
from lightning_slm.nn.sharded import as_shard_of, local, part_for, whole
from lightning_slm.nn.stochastic_rounding import stochastic_round_
from lightning_slm.nn.targets import Patterns, matches

_QUINTIC = (3.4445, -4.7750, 2.0315)  # of Jordan et al.: steepest at zero, and close enough to one elsewhere
_BATCH_ELEMENTS = 2**24  # of a batch of matrices: bounds what Newton-Schulz holds beside the model


class MuonAdamW(Optimizer):
    """Orthogonalised momentum for the hidden matrices, AdamW for embeddings, head, norms and biases.

    A group with ``use_muon`` (as ``parameter_groups`` makes them) is taken at its word. In any other, two-dimensional
    parameters go to Muon. Embeddings and heads are told from hidden matrices by name, so give
    ``model.named_parameters()`` rather than ``model.parameters()``.

    Args:
        params: parameters, named parameters, or groups.
        lr: learning rate of AdamW: higher than where it moves hidden matrices, which are not among its own.
        muon_lr: learning rate of Muon, multiplied by sqrt(rows / columns) for tall matrices: what it moves a
            matrix's singular values by. It does not depend on the size of the gradients.
        weight_decay: decoupled; times the learning rate of the group. Not for groups that bring their own.
        betas: of AdamW.
        eps: of AdamW.
        momentum: of Muon, in Nesterov's form.
        ns_steps: Newton-Schulz iterations; in bf16 where the device has it, else in float32.
        not_muon: fnmatch patterns of names of matrices that go to AdamW; only names can match.
        stochastic_rounding: compute the update of bfloat16 parameters in float32, moments included, and round it so
            that small ones arrive on average. The random bits depend on the step alone: replicas stay equal, and a
            resumed run draws the same ones.

    >>> model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4))
    >>> optimizer = MuonAdamW(model.named_parameters(), not_muon="0.*")
    >>> [(group["use_muon"], group["param_names"]) for group in optimizer.param_groups]
    [(True, ['1.weight']), (False, ['0.weight', '1.bias'])]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        muon_lr: float = 0.02,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        momentum: float = 0.95,
        ns_steps: int = 5,
        not_muon: Patterns = ("*embed*", "*wte*", "*wpe*", "*head*"),
        stochastic_rounding: bool = False,
    ) -> None:
        for name, value in dict(lr=lr, muon_lr=muon_lr, weight_decay=weight_decay, eps=eps).items():
            if value < 0:
                raise ValueError(f"MuonAdamW: {name}={value} must not be negative.")
        for name, value in {"betas[0]": betas[0], "betas[1]": betas[1], "momentum": momentum}.items():
            if not 0 <= value < 1:
                raise ValueError(f"MuonAdamW: {name}={value} must be at least 0 and below 1.")
        self._muon_lr, self._not_muon = muon_lr, not_muon
        self._stochastic_rounding = stochastic_rounding
        defaults = dict(lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, momentum=momentum, ns_steps=ns_steps)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as it is if it says ``use_muon``, else its matrices and its other parameters as two."""
        if "use_muon" not in param_group:
            params = param_group["params"]
            params = [params] if isinstance(params, Tensor) else list(params)
            for use_muon in (True, False):
                if chosen := [p for p in params if self._is_for_muon(p) is use_muon]:
                    self.add_param_group({**param_group, "params": chosen, "use_muon": use_muon})
            return
        if param_group["use_muon"]:
            param_group.setdefault("lr", self._muon_lr)
        super().add_param_group(param_group)
        if param_group["use_muon"] and any(p.ndim != 2 for p in param_group["params"]):
            shapes = [tuple(p.shape) for p in param_group["params"] if p.ndim != 2]
            raise ValueError(f"MuonAdamW: use_muon is for matrices, but the group has parameters of shapes {shapes}.")

    def _is_for_muon(self, param: Tensor | tuple[str, Tensor]) -> bool:
        name, tensor = param if isinstance(param, tuple) else ("", param)
        return tensor.ndim == 2 and not matches(name, self._not_muon)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of all groups, after ``closure`` (Lightning runs forward and backward in it)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            if params := [p for p in group["params"] if p.grad is not None]:
                weights = [local(p).float() if self._rounds(p) else local(p) for p in params]
                (self._muon if group["use_muon"] else self._adamw)(params, weights, group)
                self._round_back(params, weights, group, index)
        if self._stochastic_rounding and not any("rounded" in group for group in self.param_groups):
            self._stochastic_rounding = False
            warnings.warn(
                "stochastic_rounding is for bfloat16 parameters, and this model has none: train it with "
                'precision="bf16-true".',
                NoEffectWarning,
                stacklevel=2,
            )
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would round moments in float32 to the dtype of their parameters."""
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(ids, params):
            for name, value in state_dict["state"].get(i, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[p][name].dtype:
                    self.state[p][name] = value.to(self.state[p][name].device, copy=True)

    def _rounds(self, param: Tensor) -> bool:
        return self._stochastic_rounding and param.dtype == torch.bfloat16

    def _round_back(self, params: list[Tensor], weights: list[Tensor], group: dict[str, Any], index: int) -> None:
        """Into the parameters, where ``weights`` are copies."""
        if not any(map(self._rounds, params)):
            return
        group["rounded"] = group.get("rounded", 0) + 1
        seed = group["rounded"] * len(self.param_groups) + index
        generators = {w.device: torch.Generator(w.device).manual_seed(seed) for w in weights}
        for param, weight in zip(params, weights):
            if self._rounds(param):
                stochastic_round_(local(param), weight, generators[weight.device])

    def _moments(self, name: str, params: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
        """One of each parameter, zeros at first, in the dtype that the update is computed in; this rank's parts."""
        for p, weight in zip(params, weights):
            held = self.state[p].get(name)
            if held is None or held.dtype != weight.dtype:
                made = torch.zeros_like(p, dtype=weight.dtype) if held is None else held.to(weight.dtype)
                self.state[p][name] = made
        return [local(self.state[p][name]) for p in params]

    def _muon(self, params: list[Tensor], weights: list[Tensor], group: dict[str, Any]) -> None:
        momenta = self._moments("momentum_buffer", params, weights)
        grads = _grads(params, weights)
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(grads, momenta, group["momentum"])
        # All else is per element, and so done on local shards; Newton-Schulz needs whole matrices.
        updates = orthogonalize([whole(as_shard_of(u, p)) for u, p in zip(nesterov, params)], group["ns_steps"])
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        for param, weight, update in zip(params, weights, updates):
            rows, columns = param.shape
            scale = max(1.0, rows / columns) ** 0.5
            weight.add_(part_for(update, param), alpha=-group["lr"] * scale)

    def _adamw(self, params: list[Tensor], weights: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            self.state[p].setdefault("step", torch.zeros((), dtype=torch.float32))
        adamw(
            weights,
            _grads(params, weights),
            self._moments("exp_avg", params, weights),
            self._moments("exp_avg_sq", params, weights),
            [],
            [self.state[p]["step"] for p in params],
            fused=all(p.device.type == "cpu" for p in params) or None,  # one pass over memory; elsewhere torch chooses
            amsgrad=False,
            maximize=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )


def orthogonalize(matrices: Sequence[Tensor], steps: int = 5, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Each matrix with its singular values pulled towards one, by a quintic Newton-Schulz iteration.

    Matrices of one shape, or its transpose, are multiplied together: for small ones that is several times faster.

    Args:
        matrices: of any shapes, each (rows, columns).
        steps: five bring singular values to within about 0.7 to 1.2.
        dtype: to compute in; None: bf16 where the device multiplies it in hardware, else float32.
    """
    batches: dict[tuple, list[int]] = defaultdict(list)
    for i, matrix in enumerate(matrices):
        batches[(*sorted(matrix.shape), matrix.device)].append(i)
    done: dict[int, Tensor] = {}
    for (M, N, device), members in batches.items():
        size = max(1, _BATCH_ELEMENTS // (M * N))
        for chunk in (members[k : k + size] for k in range(0, len(members), size)):
            wide_KMN = torch.stack([_wide(matrices[i]) for i in chunk]).to(dtype or fast_dtype(device))
            done.update((i, _wide_as(x, matrices[i])) for i, x in zip(chunk, _newton_schulz(wide_KMN, steps)))
    return [done[i] for i in range(len(matrices))]


def _newton_schulz(x_KMN: Tensor, steps: int) -> Tensor:
    a, b, c = _QUINTIC
    x_KMN = x_KMN / x_KMN.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # so the spectral norm is at most one
    for _ in range(steps):
        gram_KMM = x_KMN @ x_KMN.mT
        update_KMM = torch.baddbmm(gram_KMM, gram_KMM, gram_KMM, beta=b, alpha=c)
        x_KMN = torch.baddbmm(x_KMN, update_KMM, x_KMN, beta=a)
    return x_KMN


def _wide(matrix: Tensor) -> Tensor:
    return matrix.T if matrix.shape[0] > matrix.shape[1] else matrix


def _wide_as(wide_MN: Tensor, matrix: Tensor) -> Tensor:
    return wide_MN.T if matrix.shape[0] > matrix.shape[1] else wide_MN


def _grads(params: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """This rank's parts, in the dtype that the update is computed in."""
    return [local(p.grad).to(weight.dtype) for p, weight in zip(params, weights) if p.grad is not None]
