"""What every mixer of a decoder promises: nothing sees the future, and every way to read a text gives the same."""

# Shape letters: B = batch, T = tokens, V = vocabulary.

import copy
import shutil

import pytest
import torch
from mixers import CHANNELS, DECODERS, META, SIZES, V, close, decoder, tokens
from transformers import AutoModelForCausalLM

from lightning_slm.models import SLMCache, SLMConfig, SLMForCausalLM
from lightning_slm.models.decode import generate_stream, make_decoder
from lightning_slm.models.registry import CHANNEL_MIXERS, TOKEN_MIXERS

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # inductor's import
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # dynamo asks for it
]

B, T = 2, 13
EVERY = {**DECODERS, **META, **{f"-/{name}": tiny for name, tiny in CHANNELS.items()}}


@pytest.fixture(params=EVERY)
def tiny(request):
    return EVERY[request.param]


@pytest.fixture
def model(tiny):
    with torch.no_grad():
        yield decoder(tiny)


def gradients(model, ids_BT, **how):
    model.zero_grad()
    loss = model(ids_BT, labels=ids_BT, **how).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_every_mixer_of_the_registry_is_tried_here():
    assert set(DECODERS) == {name for name, mixer in TOKEN_MIXERS.items() if mixer.causal}
    assert set(CHANNELS) == set(CHANNEL_MIXERS)


@pytest.mark.parametrize("name", [name for name, mixer in TOKEN_MIXERS.items() if not mixer.causal])
def test_a_mixer_that_sees_the_future_is_refused_with_the_reason(name):
    with pytest.raises(ValueError, match=rf"{name}' cannot stand in a decoder.*: {TOKEN_MIXERS[name].refusal}"):
        SLMConfig(pattern=f"{name}/mlp")


@pytest.mark.parametrize("length", [13, 40])
def test_no_token_sees_a_later_one(model, length):
    ids_BT = tokens(B, length)
    changed_BT = ids_BT.clone()
    changed_BT[:, -4:] = (changed_BT[:, -4:] + 7) % V
    before, after = model(ids_BT).logits, model(changed_BT).logits
    close(before[:, :-4], after[:, :-4], 1e-5)
    assert not torch.allclose(before[:, -4:], after[:, -4:], atol=1e-2)


def test_early_tokens_matter_within_their_reach(model):
    ids_BT = tokens()
    changed_BT = ids_BT.clone()
    changed_BT[:, -3] = (changed_BT[:, -3] + 7) % V
    assert not torch.allclose(model(ids_BT).logits[:, -1], model(changed_BT).logits[:, -1], atol=1e-3)


@pytest.mark.parametrize("length", [1, 2, 13, 40])
def test_reading_in_pieces_with_a_cache_equals_reading_at_once(model, length):
    ids_BT = tokens(B, length)
    whole = model(ids_BT).logits
    for pieces in ([length - 1, 1], [length // 3, length - length // 3], [1] * length):
        cache, logits = SLMCache(model.config), []
        for part in ids_BT.split([n for n in pieces if n], 1):
            logits.append(model(part, past_key_values=cache).logits)
        close(torch.cat(logits, 1), whole)
    assert cache.get_seq_length() == length


def test_one_row_and_many_rows_are_the_same(model):
    ids_BT = tokens(4)
    close(model(ids_BT[2:3]).logits, model(ids_BT).logits[2:3])


def test_generation_is_the_same_with_and_without_cache_and_with_beams(model):
    ids_BT = tokens()

    def generate(**how):
        return model.generate(ids_BT, max_new_tokens=8, do_sample=False, pad_token_id=0, **how)

    without = generate(use_cache=False)
    assert torch.equal(generate(), without)
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


def test_rows_padded_to_different_lengths_generate_what_each_does_alone(model):
    ids_BT = tokens(2, 9)
    padded, mask = ids_BT.clone(), torch.ones_like(ids_BT)
    padded[1, :4], mask[1, :4] = 0, 0
    together = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    for row, prompt in ((0, ids_BT[:1]), (1, ids_BT[1:, 4:])):
        alone = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
        assert torch.equal(together[row, 9:], alone[0, prompt.shape[1] :])


def test_right_padding_changes_nothing_before_it(model):
    ids_BT = tokens()
    padded = torch.cat((ids_BT, torch.zeros(B, 3, dtype=torch.long)), 1)
    mask = (torch.arange(T + 3) < T).long().expand(B, -1)
    close(model(padded, attention_mask=mask).logits[:, :T], model(ids_BT).logits)


@pytest.mark.parametrize("lengths", [(5, 1, 7), (3, 20, 9)], ids=str)
def test_packed_documents_equal_separate_ones(tiny, model, lengths):
    ids_1T = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    if not tiny.packs:
        with pytest.raises(ValueError, match="document_mask=False"):
            model(ids_1T, position_ids=positions)
        return
    packed = model(ids_1T, position_ids=positions).logits
    close(packed, torch.cat([model(part).logits for part in ids_1T.split(lengths, 1)], 1))
    assert not torch.allclose(packed, model(ids_1T).logits, atol=1e-2)


def test_gradients_of_packed_documents_are_those_of_separate_ones(tiny):
    if not tiny.packs:
        pytest.skip("refuses packed documents; tested above")
    model, lengths = decoder(tiny), (5, 8)
    ids_1T = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    weight = torch.randn(1, sum(lengths), V)
    model(ids_1T, position_ids=positions).logits.mul(weight).sum().backward()
    packed = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    torch.cat([model(part).logits for part in ids_1T.split(lengths, 1)], 1).mul(weight).sum().backward()
    separate = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip(packed, separate, strict=True):
        close(a, b, 1e-3)


def test_a_text_in_double_precision_gives_the_same_in_float32(model):
    ids_BT = tokens()
    close(copy.deepcopy(model).double()(ids_BT).logits.float(), model(ids_BT).logits, 1e-3)


def test_training_in_bfloat16_stays_near_float32(tiny):
    model, ids_BT = decoder(tiny, initializer_range=0.05).train(), tokens(2, 40)
    loss, exact = gradients(model, ids_BT)
    with torch.autocast("cpu", torch.bfloat16):
        rounded_loss, rounded = gradients(model, ids_BT)
    assert abs(rounded_loss - loss) < 0.02 * loss
    a, b = (torch.cat([g.flatten() for g in grads]) for grads in (exact, rounded))
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.99


def test_every_parameter_learns(tiny):
    model = decoder(tiny, initializer_range=0.05).train()
    gradients(model, tokens(2, 40))
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


def test_activation_checkpointing_changes_no_gradient(tiny):
    model, ids_BT = decoder(tiny, initializer_range=0.05).train(), tokens()
    _, plain = gradients(model, ids_BT)
    model.gradient_checkpointing_enable()
    _, again = gradients(model, ids_BT)
    for a, b in zip(plain, again, strict=True):
        close(a, b, 1e-6)


def test_compiled_blocks_give_the_same_loss_and_gradients(tiny):
    model, ids_BT = decoder(tiny, initializer_range=0.05).train(), tokens()
    loss, plain = gradients(model, ids_BT)
    for block in model.model.layers:
        block.compile(backend="aot_eager")
    compiled_loss, compiled = gradients(model, ids_BT)
    close(compiled_loss, loss)
    for a, b in zip(plain, compiled, strict=True):
        close(a, b, 1e-4)


def test_saved_and_loaded_it_is_bit_identical(model, tmp_path):
    ids_BT = tokens()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids_BT).logits, model(ids_BT).logits)
    assert again.config.mixers == model.config.mixers


