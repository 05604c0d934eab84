"""The names that patterns are written in. A new mixer is a file in ``lightning_slm/nn`` and a line here."""

from lightning_slm.nn.attention import Attention, SlidingWindowAttention
from lightning_slm.nn.mixer import Mixer
from lightning_slm.nn.smooth_swiglu import SmoothSwiGLU
from lightning_slm.nn.swiglu import SwiGLU

TOKEN_MIXERS: dict[str, type[Mixer]] = {
    "attn": Attention,
    "swa": SlidingWindowAttention,
}

CHANNEL_MIXERS: dict[str, type[Mixer]] = {
    "mlp": SwiGLU,
    "smooth_mlp": SmoothSwiGLU,
}
