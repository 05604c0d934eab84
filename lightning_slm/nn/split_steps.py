"""Optimizer states shared out over ranks: ZeRO stage 1 (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054)."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer


class SplitSteps:
    """Lets each rank make the steps of some parameters, hold only their states, and send the result to the others.

    Works on an optimizer as it is, of any class, between replicas whose gradients are equal (DDP). A parameter moves on
    one rank as a whole, so that optimizers of whole matrices (Muon, Shampoo) need no further exchange. What is moved
    and sent in a step is what an optimizer without this would have computed everywhere.

    Args:
        optimizer: must not have made a step yet.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.rank = optimizer, dist.get_rank()
        self.params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self.owners = _share_out([p.numel() for p in self.params], dist.get_world_size())
        # States may lie on a device of a backend that cannot send objects.
        self._objects = dist.new_group(backend="gloo")
        optimizer.step = self._with_mine_only(optimizer.step)  # type: ignore[method-assign]
        optimizer.register_step_post_hook(lambda *_: self._exchange())  # the first hook: later ones see all weights

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer, on the first rank with the states of all ranks, on the CPU; all must call this."""
        state = self.optimizer.state_dict()
        mine = {i: {k: _on_cpu(v) for k, v in values.items()} for i, values in state["state"].items()}
        parts: list[Any] | None = [None] * dist.get_world_size() if self.rank == 0 else None
        dist.gather_object(mine, parts, group=self._objects)
        together = {i: values for part in parts or [] for i, values in part.items()}
        return {**state, "state": dict(sorted(together.items()))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the states of this rank's parameters from those of all, of any strategy, on any number of ranks."""
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        mine = {i for i, owner in zip(ids, self.owners) if owner == self.rank}
        states = {i: values for i, values in state_dict["state"].items() if i in mine}
        self.optimizer.load_state_dict({**state_dict, "state": states})

    def _with_mine_only(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """A parameter without a gradient is left alone, and gets no state, by every optimizer of torch's kind."""

        @functools.wraps(step)  # with the mark of a learning-rate schedule that looks for it
        def step_of_mine(closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            others = [(p, p.grad) for p, owner in zip(self.params, self.owners) if owner != self.rank]
            for p, _ in others:
                p.grad = None
            try:
                step()
            finally:
                for p, grad in others:
                    p.grad = grad
            return loss

        return step_of_mine

    def _exchange(self) -> None:
        sent = [dist.broadcast(p.data, owner, async_op=True) for p, owner in zip(self.params, self.owners)]
        for work in sent:
            work.wait()


def _share_out(sizes: list[int], ranks: int) -> list[int]:
    """An owner for each parameter: the largest first, each to whoever has least.

    >>> _share_out([8, 1, 4, 3], ranks=2)
    [0, 1, 1, 1]
    """
    loads, owners = [0] * ranks, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += sizes[i]
    return owners


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value
