"""Logits of our decoder against transformers, on tiny random models written by transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.io.hf_weights import load_decoder, save_weights
from flexjax.model_config import load_model_config
from flexjax.models.decoder import decoder_logits
from flexjax.models.weights import random_weights

TOLERANCE = 1e-4
LENGTH = 37

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5}

# family, options of the transformers configuration, storage ("single", "sharded"), key style
CASES = {
    "llama": ("Llama", {}, "single", "new"),
    "llama-old-keys": ("Llama", {}, "single", "old"),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}, "single", "new"),
    "llama-tied-sharded": ("Llama", {"tie_word_embeddings": True}, "sharded", "new"),
    "llama-bias": ("Llama", {"attention_bias": True}, "single", "new"),
    "llama-rope3": ("Llama", {"rope_parameters": LLAMA3_ROPE}, "single", "new"),
    "llama-rope3-old-keys": ("Llama", {"rope_parameters": LLAMA3_ROPE}, "sharded", "old"),
    "llama-rope-linear": ("Llama", {"rope_parameters": LINEAR_ROPE}, "single", "new"),
    "llama-rope-linear-old-keys": ("Llama", {"rope_parameters": LINEAR_ROPE}, "single", "old"),
    "llama-mha": ("Llama", {"num_key_value_heads": 6, "rms_norm_eps": 1e-3}, "single", "new"),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}, "sharded", "new"),
    "llama-head-dim": ("Llama", {"head_dim": 14, "intermediate_size": 51}, "single", "new"),
    "llama-one-layer": ("Llama", {"num_hidden_layers": 1, "vocab_size": 61}, "single", "new"),
    "qwen2": ("Qwen2", {}, "single", "new"),
    "qwen2-tied": ("Qwen2", {"tie_word_embeddings": True}, "sharded", "new"),
    "qwen2-old-keys": ("Qwen2", {"num_key_value_heads": 3}, "single", "old"),
    "qwen2-rope-linear": ("Qwen2", {"rope_parameters": LINEAR_ROPE}, "single", "new"),
    "qwen3": ("Qwen3", {"head_dim": 10}, "single", "new"),
    "qwen3-wide-heads": ("Qwen3", {"head_dim": 32}, "sharded", "new"),
    "qwen3-bias": ("Qwen3", {"head_dim": 16, "attention_bias": True}, "single", "new"),
    "qwen3-tied-old-keys": (
        "Qwen3",
        {"head_dim": 16, "tie_word_embeddings": True},
        "single",
        "old",
    ),
    "mistral": ("Mistral", {"sliding_window": None}, "single", "new"),
    "mistral-window": ("Mistral", {"sliding_window": 11}, "single", "new"),
    "mistral-window-one": ("Mistral", {"sliding_window": 1}, "sharded", "new"),
    "mistral-window-long": ("Mistral", {"sliding_window": 4096}, "single", "old"),
    "mistral-head-dim": ("Mistral", {"head_dim": 20, "sliding_window": 5}, "single", "new"),
}

_seen: dict[str, float] = {}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="the oracle (transformers) needs torch")


@pytest.fixture(scope="module", autouse=True)
def report_max_difference(request):
    yield
    if _seen:
        worst = max(_seen, key=_seen.__getitem__)
        capture = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print(f"\nmax |logit difference| over {len(_seen)}: {_seen[worst]:.3g} ({worst})")


def make_oracle(torch, family, options, seed):
    """A transformers model whose every parameter, norms and biases included, is random."""
    import transformers

    settings = {
        "vocab_size": 97,
        "hidden_size": 60,
        "intermediate_size": 44,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "head_dim": 10,
        "attn_implementation": "eager",
        **options,
    }
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_norm = "norm" in name
            parameter.copy_(1.0 + 0.3 * noise if is_norm else 0.15 * noise)
    return model


def to_old_keys(path):
    """Rewrites config.json as transformers 4 wrote it."""
    raw = json.loads(path.read_text())
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    raw["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    raw["torch_dtype"] = raw.pop("dtype")
    raw.pop("layer_types", None)
    if raw["head_dim"] == raw["hidden_size"] // raw["num_attention_heads"]:
        del raw["head_dim"]
    path.write_text(json.dumps(raw))


def oracle_logits(torch, model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.float().numpy()


def tokens_for(vocab_size, seed=0):
    return np.random.default_rng(seed).integers(0, vocab_size, (2, LENGTH))


def difference(name, ours, theirs):
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    assert np.abs(theirs).max() > 0.1  # the comparison is of something
    gap = float(np.abs(ours - theirs).max())
    _seen[name] = gap
    print(f"{name}: max {gap:.3g}, mean {np.abs(ours - theirs).mean():.3g}")
    return gap


@pytest.mark.parametrize("name", CASES)
def test_logits_match_transformers(torch, tmp_path, name):
    family, options, storage, style = CASES[name]
    model = make_oracle(torch, family, options, seed=len(name))
    size = "1GB" if storage == "single" else "30KB"
    model.save_pretrained(tmp_path, max_shard_size=size)
    is_sharded = (tmp_path / "model.safetensors.index.json").exists()
    assert is_sharded == (storage == "sharded")
    if style == "old":
        to_old_keys(tmp_path / "config.json")
    tokens = tokens_for(model.config.vocab_size)
    decoder = load_decoder(tmp_path)
    logits = decoder_logits(decoder.config, decoder.weights(), jnp.asarray(tokens))
    assert difference(name, logits, oracle_logits(torch, model, tokens)) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama-rope3", "llama-bias", "qwen2-tied", "qwen3", "mistral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_weights_load_in_transformers(torch, tmp_path, name, dtype):
    import transformers

    family, options, _, _ = CASES[name]
    model = make_oracle(torch, family, options, seed=1)
    model.save_pretrained(tmp_path / "theirs")
    config = load_model_config(tmp_path / "theirs")
    weights = random_weights(config, "float32", seed=3)
    weights = jax.tree.map(lambda x: jnp.where(x == 1.0, 1.1, x * 5.0 + 0.01), weights)
    save_weights(tmp_path / "ours", config, weights, dtype=dtype)
    auto = transformers.AutoModelForCausalLM
    loaded, info = auto.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert str(loaded.dtype) == f"torch.{dtype}"
    ours = load_decoder(tmp_path / "ours", "float32")
    tokens = tokens_for(config.vocab_size)
    logits = decoder_logits(ours.config, ours.weights(), jnp.asarray(tokens))
    theirs = oracle_logits(torch, loaded.float(), tokens)
    assert difference(f"saved-{name}-{dtype}", logits, theirs) <= TOLERANCE


def test_bfloat16_is_kept_bit_for_bit(torch, tmp_path):
    model = make_oracle(torch, "Qwen2", {}, seed=5).bfloat16()
    model.save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path)
    weights = decoder.weights()
    assert decoder.config.dtype == "bfloat16"
    assert {str(x.dtype) for x in jax.tree.leaves(weights)} == {"bfloat16"}
    for layer, theirs in enumerate(model.model.layers):
        ours = np.asarray(weights.layers["q_proj.kernel"][layer], np.float32)
        np.testing.assert_array_equal(ours, theirs.self_attn.q_proj.weight.T.float().detach())
        ours = np.asarray(weights.layers["k_proj.bias"][layer], np.float32)
        np.testing.assert_array_equal(ours, theirs.self_attn.k_proj.bias.float().detach())
