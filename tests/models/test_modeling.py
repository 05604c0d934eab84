"""The backbone inside Hugging Face's shell: every way to run it gives the same logits."""

# Shape letters: B = batch, T = tokens.

import copy

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from lightning_slm.models import SLMCache, SLMConfig, SLMForCausalLM

B, T, V = 2, 13, 61
PATTERNS = {
    "attention": {"pattern": "attn/mlp*3"},
    "window": {"pattern": "(swa/mlp attn/mlp)*2", "sliding_window": 4},
    "only windows": {"pattern": "swa/mlp*2", "sliding_window": 4},
    "one mlp": {"pattern": "attn/mlp@shared*3"},
    "one block": {"pattern": "attn@a/mlp@b swa@c/mlp@b attn@a/-", "sliding_window": 4},
    "repeated": {"pattern": "attn/mlp*2", "repeat": 2},
    "untied": {"pattern": "attn/mlp*2", "tie_word_embeddings": False},
}


def build(name="attention", **values):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    # Large weights: with the usual small ones, early tokens hardly matter and a wrong mask would not show.
    config = SLMConfig(
        vocab_size=V, max_position_embeddings=64, initializer_range=0.3, **sizes, **PATTERNS[name], **values
    )
    return SLMForCausalLM(config).eval()


def tokens(batch=B, length=T):
    return torch.randint(1, V, (batch, length))


