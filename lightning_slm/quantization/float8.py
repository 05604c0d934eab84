"""FP8 training: the three matrix products of a linear layer on 8-bit floats, scaled anew at every step.

The arithmetic is torchao's, bit for bit (https://arxiv.org/abs/2209.05433 has the two formats); layers change their
class in place, so parameters, state-dict keys, hooks and optimizers stay. A scale is format maximum / largest
magnitude, clamped to 1e-12 from below. Which format and how many scales, by recipe:

    ==================  ==================  ==================  ==================  ==============================
    recipe              inputs              weights             gradients           scales
    ==================  ==================  ==================  ==================  ==============================
    tensorwise          E4M3, one           E4M3, one           E5M2, one           any float32
    rowwise             E4M3, one per row   E4M3, one per row   E4M3, one per row   powers of two, rounded down
    rowwise_with_gw_hp  as rowwise          as rowwise; one     as rowwise; the     powers of two, rounded down
                                            for grad_input      weight's gradient
                                                                is not in FP8
    ==================  ==================  ==================  ==================  ==============================

"Row" is along the sum of the product in question, so an operand of two products is rounded twice. Importing this
module imports torchao, which takes seconds.
"""

# Shape letters: N = any leading shape (tokens), O = outputs, I = inputs.

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchao.float8 import Float8LinearConfig, Float8LinearRecipeName, convert_to_float8_training
from torchao.float8.distributed_utils import tensor_already_casted_to_fp8
from torchao.float8.float8_linear import Float8Linear as TorchaoFloat8Linear
from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

from lightning_slm.errors import near
from lightning_slm.nn.sharded import as_shard_of
from lightning_slm.nn.smooth_swiglu import SmoothSwiGLU, smoothed
from lightning_slm.nn.targets import Patterns
from lightning_slm.quantization.layers import exchange_

RECIPES = tuple(recipe.value for recipe in Float8LinearRecipeName)
_MULTIPLE = 16  # of both sides of an FP8 operand, and of the length of the sum: what the hardware takes


@dataclass(frozen=True, slots=True)
class Float8Settings:
    """How one layer computes."""

    recipe: str
    emulate: bool  # round to FP8, multiply in float32


class Float8Linear(TorchaoFloat8Linear):
    """``nn.Linear`` whose products are made in FP8; made by ``float8_``."""

    settings: Float8Settings
    gatherable: bool  # whether what is gathered could be the rounded weight
    only_in_training = True
    smooths = True  # its forward takes `smooth`: see lightning_slm.nn.smooth_swiglu

    def forward(self, x_NI: Tensor, smooth: bool = False) -> Tensor:  # type: ignore[override]
        """Args: smooth: level the channels of the inputs against those of the weight before rounding."""
        if torch.is_inference_mode_enabled():  # torchao's tensors know no_grad only
            with torch.inference_mode(False), torch.no_grad():
                return self.forward(x_NI, smooth)
        device = x_NI.device.type
        if torch.is_autocast_enabled(device):  # torchao knows the GPU's autocast only
            x_NI = x_NI.to(torch.get_autocast_dtype(device))
        weight_OI = self.weight
        if smooth and not tensor_already_casted_to_fp8(weight_OI):
            x_NI, weight_OI = smoothed(x_NI, weight_OI)
        products = self.linear_mm_config
        if not self.settings.emulate and x_NI.numel() // x_NI.shape[-1] % _MULTIPLE:
            # The weight's gradient is a sum over tokens, and the hardware takes sums of such lengths only.
            padded = products.grad_weight._replace(pad_inner_dim=True)
            products = products._replace(grad_weight=padded)
        y_NO = matmul_with_hp_or_float8_args.apply(x_NI, weight_OI.t(), products, self.config)
        return y_NO if self.bias is None else y_NO + self.bias.to(y_NO.dtype)


