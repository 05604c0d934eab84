"""The names that patterns are written in. A new mixer is a file in ``lightning_slm/nn`` and a line here."""

from lightning_slm.nn.attention import Attention, SlidingWindowAttention
from lightning_slm.nn.hymba import Hymba, HymbaReuse, HymbaSliding, HymbaSlidingReuse
from lightning_slm.nn.linear_attention import LinearAttention
from lightning_slm.nn.linformer import Linformer
from lightning_slm.nn.longformer import Longformer
from lightning_slm.nn.lsh import LSHAttention
from lightning_slm.nn.mamba import Mamba
from lightning_slm.nn.mamba2 import Mamba2
from lightning_slm.nn.mixer import Mixer
from lightning_slm.nn.mobilebert_ffn import MobileBertFFN
from lightning_slm.nn.moe import MoE
from lightning_slm.nn.nystrom import Nystrom
from lightning_slm.nn.relu_mlp import GeluMLP, ReluGLU, ReluMLP, SquaredReluMLP
from lightning_slm.nn.routing import RoutingAttention
from lightning_slm.nn.rwkv4 import RWKV4, RWKV4FFN
from lightning_slm.nn.rwkv7 import RWKV7, RWKV7FFN, RWKV7First
from lightning_slm.nn.smooth_swiglu import SmoothSwiGLU
from lightning_slm.nn.swiglu import SwiGLU

TOKEN_MIXERS: dict[str, type[Mixer]] = {
    "attn": Attention,
    "swa": SlidingWindowAttention,
    "hymba": Hymba,
    "hymba_reuse": HymbaReuse,
    "hymba_swa": HymbaSliding,
    "hymba_swa_reuse": HymbaSlidingReuse,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "linear_attention": LinearAttention,
    "linformer": Linformer,
    "nystrom": Nystrom,
    "longformer": Longformer,
    "lsh": LSHAttention,
    "routing": RoutingAttention,
    "rwkv4": RWKV4,
    "rwkv7": RWKV7,
    "rwkv7_first": RWKV7First,
}

CHANNEL_MIXERS: dict[str, type[Mixer]] = {
    "mlp": SwiGLU,
    "smooth_mlp": SmoothSwiGLU,
    "moe": MoE,
    "relu_mlp": ReluMLP,
    "relu2_mlp": SquaredReluMLP,
    "gelu_mlp": GeluMLP,
    "relu_glu": ReluGLU,
    "mobilebert_ffn": MobileBertFFN,
    "rwkv4_ffn": RWKV4FFN,
    "rwkv7_ffn": RWKV7FFN,
}
