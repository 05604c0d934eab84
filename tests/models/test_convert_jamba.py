"""What only Jamba does. (What all architectures do: test_convert_from_hf.py.)"""

# Shape letters: B = batch, T = tokens.

import torch
from hf_models import hf_model
from mixers import tokens

from lightning_slm.models import SLMForCausalLM


def test_the_balance_loss_of_one_layer_is_jambas():
    theirs = hf_model("jamba", num_hidden_layers=3, output_router_logits=True, router_aux_loss_coef=0.5).train()
    ours, ids_BT = SLMForCausalLM.from_hf(theirs), tokens()
    our_loss, their_loss = ours(ids_BT, labels=ids_BT).loss, theirs(ids_BT, labels=ids_BT).loss
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=1e-5)
