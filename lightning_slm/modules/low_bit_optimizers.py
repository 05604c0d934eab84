"""AdamW with its moments in 8 or 4 bits: torchao's optimizers, made to resume, and to step on a CPU without a compiler.

8 bits: Dettmers et al. 2021, https://arxiv.org/abs/2110.02861; 4 bits: Li et al. 2023, https://arxiv.org/abs/2309.01507;
FP8: Peng et al. 2023, https://arxiv.org/abs/2310.18313 (FP8-LM: there the first moment, and here both).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
import torchao.optim
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import ParamsT
from torchao.optim.adam import _AdamBase, single_param_adam

from lightning_slm.nn.sharded import local, part_for, sharded_like, whole

_PARTS = ("codes", "scale")  # of a moment in few bits, in a checkpoint


@cache
def _compiled() -> Callable[..., None]:
    return torch.compile(single_param_adam, fullgraph=True, dynamic=False)


def _compiled_adam(*args: Any) -> None:
    with torch._dynamo.utils.disable_cache_limit():  # as torchao: a kernel per shape, and those are not without end
        _compiled()(*args)


class _LowBitAdamW(_AdamBase):
    """AdamW with moments in few bits, each block of elements with a scale of its own.

    A tensor below 4096 elements, or that the blocks do not divide, keeps its moments in its own dtype.

    Args:
        params: parameters or groups.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        block_size: elements that share a scale; None: 256, and 128 in 4 bits.
        bf16_stochastic_round: round bfloat16 parameters so that small updates arrive on average. The random bits depend
            on the step alone: replicas stay equal, and a resumed run draws the same ones.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        block_size: int | None = None,
        bf16_stochastic_round: bool = False,
    ) -> None:
        options: dict[str, Any] = {} if block_size is None else {"block_size": block_size}
        options["bf16_stochastic_round"] = bf16_stochastic_round
        super().__init__(params, lr, betas, eps, weight_decay, **options)  # torchao's of that many bits

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, after ``closure`` (Lightning runs forward and backward in it)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with self._bits_of_the_step() if self.bf16_stochastic_round else nullcontext():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self._update(p, p.grad, group)
        return loss

    def _update(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, rounds = self.state[p], self.bf16_stochastic_round and p.dtype == torch.bfloat16
        if not state:
            zeros = {name: self._new_buffer(p, name == "exp_avg") for name in ("exp_avg", "exp_avg_sq")}
            state.update(step=torch.tensor(0.0), **zeros)
        state["step"] += 1
        # Element by element, hence on this rank's parts. On a CPU, compiling takes a C++ compiler and seconds a shape.
        adam = single_param_adam if p.device.type == "cpu" else _compiled_adam
        moments = [local(state[name]) for name in ("exp_avg", "exp_avg_sq")]
        options = (*group["betas"], group["weight_decay"], group["eps"], self.is_adamw, rounds)
        adam(local(p.detach()), local(grad), state["step"], *moments, None, group["lr"], *options)

    @contextmanager
    def _bits_of_the_step(self) -> Iterator[None]:
        """Rounding draws from the global generators: let them start at the step's number, and put them back."""
        devices = {p.device for group in self.param_groups for p in group["params"]}
        first = self.param_groups[0]
        first["rounded"] = first.get("rounded", 0) + 1
        with torch.random.fork_rng([d for d in devices if d.type != "cpu"]):
            for device in devices:
                generator: Any = torch.default_generator if device.type == "cpu" else torch.get_device_module(device)
                generator.manual_seed(first["rounded"])
            yield

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor:
        """Zeros in few bits; a tensor whose rows are not divided evenly among the ranks keeps its own dtype, too."""
        if isinstance(p, DTensor):
            shards = math.prod(p.device_mesh.size(i) for i, placed in enumerate(p.placements) if placed.is_shard())
            if p.shape[0] % shards:
                return torch.zeros_like(p)
        return super()._new_buffer(p, signed)

    def state_dict(self) -> dict[str, Any]:
        """Moments in few bits as dicts of plain tensors, "codes" and "scale": a checkpoint loads without torchao."""
        state = super().state_dict()
        plain = {i: {name: _taken_apart(value) for name, value in s.items()} for i, s in state["state"].items()}
        return {**state, "state": plain}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What `state_dict` gave, of any number of processes.

        Raises:
            ValueError: moments of another optimizer, or in other blocks.
        """
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = dict(zip(ids, (p for group in self.param_groups for p in group["params"])))
        state = {
            i: {name: self._put_together(params[i], name, value) for name, value in s.items()}
            for i, s in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": state})

    def _put_together(self, param: Tensor, name: str, value: Any) -> Any:
        if name == "step":
            return value
        signed = name == "exp_avg"
        moment = self._new_buffer(param, signed)
        if not isinstance(value, dict):
            value = value if isinstance(value, DTensor) else sharded_like(value, param)
            if not hasattr(local(moment), "codes"):
                return value
            local(moment).copy_(local(value).to(local(moment).device))  # it was too small a part to be in few bits
        elif hasattr(local(moment), "codes"):
            _fill_(local(moment), {part: _part_for(value[part], param) for part in _PARTS}, name)
        else:  # and now it is
            of_all = self._subclass_zeros(torch.empty(param.shape, device=param.device), signed, self.block_size)
            _fill_(of_all, {part: whole(value[part]) for part in _PARTS}, name)
            return sharded_like(of_all.dequantize().to(moment.dtype), moment)
        return moment


def _taken_apart(moment: Any) -> Any:
    """Parts as one row of all that the ranks hold."""
    held = local(moment) if isinstance(moment, Tensor) else None
    if not hasattr(held, "codes"):
        return moment
    parts = {part: _storable(getattr(held, part)).flatten() for part in _PARTS}
    if not isinstance(moment, DTensor):
        return parts
    mesh, placements = moment.device_mesh, moment.placements
    return {part: DTensor.from_local(row, mesh, placements, run_check=False) for part, row in parts.items()}


def _storable(part: Tensor) -> Tensor:
    """FP8 as int8, for gloo cannot gather it."""
    return part.view(torch.int8) if part.is_floating_point() and part.itemsize == 1 else part


def _part_for(row: Tensor, param: Tensor) -> Tensor:
    """This rank's part of a row."""
    if isinstance(row, DTensor) or not isinstance(param, DTensor):
        return local(row)
    return part_for(row.to(param.device_mesh.device_type), param)


def _fill_(moment: Any, parts: dict[str, Tensor], name: str) -> None:
    for part, given in parts.items():
        held = _storable(getattr(moment, part))
        if held.numel() != given.numel() or held.dtype != given.dtype:
            raise ValueError(
                f"{name} of a parameter was saved by another optimizer or with another block_size: its {part} are "
                f"{given.numel()} of {given.dtype}, and {held.numel()} of {held.dtype} are wanted."
            )
        held.copy_(given.view_as(held))


class AdamW8bit(_LowBitAdamW, torchao.optim.AdamW8bit):
    """AdamW with moments in 8 bits: 2.03 bytes per parameter instead of 8."""


class AdamW4bit(_LowBitAdamW, torchao.optim.AdamW4bit):
    """AdamW with moments in 4 bits: 1.06 bytes per parameter instead of 8."""


class AdamWFp8(_LowBitAdamW, torchao.optim.AdamWFp8):
    """AdamW with moments in FP8 (E4M3): 2.03 bytes per parameter instead of 8."""
