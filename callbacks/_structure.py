"""Models that become smaller while they train: what a checkpoint, several ranks and other callbacks need of that."""

import gc
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel

from lightning_slm.callbacks._hooks import Undo, wrap_method
from lightning_slm.pruning import HeldMasks, NMWeights, replay_

RECORD = "structure"  # in a callback's state: what was applied, as a list of [optimizer step, entry of `shrink_`]


def restore_structure_first(pl_module: Any) -> Undo:
    """Let the module be cut as it was cut in the run that wrote a checkpoint, before the checkpoint's weights come.

    Lightning restores callbacks after the weights; the module's own ``on_load_checkpoint`` comes before them. Cuts of
    several callbacks are done in the order in which they were done then.
    """

    def replay_then_go_on(original: Callable[[Any], None], checkpoint: dict[str, Any]) -> None:
        if not _fits(pl_module, checkpoint["state_dict"]):
            replay_(pl_module, structure_in(checkpoint))
            tell_module(pl_module)
        original(checkpoint)

    return wrap_method(pl_module, "on_load_checkpoint", replay_then_go_on)


def structure_in(checkpoint: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What callbacks cut in the run that wrote a checkpoint, for `replay_`, from the first step to the last."""
    states = checkpoint.get("callbacks", {}).values()
    cuts = [cut for state in states if isinstance(state, Mapping) for cut in state.get(RECORD, ())]
    return [entry for _, entry in sorted(cuts, key=lambda cut: cut[0])]


def after_a_cut(trainer: Any, pl_module: Any) -> None:
    """Between two steps: DDP counts gradients by the shapes it saw first, so that it begins anew."""
    tell_module(pl_module)
    strategy = trainer.strategy
    if isinstance(strategy.model, DistributedDataParallel):
        strategy.model = pl_module
        gc.collect()  # the old one takes its hooks off the parameters when it goes
        strategy.configure_ddp()


def tell_module(pl_module: Any) -> None:
    """A module of ours rebuilds its network from the configuration that it keeps for checkpoints; callbacks that found
    their layers before look again (``on_new_structure``).
    """
    from lightning_slm.modules.stored import configuration_of  # here, since transformers takes seconds to import

    if isinstance(pl_module.hparams.get("model"), Mapping):
        pl_module.hparams["model"] = configuration_of(pl_module.model)
    for callback in pl_module.trainer.callbacks:
        if callable(look_again := getattr(callback, "on_new_structure", None)):
            look_again(pl_module)


def forget_removed(before: Iterable[nn.Parameter], pl_module: Any, optimizers: Iterable[Optimizer]) -> None:
    """Let optimizers forget those parameters of before that the module has no more; before their states come, which
    are counted.
    """
    left = {id(p) for p in pl_module.parameters()}
    gone = {id(p) for p in before} - left
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["params"] = [p for p in group["params"] if id(p) not in gone]


def refuse_what_keeps_shapes(callback: Any, trainer: Any, pl_module: Any) -> None:
    """Raises: ValueError: something in this run would go on with the old shapes after a cut; says what, and the way
    out.
    """
    who, strategy = type(callback).__name__, getattr(trainer.strategy, "strategy_name", "")
    if hasattr(type(trainer.strategy), "device_mesh") or strategy == "slm_zero1":
        what = "keeps weights" if strategy != "slm_zero1" else "keeps the optimizer's states"
        raise ValueError(
            f"{who} makes the model smaller while it trains, and {type(trainer.strategy).__name__} {what} in shards "
            'of the old shapes: use strategy="ddp", or a single device.'
        )
    for name, module in pl_module.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{who} makes the model smaller while it trains, and what was compiled of {name!r} would go on as it "
                "was: train without compile, and compile the model that comes out."
            )


def refuse_callbacks_that_keep_shapes(callback: Any, trainer: Any, masks: bool = True) -> None:
    """The same of other callbacks, once they have begun.

    Args:
        masks: those that hold masks, too; False: they have yet to make them.

    Raises:
        ValueError: one holds masks, or an average, of the weights.
    """
    for other in trainer.callbacks:
        keeps = (AveragedModel, HeldMasks, NMWeights) if masks else (AveragedModel,)
        held = [type(v) for v in vars(other).values() if isinstance(v, keeps)]
        if held and other is not callback:
            raise ValueError(
                f"{type(callback).__name__} makes the model smaller while it trains, and {type(other).__name__} keeps "
                "copies of its weights' shapes: give that callback to a second run, from the smaller model."
            )


def _fits(module: nn.Module, weights: Mapping[str, Any]) -> bool:
    own = module.state_dict()
    return own.keys() == weights.keys() and all(own[name].shape == w.shape for name, w in weights.items())
