import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from flexjax.errors import ModelNotFoundError, UnsupportedModelError, WeightFormatError
from flexjax.io.hf_weights import load_decoder, load_weights, save_weights
from flexjax.model_config import ModelConfig, RopeConfig, load_model_config
from flexjax.models.weights import random_weights

BASE = {
    "vocab_size": 31,
    "hidden_size": 12,
    "intermediate_size": 18,
    "num_layers": 2,
    "num_heads": 3,
    "num_kv_heads": 1,
    "head_dim": 6,
    "max_position": 64,
    "rope": RopeConfig(10_000.0),
    "rms_norm_eps": 1e-5,
    "tie_embeddings": False,
    "dtype": "float32",
}
CONFIGS = {
    "llama": ModelConfig(family="llama", **{**BASE, "eos_token_ids": (2, 5), "bos_token_id": 1}),
    "llama-bias": ModelConfig(family="llama", **BASE, qkv_bias=True, o_bias=True),
    "llama-rope3": ModelConfig(
        family="llama", **{**BASE, "rope": RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 32)}
    ),
    "llama-tied": ModelConfig(family="llama", **{**BASE, "tie_embeddings": True}),
    "mistral": ModelConfig(family="mistral", **BASE, sliding_window=7),
    "mistral-full": ModelConfig(family="mistral", **BASE),
    "qwen2": ModelConfig(family="qwen2", **BASE, qkv_bias=True),
    "qwen3": ModelConfig(family="qwen3", **BASE, qk_norm=True),
}
CONFIG = CONFIGS["llama"]


def draw(config, seed=0):
    weights = random_weights(config, "float32", seed)
    leaves, treedef = jax.tree.flatten(weights)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, drawn)


def assert_same(ours, theirs):
    assert set(ours.layers) == set(theirs.layers)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.fixture
def model_dir(tmp_path):
    save_weights(tmp_path, CONFIG, draw(CONFIG))
    return tmp_path


def tensors_of(model_dir):
    return safetensors.numpy.load_file(model_dir / "model.safetensors")


def rewrite(model_dir, tensors):
    safetensors.numpy.save_file(tensors, model_dir / "model.safetensors")


def shard(model_dir):
    tensors = tensors_of(model_dir)
    (model_dir / "model.safetensors").unlink()
    keys = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((keys[::2], keys[1::2])):
        name = f"model-{i}.safetensors"
        safetensors.numpy.save_file({k: tensors[k] for k in part}, model_dir / name)
        weight_map.update(dict.fromkeys(part, name))
    index = model_dir / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index, weight_map


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_exact(tmp_path, name):
    weights = draw(CONFIGS[name])
    save_weights(tmp_path, CONFIGS[name], weights)
    assert load_model_config(tmp_path) == CONFIGS[name]
    assert_same(load_weights(tmp_path, CONFIGS[name], "float32"), weights)