def test_built_on_the_meta_device_and_loaded_it_works(model):
    ids_BT = tokens()
    with torch.device("meta"):
        empty = type(model)(model.config).eval()
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert torch.equal(empty(ids_BT).logits, model(ids_BT).logits)


@pytest.mark.parametrize("prompt", [1, 7])
def test_the_static_decoder_writes_what_generate_writes(model, prompt):
    ids_1T = tokens(1, prompt)
    expected = model.generate(ids_1T, max_new_tokens=20, do_sample=False, pad_token_id=0)[0, prompt:].tolist()
    assert list(generate_stream(model, ids_1T, 20)) == expected


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler for torch.compile")
def test_the_compiled_static_decoder_writes_the_same(model):
    ids_1T = tokens(1, 7)
    assert list(generate_stream(model, ids_1T, 12, compile=True)) == list(generate_stream(model, ids_1T, 12))


def test_where_it_is_promised_the_cache_stops_growing(tiny, model):
    sizes = []
    for length in (30, 60):
        cache = SLMCache(model.config)
        model(tokens(1, length), past_key_values=cache)
        model(tokens(1, 1), past_key_values=cache)
        sizes.append(cache.nbytes())
    assert (sizes[0] == sizes[1]) == tiny.flat_state


def test_states_follow_their_rows_in_batch_operations(model):
    ids_BT = tokens(2, 9)
    cache = SLMCache(model.config)
    model(ids_BT, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    cache.reorder_cache(torch.tensor([1, 1]))
    following = tokens(1, 3).expand(2, -1)
    whole = model(torch.cat((ids_BT[:1].expand(2, -1), following), 1)).logits[:, 9:]
    close(model(following, past_key_values=cache).logits, whole)


def test_a_step_of_the_static_decoder_is_the_whole_forward_pass(model):
    ids_BT = tokens(3, 11)
    read = make_decoder(model, 3, 11)
    logits = [read(ids_BT[:, :6])] + [read(ids_BT[:, i : i + 1]) for i in range(6, 11)]
    close(torch.stack(logits, 1), model(ids_BT).logits[:, 5:])


def test_sizes_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match="num_attention_heads=4"):
        SLMConfig(**{**SIZES, "hidden_size": 34}, pattern="attn/mlp")


@pytest.mark.parametrize("pattern", ["mamba/mlp", "attn/rwkv4_ffn"])
def test_a_cache_that_holds_keys_only_is_refused_where_there_are_states(pattern):
    model = SLMForCausalLM(SLMConfig(vocab_size=V, **SIZES, pattern=pattern)).eval()
    with pytest.raises(ValueError, match="keeps states, too"):
        model.generate(tokens(1, 4), max_new_tokens=2, cache_implementation="static")
