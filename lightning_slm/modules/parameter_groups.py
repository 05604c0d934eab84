"""Which parameters decay, and which go to Muon: the groups that every optimizer of ours gets."""

from typing import Any

from torch import nn

from lightning_slm.nn.targets import weight_matrices


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The trainable parameters of ``model`` in at most three named groups, for any optimizer.

    - "matrices": of hidden layers; they decay, and are Muon's (``use_muon``, a key that other optimizers ignore).
    - "others": an untied head, routers and other protected matrices, tensors of three and more dimensions: they decay.
    - "no_decay": embeddings, norms, biases, and whatever carries ``_no_weight_decay = True`` (``weight_decay`` is 0).

    >>> model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    >>> {group["name"]: len(group["params"]) for group in parameter_groups(model)}
    {'matrices': 1, 'no_decay': 4}
    """
    hidden = {id(target.weight) for target in weight_matrices(model)}
    embedded = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    groups: dict[str, dict[str, Any]] = {
        "matrices": {"params": [], "use_muon": True},
        "others": {"params": [], "use_muon": False},
        "no_decay": {"params": [], "use_muon": False, "weight_decay": 0.0},
    }
    for p in model.parameters():
        if p.requires_grad:
            decays = p.ndim > 1 and id(p) not in embedded and not getattr(p, "_no_weight_decay", False)
            name = "no_decay" if not decays else "matrices" if id(p) in hidden else "others"
            groups[name]["params"].append(p)
    return [{**group, "name": name} for name, group in groups.items() if group["params"]]
