"""What a pattern says, and what is said about a wrong one."""

import pytest

from lightning_slm.models import SLMConfig
from lightning_slm.models.pattern import MixerSpec, parse_pattern


def written(pattern):
    return " ".join(
        "/".join(
            "-" if m is None else m.name + (f"@{m.label}" if m.label else "") for m in (block.token, block.channel)
        )
        for block in parse_pattern(pattern)
    )


@pytest.mark.parametrize(
    ("pattern", "blocks"),
    [
        ("attn/mlp", "attn/mlp"),
        ("attn/mlp*3", "attn/mlp attn/mlp attn/mlp"),
        ("attn/mlp * 2  swa/-", "attn/mlp attn/mlp swa/-"),
        ("(attn/mlp swa/mlp)*2", "attn/mlp swa/mlp attn/mlp swa/mlp"),
        ("((swa/mlp)*2 attn/mlp)*2", "swa/mlp swa/mlp attn/mlp swa/mlp swa/mlp attn/mlp"),
        (["attn/mlp", "(swa/mlp)*2"], "attn/mlp swa/mlp swa/mlp"),
        ("attn/mlp@shared*2", "attn/mlp@shared attn/mlp@shared"),
        ("attn@a/mlp attn@b/mlp", "attn@a/mlp attn@b/mlp"),
    ],
)
def test_a_pattern_expands_to_its_blocks(pattern, blocks):
    assert written(pattern) == blocks


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("attm/mlp*4", r"no token mixer is called 'attm'.*Near names: 'attn'"),
        ("attn/mpl", r"no channel mixer is called 'mpl'.*'mlp'"),
        ("attn", r"'attn' is no block.*attn/-"),
        ("attn/mlp/mlp", "is no block"),
        ("attn/mlp*0", r"'\*0' must be at least 1"),
        ("*2", "must be at least 1 and follow a block"),
        ("attn/mlp*2*2", "must be at least 1 and follow a block"),
        ("(attn/mlp", r"'\(' without '\)'"),
        ("attn/mlp)", r"'\)' without '\('"),
        ("attn/mlp, attn/mlp", "cannot read ', attn/mlp'"),
        ("attn/mlp@", "'mlp@' is no mixer"),
        ("-/-", "does nothing"),
        ("", "holds no block"),
        ([], "holds no block"),
    ],
)
def test_a_wrong_pattern_is_refused_with_what_to_write(pattern, message):
    with pytest.raises(ValueError, match=message):
        parse_pattern(pattern)


def test_the_same_label_is_the_same_spec():
    first, last = parse_pattern("attn/mlp@x swa/mlp@x")
    assert first.channel == last.channel == MixerSpec("mlp", "x")


def test_every_run_of_a_block_has_a_layer_of_its_kind():
    config = SLMConfig(pattern="attn/mlp swa/mlp", repeat=2, sliding_window=4)
    assert config.num_hidden_layers == 4
    assert config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 100, "num_attention_heads": 3}, "hidden_size=100 must be a multiple of num_attention_heads=3"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "must be a multiple of num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"repeat": 0}, "repeat=0"),
        ({"num_hidden_layers": 9}, r"makes 4 layers; leave num_hidden_layers out"),
        ({"sliding_window": 4}, "contradict each other"),
        ({"pattern": "swa/mlp"}, "contradict each other"),
        ({"pattern": "-/mlp"}, "needs a token mixer"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SLMConfig(**values)


def test_a_mixer_that_sees_the_future_is_refused(monkeypatch):
    from lightning_slm.models import registry
    from lightning_slm.nn.mixer import Mixer

    class Bidirectional(Mixer):
        causal, refusal = False, "it looks at everything"

    monkeypatch.setitem(registry.TOKEN_MIXERS, "bidi", Bidirectional)
    with pytest.raises(ValueError, match=r"'bidi' cannot stand in a decoder .*: it looks at everything"):
        SLMConfig(pattern="bidi/mlp")


def test_options_of_mixers_are_checked(monkeypatch):
    from lightning_slm.models import registry
    from lightning_slm.nn.mixer import Mixer

    class Sized(Mixer):
        @classmethod
        def from_config(cls, config, *, size=3):
            return cls()

    monkeypatch.setitem(registry.TOKEN_MIXERS, "sized", Sized)
    assert SLMConfig(pattern="sized/mlp", mixers={"sized": {"size": 4}}).options("sized") == {"size": 4}
    with pytest.raises(ValueError, match=r"'sized' has no option 'sizes'. Near names: 'size'"):
        SLMConfig(pattern="sized/mlp", mixers={"sized": {"sizes": 4}})
    with pytest.raises(ValueError, match="'sized' is not in pattern 'attn/mlp'"):
        SLMConfig(pattern="attn/mlp", mixers={"sized": {"size": 4}})
