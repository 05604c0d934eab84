"""What a callback finds in a trainer and a module that it does not know: the network, the validation data."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_slm.distillation.teacher import token_ids


def network_of(pl_module: nn.Module) -> nn.Module:
    """The language model in a LightningModule: its child that can generate and trains; else the module itself."""
    able = [m for m in pl_module.children() if callable(getattr(m, "generate", None))]
    able = [m for m in able if any(p.requires_grad for p in m.parameters())]
    network = able[0] if able else pl_module
    return getattr(network, "_orig_mod", network)  # what torch.compile(network) wraps


def validation_loader(trainer: Any, pl_module: Any) -> Any:
    """The first validation dataloader, or None; asked for anew where Lightning has made none in this run."""
    loaders = trainer.val_dataloaders
    owner = trainer.datamodule or pl_module
    if loaders is None and _is_users(type(owner).val_dataloader):
        loaders = owner.val_dataloader()
    if isinstance(loaders, Mapping):
        loaders = list(loaders.values())
    if isinstance(loaders, list | tuple):
        return loaders[0] if loaders else None
    return loaders


def tokens_in(batch: Any) -> tuple[Tensor | None, Tensor | None]:
    """Token ids (B, T): ``input_ids``, else the first integers of that shape; and their ``attention_mask``, if any."""
    if isinstance(batch, Mapping):
        ids = token_ids([batch.get("input_ids"), *batch.values()])
        mask = batch.get("attention_mask")
    else:
        ids, mask = token_ids(batch if isinstance(batch, list | tuple) else [batch]), None
    return ids, mask if ids is not None and isinstance(mask, Tensor) and mask.shape == ids.shape else None


def _is_users(method: Any) -> bool:
    return method.__module__.partition(".")[0] not in ("lightning", "pytorch_lightning")