def close(a, b, tolerance=1e-4):
    """Logits here are of size 10, so this is near float32's own rounding."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=PATTERNS)
def model(request):
    with torch.no_grad():
        yield build(request.param)


def test_no_token_sees_a_later_one(model):
    ids_BT = tokens()
    changed_BT = ids_BT.clone()
    changed_BT[:, -4:] = (changed_BT[:, -4:] + 7) % V
    before, after = model(ids_BT).logits, model(changed_BT).logits
    assert torch.equal(before[:, :-4], after[:, :-4])
    assert not torch.allclose(before[:, -4:], after[:, -4:], atol=1e-2)


def test_reading_in_pieces_with_a_cache_equals_reading_at_once(model):
    ids_BT = tokens()
    whole = model(ids_BT).logits
    for pieces in ([T - 1, 1], [5, 8], [1] * T):
        cache, logits = SLMCache(model.config), []
        for part in ids_BT.split(pieces, 1):
            logits.append(model(part, past_key_values=cache).logits)
        close(torch.cat(logits, 1), whole)
    assert len(cache.layers) == model.config.num_hidden_layers


def test_generation_is_the_same_with_and_without_cache_and_with_a_static_one(model):
    ids_BT = tokens()

    def generate(**how):
        return model.generate(ids_BT, max_new_tokens=8, do_sample=False, pad_token_id=0, **how)

    without = generate(use_cache=False)
    assert torch.equal(generate(), without)
    assert torch.equal(generate(cache_implementation="static", disable_compile=True), without)
    assert torch.equal(generate(num_beams=3), generate(num_beams=3, use_cache=False))
    assert without.shape == (B, T + 8)


def test_left_padding_changes_nothing(model):
    ids_BT = tokens()
    padded = torch.cat((torch.zeros(B, 3, dtype=torch.long), ids_BT), 1)
    mask = (torch.arange(T + 3) >= 3).long().expand(B, -1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    close(model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:], model(ids_BT).logits)
    plain = model.generate(ids_BT, max_new_tokens=8, do_sample=False, pad_token_id=0)
    long = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(long[:, 3:], plain)


def test_right_padding_changes_nothing_before_it(model):
    ids_BT = tokens()
    padded = torch.cat((ids_BT, torch.zeros(B, 3, dtype=torch.long)), 1)
    mask = (torch.arange(T + 3) < T).long().expand(B, -1)
    close(model(padded, attention_mask=mask).logits[:, :T], model(ids_BT).logits)


def test_a_sequence_does_not_know_its_batch(model):
    ids_BT = tokens(4)
    close(model(ids_BT[2:3]).logits, model(ids_BT).logits[2:3])


@pytest.mark.parametrize("training", [False, True])
def test_packed_documents_equal_separate_ones(model, training):
    model.train(training)
    lengths = (5, 1, 7)
    ids_1T = tokens(1)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(ids_1T, position_ids=positions).logits
    separate = [model(part).logits for part in ids_1T.split(lengths, 1)]
    close(packed, torch.cat(separate, 1))
    assert not torch.allclose(packed, model(ids_1T).logits, atol=1e-2)


def test_saved_and_loaded_it_is_bit_identical(model, tmp_path):
    ids_BT = tokens()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is SLMForCausalLM
    assert torch.equal(again(ids_BT).logits, model(ids_BT).logits)
    assert again.config.layer_types == model.config.layer_types
    backbone = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(backbone(ids_BT).last_hidden_state, model.model(ids_BT).last_hidden_state)


def test_a_shared_mixer_is_one_object_and_is_stored_once():
    model = build("one mlp")
    assert list(model.model.shared) == ["mlp@shared"]
    assert all(block.channel_mixer is None for block in model.model.layers)
    assert sum("down_proj" in name for name in model.state_dict()) == 1
    assert len(list(model.parameters())) == len({p.data_ptr() for p in model.parameters()})
    assert copy.deepcopy(model).model.shared["mlp@shared"] is not model.model.shared["mlp@shared"]


def test_a_replaced_shared_mixer_is_used_by_every_block():
    model, ids_BT = build("one mlp"), tokens()
    model.model.shared["mlp@shared"].down_proj = torch.nn.Linear(48, 32, bias=False).requires_grad_(False)
    model.model.shared["mlp@shared"].down_proj.weight.zero_()
    calls = []
    model.model.shared["mlp@shared"].register_forward_hook(lambda *_: calls.append(1))
    model(ids_BT)
    assert len(calls) == 3


def test_repeating_equals_a_deeper_model_with_copied_weights():
    repeated, ids_BT = build("repeated"), tokens()
    config = {**repeated.config.to_diff_dict(), "pattern": "attn/mlp*4", "repeat": 1}
    deep = SLMForCausalLM(SLMConfig(**{k: v for k, v in config.items() if k != "model_type"})).eval()
    state = repeated.state_dict()
    for i in (3, 2, 1, 0):
        state |= {
            k.replace(f"layers.{i // 2}.", f"layers.{i}."): v
            for k, v in repeated.state_dict().items()
            if f".{i // 2}." in k
        }
    deep.load_state_dict(state)
    assert torch.equal(deep(ids_BT).logits, repeated(ids_BT).logits)


def test_gradients_of_shared_weights_are_summed_over_their_uses():
    model, ids_BT = build("repeated").train(), tokens()
    once, twice = build("repeated").train(), torch.cat((ids_BT, ids_BT))
    once.load_state_dict(model.state_dict())
    model(ids_BT, labels=ids_BT).loss.backward()
    once(twice, labels=twice).loss.backward()
    for a, b in zip(model.parameters(), once.parameters()):
        close(a.grad, b.grad, 1e-5)


def test_the_loss_is_the_mean_cross_entropy_of_the_next_tokens():
    model, ids_BT = build(), tokens()
    labels = ids_BT.clone()
    labels[:, :4] = -100
    out = model(ids_BT, labels=labels)
    logits = out.logits[:, :-1].flatten(0, 1)
    close(out.loss, torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten()), 1e-5)
    close(model(ids_BT, labels=labels, num_items_in_batch=10).loss * 10, out.loss * B * (T - 4), 1e-5)


def test_training_with_labels_makes_no_logits_unless_asked():
    model, ids_BT = build().train(), tokens()
    assert model(ids_BT, labels=ids_BT).logits is None
    assert model(ids_BT, labels=ids_BT, return_logits=True).logits.shape == (B, T, V)
    assert model(ids_BT).logits.shape == (B, T, V)
    assert model(ids_BT, logits_to_keep=2).logits.shape == (B, 2, V)
    assert torch.equal(model(ids_BT, logits_to_keep=torch.tensor([3, 5])).logits, model(ids_BT).logits[:, [3, 5]])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_gradient_checkpointing_changes_no_gradient():
    model, ids_BT = build("window").train(), tokens()
    model(ids_BT, labels=ids_BT).loss.backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids_BT, labels=ids_BT).loss.backward()
    for a, p in zip(plain, model.parameters()):
        close(a, p.grad, 1e-6)


def test_too_long_a_sequence_is_refused_also_through_the_cache():
    model = build()
    with pytest.raises(ValueError, match="65 tokens are more than max_position_embeddings=64"):
        model(tokens(1, 65))
    cache = SLMCache(model.config)
    model(tokens(1, 60), past_key_values=cache)
    with pytest.raises(ValueError, match="65 tokens"):
        model(tokens(1, 5), past_key_values=cache)


def test_ids_or_embeddings_are_needed_and_embeddings_do():
    model, ids_BT = build(), tokens()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(ids_BT)).logits, model(ids_BT).logits)


def test_built_on_the_meta_device_and_loaded_it_works(tmp_path):
    model, ids_BT = build("window"), tokens()
    with torch.device("meta"):
        empty = SLMForCausalLM(model.config).eval()
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(empty(ids_BT).logits, model(ids_BT).logits)


def test_new_weights_have_the_configured_spread():
    model = build("one mlp")
    assert abs(model.model.shared["mlp@shared"].gate_up_proj.weight.std() - 0.3) < 0.03
    assert torch.equal(model.model.norm.weight, torch.ones(32))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_a_low_rank_adapter_trains_and_merges():
    from peft import LoraConfig, get_peft_model

    model, ids_BT = build(), tokens()
    before = model(ids_BT).logits
    lora = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["qkv_proj", "down_proj"]))
    assert torch.equal(lora.eval()(ids_BT).logits, before)
    lora.train()(input_ids=ids_BT, labels=ids_BT).loss.backward()
    trained = {name for name, p in lora.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * 2 * 3
    assert all("lora_" in name for name in trained)
    assert type(lora.merge_and_unload()) is SLMForCausalLM


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo asks for it
def test_compiled_blocks_give_the_same_loss_and_gradients():
    model, ids_BT = build("window").train(), tokens()
    model(ids_BT, labels=ids_BT).loss.backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for block in model.model.layers:
        block.compile(backend="aot_eager")
    model(ids_BT, labels=ids_BT).loss.backward()
    for a, p in zip(plain, model.parameters()):
        close(a, p.grad, 1e-5)
