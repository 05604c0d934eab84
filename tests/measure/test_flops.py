"""The formula against PyTorch's counter, which sees the matrix products that really run; recurrences by hand."""

# Shape letters: B = batch, T = tokens.

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from support import Demo, tiny_llama
from torch import nn
from torch.distributed.tensor import DeviceMesh, Shard, distribute_module, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_slm.measure import flops_per_token
from lightning_slm.measure.flops import ForwardFlops, training_flops
from lightning_slm.models import SLMConfig, SLMForCausalLM
from lightning_slm.quantization import prepare_qat_

T = 16


def count(model, tokens, backward=False):
    """By PyTorch: a whole text at once, of which each token is multiplied with all the others before masking."""
    # The fused CPU kernel is not in PyTorch's list of formulas; the written-out one is.
    ids = torch.randint(0, 64, (1, tokens))
    with torch.set_grad_enabled(backward), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, use_cache=False).logits
        if backward:
            logits.sum().backward()
    return {str(op).rpartition(".")[2]: flops for op, flops in counter.get_flop_counts()["Global"].items()}


def counted(model, tokens, backward=False):
    return sum(count(model, tokens, backward).values())


def slm(**kwargs):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return SLMForCausalLM(SLMConfig(**{**sizes, "num_key_value_heads": 2, **kwargs}))


def llama():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2))


