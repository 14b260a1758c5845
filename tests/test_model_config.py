import json

import pytest

from flexjax.builtin_models import BUILTIN_MODELS, builtin_model_config
from flexjax.errors import ModelNotFoundError, UnsupportedModelError
from flexjax.model_config import (
    ModelConfig,
    RopeConfig,
    config_from_hf,
    load_model_config,
)

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "torch_dtype": "bfloat16",
}


def make(family="Llama", **changes):
    raw = {**LLAMA, "architectures": [f"{family}ForCausalLM"], **changes}
    return {name: value for name, value in raw.items() if value != "absent"}


def test_old_and_new_key_styles_agree():
    scaling = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 64
    old = make(rope_scaling={"type": "llama3", **scaling})
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, **scaling}
    new = make(rope_theta="absent", rope_parameters=rope, torch_dtype="absent", dtype="bfloat16")
    assert config_from_hf(old) == config_from_hf(new)
    assert config_from_hf(old).rope == RopeConfig(10000.0, "llama3", 4.0, 1.0, 4.0, 64)


def test_fields():
    config = config_from_hf(make())
    assert (config.head_dim, config.num_kv_heads, config.max_position) == (16, 2, 256)
    assert config.dtype == "bfloat16" and config.eos_token_ids == (2,) and config.bos_token_id == 1
    assert not config.qkv_bias and not config.o_bias and not config.qk_norm
    assert hash(config) == hash(config_from_hf(make()))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (make("Qwen2"), {"qkv_bias": True, "o_bias": False}),
        (make("Qwen3"), {"head_dim": 128, "qk_norm": True, "qkv_bias": False}),
        (make("Qwen3", attention_bias=True), {"qkv_bias": True, "o_bias": True}),
        (make("Llama", attention_bias=True), {"qkv_bias": True, "o_bias": True}),
        (make("Mistral", sliding_window=None), {"sliding_window": None}),
        (make("Mistral", sliding_window=9), {"sliding_window": 9}),
        (make("Mistral"), {"sliding_window": 4096}),
        (make(num_key_value_heads="absent"), {"num_kv_heads": 4}),
        (make(num_key_value_heads=None), {"num_kv_heads": 4}),
        (make(head_dim=10), {"head_dim": 10}),
        (make(eos_token_id=[1, 2]), {"eos_token_ids": (1, 2)}),
        (make(eos_token_id=None), {"eos_token_ids": ()}),
        (make(torch_dtype="absent"), {"dtype": "float32"}),
        (make(tie_word_embeddings=True), {"tie_embeddings": True}),
    ],
)
def test_families(raw, expected):
    config = config_from_hf(raw)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (make("Gemma"), "`architectures` must name one of .*GemmaForCausalLM"),
        (make(hidden_act="gelu"), "`hidden_act` must be 'silu'; got 'gelu'"),
        (make(mlp_bias=True), "`mlp_bias`"),
        (make(quantization_config={"bits": 4}), "`quantization_config`"),
        (make("Mistral", attention_bias=True), "`attention_bias`"),
        (make("Qwen2", use_sliding_window=True), "`use_sliding_window`"),
        (make("Qwen3", layer_types=["sliding_attention"]), "`use_sliding_window`"),
        (make(rope_scaling={"type": "yarn", "factor": 2.0}), "`rope_type` .* got 'yarn'"),
        (make(partial_rotary_factor=0.5), "`partial_rotary_factor` must be 1.0"),
        (make(torch_dtype="int8"), "`dtype` must be one of .* got 'int8'"),
    ],
)
def test_unsupported_is_refused_by_name(raw, match):
    with pytest.raises(UnsupportedModelError, match=match):
        config_from_hf(raw)


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (make(vocab_size="absent"), "must have `vocab_size`"),
        (make(rope_theta="absent"), "must have `rope_theta`"),
        (make(rope_scaling={"type": "linear"}), "of type linear must have factor"),
        (make(hidden_size="64"), "`hidden_size` must be a positive integer; got '64'"),
        (make(num_attention_heads=0), "`num_attention_heads` must be a positive integer; got 0"),
        (make(num_key_value_heads=0), "`num_key_value_heads` must be a positive integer; got 0"),
        (make("Qwen2", num_key_value_heads="absent"), "must have `num_key_value_heads`"),
        (make(num_key_value_heads=3), "`num_kv_heads` must divide `num_heads`=4; got 3"),
        (make(hidden_size=66), "`hidden_size` must be a multiple of"),
        (make(head_dim=7), "`head_dim` must be even; got 7"),
        (make(vocab_size=-1), "`vocab_size` must be a positive integer; got -1"),
        (make("Mistral", sliding_window=0), "`sliding_window` must be positive; got 0"),
    ],
)
def test_wrong_values_are_refused_by_name(raw, match):
    with pytest.raises(ValueError, match=match):
        config_from_hf(raw)


def test_model_directories(tmp_path):
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        load_model_config(tmp_path / "absent")
    with pytest.raises(ModelNotFoundError, match="no config.json"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not valid JSON"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object; got list"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(make()))
    assert load_model_config(tmp_path) == config_from_hf(make())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert load_model_config(str(tmp_path)).eos_token_ids == (7, 8)


def test_builtin_models():
    sizes = {name: builtin_model_config(name).num_params for name in BUILTIN_MODELS}
    assert sizes["llama-3.1-8b"] == 8_030_261_248
    assert sizes["qwen2.5-14b"] == 14_770_033_664
    assert sizes["qwen2.5-32b"] == 32_763_876_352
    assert sizes["qwen3-8b"] == 8_190_735_360
    with pytest.raises(ModelNotFoundError, match="or one of .*tiny.*; got 'gpt-9'"):
        builtin_model_config("gpt-9")


def test_projection_dims_and_biases():
    config = ModelConfig(
        family="qwen3",
        vocab_size=10,
        hidden_size=6,
        intermediate_size=9,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position=16,
        rope=RopeConfig(10.0),
        rms_norm_eps=1e-6,
        tie_embeddings=True,
        qkv_bias=True,
    )
    dims = config.projection_dims()
    assert dims["q_proj"] == (6, 32) and dims["k_proj"] == (6, 16) and dims["o_proj"] == (32, 6)
    assert config.has_bias("k_proj") and not config.has_bias("o_proj")
    assert not config.has_bias("up_proj")
