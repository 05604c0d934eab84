"""The heads over the backbone: masked tokens and classes, as Hugging Face has them."""

import pytest
import torch
import torch.nn.functional as F
from mixers import DECODERS, ENCODERS, V, close, config_of, tokens
from torch import nn
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from lightning_slm.models import ENCODERS as PRESETS
from lightning_slm.models import SLMConfig, SLMForCausalLM, SLMForMaskedLM, SLMForSequenceClassification, load_model
from lightning_slm.nn.targets import weight_matrices

# Shape letters: B = batch, T = tokens, V = vocabulary, K = classes.
K = 3
NAMES = {"id2label": {0: "bad", 1: "fair", 2: "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}


def masked_lm(**values):
    return SLMForMaskedLM(config_of(ENCODERS["attn"], causal=False, **values)).eval()


def classifier(causal=False, **values):
    return SLMForSequenceClassification(config_of(ENCODERS["attn"], causal=causal, **{**NAMES, **values})).eval()


def some_labels(ids_BT, keep=0.3):
    return ids_BT.masked_fill(torch.rand(ids_BT.shape) > keep, -100)


# Masked language model


@pytest.mark.parametrize("name", ENCODERS)
def test_around_every_mixer_it_learns_what_is_masked(name):
    model = SLMForMaskedLM(config_of(ENCODERS[name], causal=False, initializer_range=0.05)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    ids_BT = tokens(4, 24)
    labels_BT = some_labels(ids_BT)
    read_BT = ids_BT.masked_fill(labels_BT != -100, 0)
    losses = []
    for _ in range(60):
        loss = model(read_BT, labels=labels_BT).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_loss_is_the_cross_entropy_of_the_labelled_logits_and_in_training_only_those_are_made():
    model, ids_BT = masked_lm(), tokens(3)
    labels_BT = some_labels(ids_BT)
    out = model(ids_BT, labels=labels_BT)
    expected = F.cross_entropy(out.logits.flatten(0, 1), labels_BT.flatten())
    close(out.loss, expected, 1e-5)
    trained = model.train()(ids_BT, labels=labels_BT)
    assert trained.logits is None
    close(trained.loss, expected, 1e-5)
    assert model(ids_BT, labels=labels_BT, return_logits=True).logits.shape == (3, 13, V)
    halved = model(ids_BT, labels=labels_BT, num_items_in_batch=2 * (labels_BT != -100).sum()).loss
    close(halved, expected / 2, 1e-5)


def test_the_head_is_berts():
    """A dense layer, GELU, a norm, the embedding, a bias: Hugging Face's, given the same weights."""
    from transformers.models.bert.modeling_bert import BertConfig, BertLMPredictionHead

    model = masked_lm(norm="layer", rms_norm_eps=1e-12)
    theirs = BertLMPredictionHead(BertConfig(vocab_size=V, hidden_size=32))
    theirs.transform.dense.load_state_dict(model.head_dense.state_dict())
    theirs.transform.LayerNorm.load_state_dict(model.head_norm.state_dict())
    theirs.decoder.weight = model.model.embed_tokens.weight
    nn.init.normal_(model.lm_head.bias)
    theirs.decoder.bias = theirs.bias = model.lm_head.bias
    hidden = torch.randn(2, 5, 32)
    close(model.predict(hidden), theirs(hidden), 1e-5)


def test_decoder_and_embedding_are_one_and_stay_so_when_saved(tmp_path):
    model, ids_BT = masked_lm(), tokens()
    nn.init.normal_(model.lm_head.bias)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, SLMForMaskedLM)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(again(ids_BT).logits, model(ids_BT).logits)
    untied = masked_lm(tie_word_embeddings=False)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_neither_padding_nor_a_neighbour_changes_what_it_says():
    model, ids_BT = masked_lm(), tokens(2, 9)
    padded = torch.cat((ids_BT, torch.zeros(2, 4, dtype=torch.long)), 1)
    out = model(padded, attention_mask=(padded != 0).long()).logits
    close(out[:, :9], model(ids_BT).logits)


def test_a_decoder_is_refused_as_masked_and_an_encoder_as_causal():
    with pytest.raises(ValueError, match=r"causal=True makes a decoder.*causal=False"):
        SLMForMaskedLM(config_of(DECODERS["attn"]))
    with pytest.raises(ValueError, match="SLMForMaskedLM"):
        SLMForCausalLM(config_of(ENCODERS["attn"], causal=False))


# Classifier


@pytest.mark.parametrize("causal", [False, True], ids=["encoder", "decoder"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_answer(causal, side):
    model, ids_BT, pad = classifier(causal), tokens(2, 9), torch.zeros(2, 4, dtype=torch.long)
    padded = torch.cat((pad, ids_BT) if side == "left" else (ids_BT, pad), 1)
    mask = (padded != 0).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids_BT).logits
    close(model(padded, attention_mask=mask, position_ids=positions).logits, expected)
    told = classifier(causal, pad_token_id=0)  # then the ids alone tell what is padding
    told.load_state_dict(model.state_dict())
    close(told(padded, position_ids=positions).logits, expected)


def test_an_encoders_answer_is_of_the_mean_and_a_decoders_of_the_last_token():
    ids_BT, mask = tokens(2, 7), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    encoder, decoder = classifier(), classifier(causal=True)
    hidden = encoder.model(ids_BT, mask).last_hidden_state
    means = torch.stack((hidden[0].mean(0), hidden[1, :4].mean(0)))
    close(encoder(ids_BT, mask).logits, encoder.score(means), 1e-5)
    hidden = decoder.model(ids_BT, mask).last_hidden_state
    last = torch.stack((hidden[0, 6], hidden[1, 3]))
    close(decoder(ids_BT, mask).logits, decoder.score(last), 1e-5)


def test_a_decoders_answer_is_that_of_hugging_faces_own_pooling():
    from transformers import LlamaForSequenceClassification

    from lightning_slm.models.convert import to_llama

    values = {"pad_token_id": 0, **NAMES}
    ours = classifier(causal=True, **values)
    body = SLMForCausalLM(config_of(DECODERS["attn"], **values)).eval()
    body.model.load_state_dict(ours.model.state_dict())
    llama = to_llama(body)
    llama.config.id2label, llama.config.pad_token_id = NAMES["id2label"], 0
    theirs = LlamaForSequenceClassification(llama.config).eval()
    theirs.model.load_state_dict(llama.model.state_dict())
    theirs.score.load_state_dict(ours.score.state_dict())
    ids_BT = tokens(3)
    ids_BT[1, 8:] = 0
    labels = torch.tensor([0, 2, 1])
    expected = theirs(ids_BT, labels=labels)
    out = ours(ids_BT, labels=labels)
    close(out.logits, expected.logits)
    close(out.loss, expected.loss)


def test_the_loss_is_cross_entropy_and_of_one_class_the_squared_error():
    model, ids_BT = classifier(), tokens(3)
    out = model(ids_BT, labels=torch.tensor([0, 2, 1]))
    close(out.loss, F.cross_entropy(out.logits, torch.tensor([0, 2, 1])), 1e-6)
    number = SLMForSequenceClassification(config_of(ENCODERS["attn"], causal=False, num_labels=1)).eval()
    out = number(ids_BT, labels=torch.tensor([0.5, -1.0, 2.0]))
    close(out.loss, F.mse_loss(out.logits[:, 0], torch.tensor([0.5, -1.0, 2.0])), 1e-6)


def test_names_and_weights_come_back_from_a_folder(tmp_path):
    model, ids_BT = classifier(), tokens()
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert isinstance(again, SLMForSequenceClassification)
    assert again.config.id2label == NAMES["id2label"]
    assert torch.equal(again(ids_BT).logits, model(ids_BT).logits)


def test_the_heads_are_no_targets_of_compression():
    assert not [t.name for t in weight_matrices(classifier()) if "score" in t.name]
    targets = [t.name for t in weight_matrices(masked_lm())]
    assert "head_dense.weight" in targets
    assert not [name for name in targets if "lm_head" in name]


class AddsALoss(nn.Module):
    """A channel mixer that has a loss of its own, as routers do."""

    def forward(self, x_BTD, context, layer_idx):
        context.losses.append(x_BTD.new_tensor(0.25))
        return 0 * x_BTD


@pytest.mark.parametrize("make", [masked_lm, classifier], ids=["masked", "classifier"])
def test_what_mixers_add_to_the_loss_counts_in_training_only(make):
    model, ids_BT = make(), tokens(2)
    model.model.layers[1].channel_mixer = AddsALoss()
    labels = ids_BT if make is masked_lm else torch.tensor([0, 1])
    plain = model(ids_BT, labels=labels)
    assert plain.aux_loss == 0.25
    close(model.train()(ids_BT, labels=labels).loss, plain.loss + 0.25, 1e-6)


# Presets and loading


MILLIONS = {
    "encoder-5m": 5.07, "bert-base": 109.48, "distilbert": 66.36, "mobilebert": 24.84, "mobilebert-tiny": 17.33,
    "tinybert-4": 14.35, "tinybert-6": 66.96,
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_an_encoder_preset_has_its_published_number_of_parameters(name):
    preset = PRESETS[name]
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModel.from_config(preset.build_config()).parameters())
    assert count == preset.parameters
    assert abs(count / 1e6 - MILLIONS.get(name, count / 1e6)) <= 0.005
    assert "http" in preset.source or name.endswith("-5m")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("task", ["masked", "classification"])
def test_every_encoder_preset_has_both_heads(name, task):
    with torch.device("meta"):
        model = load_model(name, task, max_position_embeddings=64)
    assert model.get_output_embeddings() is not None or task == "classification"


def test_a_preset_of_the_wrong_kind_is_refused_and_near_names_are_of_the_right_one():
    with pytest.raises(ValueError, match="'distilbert' is an encoder, which predicts no next token"):
        load_model("distilbert", "causal")
    with pytest.raises(ValueError, match="causal=True makes a decoder"):
        load_model("slm-5m", "masked", vocab_size=64)
    with pytest.raises(ValueError, match=r"'distilbrt' is neither .* Near names: 'distilbert'"):
        load_model("distilbrt", "masked")
    assert load_model("slm-5m", "classification", vocab_size=64, pattern="attn/mlp").config.causal


def test_a_head_for_other_classes_is_not_thrown_away_silently(tmp_path):
    classifier().save_pretrained(tmp_path)
    assert load_model(tmp_path, "classification").config.id2label == NAMES["id2label"]
    renamed = load_model(tmp_path, "classification", id2label={0: "a", 1: "b", 2: "c"})
    assert renamed.config.id2label[2] == "c"
    with pytest.raises(ValueError, match=r"head for 3 classes \['bad', 'fair', 'good'\], not for 2.*init_weights_from"):
        load_model(tmp_path, "classification", id2label={0: "a", 1: "b"})
    with pytest.raises(ValueError, match="cannot be changed"):
        load_model(tmp_path, "classification", hidden_size=64)


def test_a_folder_of_a_language_model_gets_a_new_head(tmp_path):
    model = masked_lm()
    model.save_pretrained(tmp_path)
    made = load_model(tmp_path, "classification", **NAMES)
    assert made.config.id2label == NAMES["id2label"]
    assert torch.equal(made.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_a_configuration_of_ours_says_how_many_classes():
    assert (
        load_model(SLMConfig(vocab_size=8, pattern="attn/mlp", num_labels=5), "classification").score.out_features == 5
    )