def float8_(
    model: nn.Module,
    recipe: str = "tensorwise",
    emulate: bool = False,
    targets: Patterns = "*",
    skip: Patterns = (),
) -> list[str]:
    """Let the linear layers of ``model`` multiply in FP8, in place; doing it twice is fine.

    Args:
        recipe: "tensorwise" (fastest), "rowwise" (more exact) or "rowwise_with_gw_hp" (most exact): see above.
        emulate: round as FP8 does but multiply in float32, on any hardware; slower than without.
        targets: fnmatch patterns of the linear layers; embeddings and output heads never are.
        skip: patterns to leave out again.

    Returns: the names of the layers that multiply in FP8 now. Layers with a side that is no multiple of 16 stay as
        they are and are named in a warning.

    Raises:
        ValueError: an unknown recipe, a pattern that matches nothing, a layer that another technique has exchanged.
        RuntimeError: without ``emulate``, where the hardware does not multiply FP8.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe={recipe!r} is unknown. {near(recipe, RECIPES)}")
    if not emulate:
        check_hardware(recipe, next((p.device for p in model.parameters()), None))
    config = replace(Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    # A layer of torchao's own as the pattern: making it also mends what the compiler does to FP8.
    pattern: Any = convert_to_float8_training(nn.Linear(16, 16, bias=False, device="meta"), config=config)
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    rescaled = {id(m.down_proj) for m in model.modules() if isinstance(m, SmoothSwiGLU)}

    def attributes(layer: nn.Linear) -> dict[str, Any]:
        gatherable = owners[id(layer.weight)] == 1 and id(layer) not in rescaled
        return {"config": pattern.config, "linear_mm_config": pattern.linear_mm_config, "gatherable": gatherable}

    return exchange_(model, Float8Linear, Float8Settings(recipe, emulate), targets, skip, _misfit, attributes)


def check_hardware(recipe: str, device: torch.device | str | None = None) -> None:
    """Args: device: where the model will train; None, or the CPU's, if it is not there yet: the first GPU counts.

    Raises: RuntimeError: it does not multiply FP8 by this recipe.
    """
    wanted = (8, 9) if recipe == "tensorwise" else (9, 0)
    found = "this machine has no GPU that PyTorch can use"
    if torch.cuda.is_available():
        index = torch.device(device).index if device is not None else None
        found = f"{torch.cuda.get_device_name(index)} does not"
        if torch.version.hip is not None:  # capabilities of AMD's say nothing of the kind
            name = torch.cuda.get_device_properties(index or 0).gcnArchName
            fits = any(kind in name for kind in ("gfx94", "gfx95"))
        else:
            fits = torch.cuda.get_device_capability(index) >= wanted
        if fits:
            return
    raise RuntimeError(
        f"FP8 with recipe={recipe!r} needs an NVIDIA GPU of compute capability {wanted[0]}.{wanted[1]} or an AMD "
        f"MI300, and {found}. emulate=True computes with the same rounding on any hardware, slower than without FP8."
    )


def float8_all_gather_(module: nn.Module) -> list[str]:
    """Let FSDP2 gather the weights of FP8 layers as FP8, a quarter of float32's bytes; call it before ``fully_shard``.

    The values are those that the layers would round to after the gathering. Parameters become new objects, so do it
    before making optimizers. State dicts hold plain tensors. Weights that two modules share, those of a
    ``SmoothSwiGLU``'s down projection (which are scaled before they are rounded), and those without values yet (on the
    meta device) are left as they are. Doing it twice is fine.

    Args:
        module: a model that ``float8_`` has been through, or a part of it.

    Returns: the names of the layers whose weights are gathered as FP8.

    Raises: ValueError: a layer whose recipe is not "tensorwise": what a rank holds has no scale of its own then.
    """
    names = []
    for name, layer in module.named_modules():
        if not isinstance(layer, Float8Linear) or not layer.gatherable or layer.weight.is_meta:
            continue
        if layer.settings.recipe != "tensorwise":
            raise ValueError(
                f"{name!r} computes by recipe={layer.settings.recipe!r}, but weights are gathered in FP8 with one "
                'scale: use recipe="tensorwise", or gather them in high precision.'
            )
        if not gathers_float8(layer):
            _wrap_weight_(layer)
        names.append(name)
    return names


def gathers_float8(layer: nn.Module) -> bool:
    """Whether the weight of a layer, sharded or not yet, is gathered as FP8."""
    weight = getattr(layer, "weight", None)
    return isinstance(_part(weight), WeightWithDynamicFloat8CastTensor)


def _wrap_weight_(layer: Float8Linear) -> None:
    plain = layer.weight
    dtype = layer.config.cast_config_weight.target_dtype
    wrapped = WeightWithDynamicFloat8CastTensor(plain.detach(), layer.linear_mm_config, dtype)
    layer.weight = nn.Parameter(wrapped, requires_grad=plain.requires_grad)
    layer.weight.__dict__.update(vars(plain))  # marks that optimizers read
    layer.register_state_dict_post_hook(_plain_weight)


def _plain_weight(layer: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """In a checkpoint the wrapper would be an object of torchao's; what it wraps is an ordinary tensor, or shard."""
    weight = state[f"{prefix}weight"]
    part = _part(weight)
    if isinstance(part, WeightWithDynamicFloat8CastTensor) and not weight.requires_grad:
        state[f"{prefix}weight"] = as_shard_of(part._tensor, weight)


def _part(weight: Any) -> Any:
    return weight._local_tensor if isinstance(weight, DTensor) else weight


def _misfit(layer: nn.Linear) -> str | None:
    if any(side % _MULTIPLE for side in layer.weight.shape):
        return f"of {tuple(layer.weight.shape)} is not a multiple of {_MULTIPLE} on both sides"
    return None
