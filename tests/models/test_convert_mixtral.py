"""What only Mixtral does. (What all architectures do: test_convert_from_hf.py.)"""

# Shape letters: B = batch, T = tokens.

import pytest
import torch
from hf_models import hf_model
from mixers import tokens

from lightning_slm.models import SLMForCausalLM


def test_the_configuration_tells_of_the_experts():
    options = SLMForCausalLM.from_hf(hf_model("mixtral")).config.mixers["moe"]
    assert options["experts"] == 3
    assert options["normalize_topk"]


@pytest.mark.parametrize("padded", [False, True])
def test_the_balance_loss_of_one_layer_is_mixtrals(padded):
    theirs = hf_model("mixtral", num_hidden_layers=1, output_router_logits=True, router_aux_loss_coef=0.5).train()
    ours, ids_BT = SLMForCausalLM.from_hf(theirs), tokens()
    mask = torch.ones_like(ids_BT)
    if padded:
        mask[1, 9:] = 0
    out = theirs(ids_BT, attention_mask=mask, labels=ids_BT)
    our_loss = ours(ids_BT, attention_mask=mask, labels=ids_BT).loss
    torch.testing.assert_close(our_loss, out.loss, rtol=1e-5, atol=1e-5)
    our_loss.backward()
    out.loss.backward()
    router = ours.model.layers[0].channel_mixer.router.weight.grad
    torch.testing.assert_close(router, theirs.model.layers[0].mlp.gate.weight.grad, rtol=1e-4, atol=1e-6)
