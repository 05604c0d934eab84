"""From Hugging Face's Mixtral: Llama's attention, and experts in the place of its feed-forward layers."""

from typing import Any

from transformers import PreTrainedConfig

from lightning_slm.models.configuration import SLMConfig
from lightning_slm.models.convert import common, llama


def from_mixtral_config(theirs: PreTrainedConfig) -> SLMConfig:
    """The configuration of a Mixtral as a pattern of ours.

    Raises:
        ValueError: a variant that ours does not have.
    """
    common.refuse_variants("Mixtral", router_jitter_noise=(theirs.router_jitter_noise or 0.0, 0.0))
    config = llama.from_llama_config(theirs)
    config.pattern = str(config.pattern).replace("/mlp", "/moe")
    config.mixers = {"moe": experts(theirs, theirs.num_hidden_layers, normalize_topk=True)}
    return config


def experts(theirs: PreTrainedConfig, layers: int, normalize_topk: bool) -> dict[str, Any]:
    """The options of "moe" with which the training loss, too, is theirs.

    Theirs adds a balance loss only if ``output_router_logits`` is set. It counts slots per token, so that it is
    ``top_k`` at balance, where ours is 1; and it is taken once, over the tokens of all layers together, where ours is
    a sum over layers. With one layer of experts the two are the same.

    Args:
        layers: how many have experts.
    """
    top_k = theirs.num_experts_per_tok
    weight = theirs.router_aux_loss_coef * top_k / layers if theirs.output_router_logits else 0.0
    routing = {"experts": theirs.num_local_experts, "top_k": top_k, "normalize_topk": normalize_topk}
    return {**routing, "balance": weight, "z_loss": 0.0}


def names(name: str, config: SLMConfig) -> list[Any]:
    """Mixtral's parameters that one of ours is stacked from; (name, i): the i-th of a stack."""
    _, _, rest = name.partition(".channel_mixer.")
    if not rest:
        return llama.names(name)
    layer = name.split(".")[2]
    return [expert_part(f"model.layers.{layer}.mlp", rest, router="gate")]


def expert_part(theirs: str, ours: str, router: str) -> Any:
    """Where a parameter inside our `MoE` stands in their block of that name: experts are stacked there.

    >>> expert_part("layers.0.mlp", "experts.3.down_proj.weight", "gate")
    ('layers.0.mlp.experts.down_proj', 3)
    """
    kind, *path = ours.split(".")
    if kind == "router":
        return f"{theirs}.{router}.weight"
    return f"{theirs}.experts.{path[1]}", int(path[0])