def test_dtypes(tmp_path):
    weights = draw(CONFIG)
    save_weights(tmp_path, CONFIG, weights, dtype="bfloat16")
    stored = tensors_of(tmp_path)
    assert {x.dtype for x in stored.values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert load_model_config(tmp_path).dtype == "bfloat16"
    narrow = jax.tree.map(lambda x: x.astype("bfloat16"), weights)
    assert_same(load_decoder(tmp_path).weights(), narrow)
    wide = jax.tree.map(lambda x: x.astype("float32"), narrow)
    assert_same(load_decoder(tmp_path, "float32").weights(), wide)
    with pytest.raises(ValueError, match="`dtype` must be one of .*; got 'int8'"):
        load_weights(tmp_path, CONFIG, "int8")


def test_sharded_files(model_dir):
    weights = load_weights(model_dir, CONFIG, "float32")
    shard(model_dir)
    assert_same(load_weights(model_dir, CONFIG, "float32"), weights)


def test_tied_head_and_rotary_buffers_are_ignored(tmp_path):
    config = CONFIGS["llama-tied"]
    weights = draw(config)
    save_weights(tmp_path, config, weights)
    tensors = tensors_of(tmp_path)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = np.zeros((31, 12), np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(3, np.float32)
    rewrite(tmp_path, tensors)
    assert_same(load_weights(tmp_path, config, "float32"), weights)


def test_missing_and_unexpected_keys_are_listed(model_dir):
    tensors = tensors_of(model_dir)
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["lm_head.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((18, 12), np.float32)
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(18, np.float32)
    rewrite(model_dir, tensors)
    with pytest.raises(WeightFormatError) as caught:
        load_weights(model_dir, CONFIG, "float32")
    missing, unexpected = str(caught.value).split("unexpected keys: ")
    assert "lm_head.weight" in missing and "model.layers.1.mlp.up_proj.weight" in missing
    assert "layers.2.mlp.up_proj.weight" in unexpected and "q_proj.bias" in unexpected


def test_long_lists_are_shortened(model_dir):
    tensors = tensors_of(model_dir)
    tensors.update({f"extra.{i:02}": np.zeros(1, np.float32) for i in range(25)})
    rewrite(model_dir, tensors)
    with pytest.raises(WeightFormatError, match="missing keys: none; .*extra.19, and 5 more"):
        load_weights(model_dir, CONFIG, "float32")


def test_wrong_shape_and_dtype(model_dir):
    tensors = tensors_of(model_dir)
    good = tensors["model.layers.1.self_attn.k_proj.weight"]
    tensors["model.layers.1.self_attn.k_proj.weight"] = np.ascontiguousarray(good.T)
    rewrite(model_dir, tensors)
    match = r"layers.1.self_attn.k_proj.weight must have shape \(6, 12\), got \(12, 6\)"
    with pytest.raises(WeightFormatError, match=match):
        load_weights(model_dir, CONFIG, "float32")
    tensors["model.layers.1.self_attn.k_proj.weight"] = good.astype(np.int8)
    rewrite(model_dir, tensors)
    with pytest.raises(WeightFormatError, match="stored as floating point, got I8"):
        load_weights(model_dir, CONFIG, "float32")


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_damaged_files_are_named(model_dir, size):
    path = model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(WeightFormatError, match=r"model\.safetensors is damaged"):
        load_weights(model_dir, CONFIG, "float32")


def test_damaged_shards_are_named(model_dir):
    index, weight_map = shard(model_dir)
    content = (model_dir / "model-1.safetensors").read_bytes()
    (model_dir / "model-1.safetensors").write_bytes(content[:-3])
    with pytest.raises(WeightFormatError, match=r"model-1\.safetensors is damaged"):
        load_weights(model_dir, CONFIG, "float32")
    (model_dir / "model-1.safetensors").unlink()
    with pytest.raises(WeightFormatError, match="shard 'model-1.safetensors', which is absent"):
        load_weights(model_dir, CONFIG, "float32")
    (model_dir / "model-1.safetensors").write_bytes(content)
    weight_map["lm_head.weight"] = {"model-0": "model-1", "model-1": "model-0"}[
        weight_map["lm_head.weight"].removesuffix(".safetensors")
    ] + ".safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightFormatError, match="places lm_head.weight in .* does not hold it"):
        load_weights(model_dir, CONFIG, "float32")
    weight_map["lm_head.weight"] = "../model-0.safetensors"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightFormatError, match="absent"):
        load_weights(model_dir, CONFIG, "float32")
    index.write_text("{")
    with pytest.raises(WeightFormatError, match=r"index\.json is damaged"):
        load_weights(model_dir, CONFIG, "float32")


def test_no_weights(tmp_path):
    with pytest.raises(ModelNotFoundError, match="does not exist"):
        load_weights(tmp_path / "absent", CONFIG, "float32")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match="save the model as safetensors"):
        load_weights(tmp_path, CONFIG, "float32")


def test_saving_checks_first(tmp_path):
    other = ModelConfig(family="llama", **{**BASE, "hidden_size": 14})
    with pytest.raises(ValueError, match=r"must hold embed of shape \(31, 14\); got \(31, 12\)"):
        save_weights(tmp_path / "a", other, draw(CONFIG))
    odd = ModelConfig(family="llama", **BASE, qkv_bias=True)
    with pytest.raises(UnsupportedModelError, match="o_bias=False"):
        save_weights(tmp_path / "b", odd, draw(odd))
    assert not list(tmp_path.iterdir())


def test_saving_leaves_no_temporary_files(model_dir):
    save_weights(model_dir, CONFIG, draw(CONFIG, seed=1))
    assert {x.name for x in model_dir.iterdir()} == {"model.safetensors", "config.json"}
    assert_same(load_decoder(model_dir).weights(), draw(CONFIG, seed=1))
