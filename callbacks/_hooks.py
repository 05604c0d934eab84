"""What several callbacks need: to wrap a module's method and take the wrap off again, and early refusals."""

import functools
from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_slm.nn.sharded import flattens_weights
from lightning_slm.nn.targets import what_is_left_alone

Undo = Callable[[], None]


def wrap_method(owner: Any, name: str, around: Callable[..., Any]) -> Undo:
    """Let ``around(original, *args, **kwargs)`` answer for ``owner.name(...)``; the returned function takes it off.

    Several wraps of one method may be taken off in any order: one that lies under another becomes transparent, and is
    dropped with the one above it. Lightning inspects the signature behind one ``functools.wraps``, never behind two.
    """
    original = getattr(owner, name)
    was_on_instance = name in vars(owner)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs) if wrapper.active else original(*args, **kwargs)  # type: ignore[attr-defined]

    def restore() -> None:
        if was_on_instance:
            setattr(owner, name, original)
        else:
            delattr(owner, name)

    def undo() -> None:
        wrapper.active = False  # type: ignore[attr-defined]
        top = vars(owner).get(name)
        while top is not None and getattr(top, "active", True) is False:
            top.restore()
            top = vars(owner).get(name)

    wrapper.__wrapped__ = getattr(original, "__wrapped__", original)  # type: ignore[attr-defined]
    wrapper.active, wrapper.restore = True, restore  # type: ignore[attr-defined]
    setattr(owner, name, wrapper)
    return undo


def refuse_flat_weights(callback: Any, trainer: Any) -> None:
    """Raises: ValueError: the strategy keeps the weights in flat buffers, where a callback neither finds nor changes
    them.
    """
    if found := flattens_weights(trainer.strategy):
        raise ValueError(
            f"{type(callback).__name__} needs the weights as matrices, and {found} keeps them in flat buffers: use "
            'strategy="slm_fsdp2", which shards the same states (zero_stage=2 or 3), "slm_zero1", or "ddp".'
        )


def say_what_is_left_alone(who: Any, model: Any) -> None:
    """Tell the user which weights compression does not touch, once a run."""
    if (what := what_is_left_alone(model)) is not None:
        rank_zero_info(f"{type(who).__name__}: {what}.")


def when_layers_exist(pl_module: Any, work: Callable[[], None]) -> Undo:
    """Do ``work`` in ``Callback.setup``: now, and again after the module's own ``configure_model`` if it has one.

    ``work`` must be idempotent. Lightning offers no callback hook between ``configure_model`` and the optimizers.
    """
    own = type(pl_module).configure_model
    if own.__module__.partition(".")[0] in ("lightning", "pytorch_lightning"):
        work()
        return lambda: None

    def configure_then_work(original: Callable[[], None]) -> None:
        original()
        work()

    return wrap_method(pl_module, "configure_model", configure_then_work)