def hf(name, **kwargs):
    """A tiny model of Hugging Face's; experts one after the other, as the counter can see."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    sizes |= {"num_hidden_layers": 2, "num_key_value_heads": 2}
    config = getattr(transformers, f"{name}Config")(**{**sizes, **kwargs})
    config._experts_implementation = "eager"
    return getattr(transformers, f"{name}ForCausalLM")(config)


EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}


QWEN_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1}
DEEPSEEK |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 12}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}

MODELS = {
    "llama-gqa": llama,
    "slm": lambda: slm(pattern="attn/mlp*2"),
    "slm-repeated-blocks": lambda: slm(repeat=2),
    "slm-one-mlp-for-all": lambda: slm(pattern="attn/mlp@one*3"),
    "slm-one-mlp-for-some-repeated": lambda: slm(pattern="attn/mlp@one*2 attn/mlp", repeat=2),
    "mixtral": lambda: hf("Mixtral", **EXPERTS),
    "gpt-oss": lambda: hf("GptOss", head_dim=8, sliding_window=64, **EXPERTS),
    "granite-moe": lambda: hf("GraniteMoe", **EXPERTS),
    "qwen2-moe-shared-expert": lambda: hf("Qwen2Moe", **QWEN_MOE, shared_expert_intermediate_size=24),
    "deepseek-mla": lambda: hf("DeepseekV3", **DEEPSEEK, num_key_value_heads=4, first_k_dense_replace=1),
    "gpt2-conv1d": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_formula_counts_what_pytorch_counts(name):
    model = MODELS[name]().eval()
    assert flops_per_token(model, context=T) * T == counted(model, T)


SSM = {"vocab_size": 64, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2}
MAMBA2 = {**SSM, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8}
JAMBA = {"num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1}
JAMBA |= {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4}
DELTA = {**QWEN_MOE, "shared_expert_intermediate_size": 16, "head_dim": 8, "linear_key_head_dim": 8}
DELTA |= {"linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
HALF = {"layer_types": ["linear_attention", "full_attention"]}
RWKV = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}

# The model; of one token, the FLOPs in its states by hand (layers x each element x elements); layers of attention.
RECURRENT = {
    "mamba": (lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**SSM)), 2 * 6 * (64 * 8), 0),
    "mamba2": (lambda: transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**MAMBA2)), 2 * 5 * (64 * 8), 0),
    "jamba-experts": (lambda: hf("Jamba", **JAMBA), 1 * 6 * (64 * 8), 1),
    "gated-delta-net": (lambda: hf("Qwen3Next", **DELTA, **HALF), 1 * 7 * (4 * 8 * 16), 1),
    "lightning-attention": (lambda: hf("MiniMax", head_dim=8, **HALF, **EXPERTS), 1 * 5 * (4 * 8 * 8), 1),
    "rwkv4": (lambda: transformers.RwkvForCausalLM(transformers.RwkvConfig(**RWKV)), 2 * 9 * 32, 0),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_of_recurrent_models_pytorch_counts_the_weights_and_the_states_come_by_hand(name):
    make, states, attention_layers = RECURRENT[name]
    model = make().eval()
    weights = count(model, T)
    weights = weights["mm"] + weights.get("addmm", 0)  # what is multiplied in a scan is no weight: bmm
    convolutions = sum(2 * m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv1d))
    assert flops_per_token(model, T) == weights // T + convolutions + states + attention_layers * 4 * 32 * T


def test_training_is_three_forward_passes():
    model = llama()
    assert counted(model, T, backward=True) == 3 * T * flops_per_token(model, T)
    causal = sum(flops_per_token(model, context) for context in range(1, T + 1))
    assert training_flops(model, T) == 3 * causal


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")  # peft asks for it
def test_a_frozen_weight_has_no_gradient_to_compute():
    model = get_peft_model(tiny_llama(tied=False), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    model.get_input_embeddings().requires_grad_(True)  # else the first layer's input would need no gradient either
    frozen = sum(
        2 * m.weight.numel() for name, m in model.named_modules() if type(m) is nn.Linear and "lora" not in name
    )
    assert counted(model, T, backward=True) == 3 * T * flops_per_token(model, T) - T * frozen
    causal = sum(flops_per_token(model, context) for context in range(1, T + 1))
    assert training_flops(model, T) == 3 * causal - T * frozen


def test_a_sliding_window_caps_the_context():
    model = slm(pattern="swa/mlp*2", sliding_window=8)
    assert flops_per_token(model, context=1000) == flops_per_token(model, context=8)
    assert flops_per_token(model, 8) - flops_per_token(model, 7) == 2 * 4 * 32
    causal = sum(flops_per_token(model, context) for context in range(1, T + 1))
    assert training_flops(model, T) == 3 * causal


def test_only_the_sliding_layers_of_a_hybrid_have_a_window():
    model = hf("GptOss", head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"], **EXPERTS)
    assert flops_per_token(model, 1000) - flops_per_token(model, 8) == 4 * 32 * (1000 - 8)


def test_a_layer_that_tells_its_cost_is_believed_and_not_looked_into():
    model = slm(pattern="attn/mlp*2")
    plain, mixer = flops_per_token(model, 8), model.model.layers[0].token_mixer
    own = 2 * sum(p.numel() for p in mixer.parameters()) + 4 * 32 * 8
    mixer.flops_per_token = lambda context: 1000 * context
    assert flops_per_token(model, 8) == plain - own + 8000


class Kind(nn.Linear):
    """What exchanging a class leaves: sizes and parameters."""


@pytest.mark.parametrize("kind", ["fake-quantised", "exchanged", "bitsandbytes-4bit", "bitsandbytes-8bit", "meta"])
def test_low_bit_and_empty_layers_count_as_what_they_stand_for(kind):
    model = llama()
    plain = flops_per_token(model, 8)
    if kind == "fake-quantised":
        prepare_qat_(model, "int4_weight", group=16)
    elif kind == "meta":
        model.to("meta")
    for name, layer in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and "head" not in n]:
        if kind == "exchanged":
            layer.__class__ = Kind
        elif kind.startswith("bitsandbytes"):
            bnb = pytest.importorskip("bitsandbytes")
            make = bnb.nn.Linear4bit if "4" in kind else bnb.nn.Linear8bitLt
            model.set_submodule(name, make(layer.in_features, layer.out_features, bias=False))
    assert flops_per_token(model, 8) == plain


def test_a_sharded_model_costs_what_the_whole_one_does():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh, model = DeviceMesh("cpu", [0]), hf("Mixtral", **EXPERTS)
        plain = flops_per_token(model, 8)

        def shard(name, module, mesh):
            for key, p in list(module.named_parameters(recurse=False)):
                setattr(module, key, nn.Parameter(distribute_tensor(p.data, mesh, [Shard(0)])))

        distribute_module(model, mesh, shard)
        assert flops_per_token(model, 8) == plain
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_without_configuration_is_refused_with_a_way_out():
    with pytest.raises(ValueError, match=r"no config with a hidden_size[\s\S]*FlopCounterMode"):
        flops_per_token(Demo().model, 8)


def test_layers_whose_cost_is_not_known_are_refused():
    model = transformers.xLSTMForCausalLM(
        transformers.xLSTMConfig(vocab_size=64, hidden_size=32, num_heads=4, num_hidden_layers=1)
    )
    with pytest.raises(ValueError, match=r"xLSTMForCausalLM has .* no layer that mixes tokens in a way known here"):
        flops_per_token(model, 8)
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is no plain decoder"):
        flops_per_token(transformers.T5ForConditionalGeneration(config), 8)
    model = llama()
    model.config.layer_types = ["chunked_attention"] * 2
    with pytest.raises(ValueError, match="LlamaAttention has a layer of 'chunked_attention'"):
        flops_per_token(model, 8)
    model = llama()
    model.model.layers[0].mlp = Routed(top_k=None)
    with pytest.raises(ValueError, match="Routed has experts, but neither it nor its configuration says"):
        flops_per_token(model, 8)


class Routed(nn.Module):
    """Experts as a list, as most people write them."""

    def __init__(self, top_k):
        super().__init__()
        self.top_k, self.router = top_k, nn.Linear(32, 8)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32)) for _ in range(8))


def test_of_a_list_of_experts_those_count_that_a_token_goes_to():
    model = llama()
    plain = flops_per_token(model, 8)
    model.model.layers[0].mlp = Routed(top_k=3)
    assert flops_per_token(model, 8) == plain - 3 * 2 * 32 * 48 + 3 * 2 * 2 * 32 * 48 + 2 * 32 * 8


def test_watching_a_forward_pass_counts_it_and_changes_nothing():
    model = llama()
    ids = torch.randint(0, 64, (2, T))
    alone = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    watch = ForwardFlops([model, model.model])
    seen = torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters()))
    assert watch.flops == 2 * T * flops_per_token(model, T)  # forward only
    assert all(torch.equal(a, b) for a, b in zip(alone, seen))
    watch.remove()
    model(ids)
    assert watch.flops == 2 * T * flops_per_token(model, T)


def test_a_watched_pass_that_fails_leaves_no_counter_behind():
    model = llama()
    watch = ForwardFlops([model])
    with pytest.raises(IndexError):
        model(torch.full((1, 2), 64))
    seen = watch.flops
    torch.ones(2, 2) @ torch.ones(2, 2)
    assert watch.flops == seen
