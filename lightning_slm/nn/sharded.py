"""Sharded parameters (DTensor) and plain ones alike: this rank's part of a tensor, and the whole of it."""

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def local(tensor: Tensor) -> Tensor:
    """This rank's part; of a plain tensor, the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The tensor that all ranks hold parts of; all of them must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_shard_of(part: Tensor, like: Tensor) -> Tensor:
    """What the ranks hold as ``part`` each, as one tensor that is sharded like ``like``."""
    if not isinstance(like, DTensor):
        return part
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def part_for(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a plain tensor that every rank holds whole, cut as ``like`` is; without communication."""
    if not isinstance(like, DTensor):
        return tensor
    mesh = like.device_mesh
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=like.placements).to_local()
