import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from adapter_cases import BASE, CONFIGS, assert_same, draw_adapter

from flexjax.config import LORA_TARGETS, LoraConfig
from flexjax.errors import AdapterFormatError
from flexjax.io.peft_adapter import load_peft_adapter, save_peft_adapter

Q_KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_round_trip_is_exact(tmp_path, name, dtype):
    adapter = draw_adapter(CONFIGS[name], dtype)
    save_peft_adapter(tmp_path / "a", adapter, BASE, "base")
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors"}
    assert_same(load_peft_adapter(tmp_path / "a", BASE), adapter)
    raw = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == "base" and raw["peft_type"] == "LORA"


def test_all_linear_is_written_as_names(tmp_path):
    adapter = draw_adapter(LoraConfig(r=2, alpha=4.0))
    save_peft_adapter(tmp_path / "a", adapter, BASE)
    assert load_peft_adapter(tmp_path / "a", BASE).config.targets == LORA_TARGETS


def test_saving_replaces_as_a_whole(tmp_path):
    save_peft_adapter(tmp_path / "a", draw_adapter(CONFIGS["all"]), BASE)
    (tmp_path / "a" / "notes.txt").write_text("old")
    save_peft_adapter(tmp_path / "a", draw_adapter(CONFIGS["some"], seed=1), BASE)
    assert_same(load_peft_adapter(tmp_path / "a", BASE), draw_adapter(CONFIGS["some"], seed=1))
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert not (tmp_path / "a" / "notes.txt").exists()


def test_a_failed_save_leaves_the_old_adapter(tmp_path, monkeypatch):
    save_peft_adapter(tmp_path / "a", draw_adapter(CONFIGS["all"]), BASE)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_peft_adapter(tmp_path / "a", draw_adapter(CONFIGS["some"]), BASE)
    with pytest.raises(OSError, match="disk full"):
        save_peft_adapter(tmp_path / "b", draw_adapter(CONFIGS["some"]), BASE)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert_same(load_peft_adapter(tmp_path / "a", BASE), draw_adapter(CONFIGS["all"]))


def test_saving_refuses(tmp_path):
    adapter = draw_adapter(CONFIGS["some"])
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds other files"):
        save_peft_adapter(tmp_path / "home", adapter, BASE)
    adapter.arrays["q_proj"]["B"][1, 0, 0] = np.nan
    with pytest.raises(AdapterFormatError, match="q_proj B holds values that are not finite"):
        save_peft_adapter(tmp_path / "a", adapter, BASE)
    adapter.arrays["q_proj"]["B"] = np.zeros((3, 3, 7), np.float32)
    with pytest.raises(
        AdapterFormatError, match=r"q_proj B of shape \(3, 3, 24\); got \(3, 3, 7\)"
    ):
        save_peft_adapter(tmp_path / "a", adapter, BASE)
    del adapter.arrays["q_proj"]
    with pytest.raises(AdapterFormatError, match="must be of q_proj, v_proj; got v_proj"):
        save_peft_adapter(tmp_path / "a", adapter, BASE)


@pytest.fixture
def saved(tmp_path):
    save_peft_adapter(tmp_path / "a", draw_adapter(CONFIGS["some"]), BASE)
    return tmp_path / "a"


def change_config(path, **changes):
    file = path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_tensors(path, change):
    file = path / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    change(tensors)
    safetensors.numpy.save_file(tensors, file)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 8}},
        {"alpha_pattern": {"q_proj": 8}},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "eva"},
        {"megatron_config": {"a": 1}},
        {"layer_replication": [[0, 2]]},
        {"trainable_token_indices": [1]},
        {"target_parameters": ["experts"]},
        {"peft_type": "IA3"},
        {"fan_in_fan_out": True},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": "("},
        {"target_modules": None},
        {"layers_to_transform": [0, 3]},
        {"layers_to_transform": "abc"},
        {"layers_pattern": "h"},
        {"r": 0},
        {"r": "3"},
        {"lora_alpha": None},
    ],
)
def test_unsupported_fields_are_refused_by_name(saved, changes):
    change_config(saved, **changes)
    with pytest.raises(AdapterFormatError, match=f"`{next(iter(changes))}`"):
        load_peft_adapter(saved, BASE)


def test_unset_fields_of_newer_peft_are_accepted(saved):
    change_config(saved, use_dora=False, rank_pattern={}, loftq_config={}, lora_dropout=0.1)
    change_config(saved, init_lora_weights="gaussian", brand_new_option=None)
    load_peft_adapter(saved, BASE)


@pytest.mark.parametrize(
    ("targets", "excluded"),
    [
        (["v_proj", "q_proj"], None),
        (["self_attn.q_proj", "self_attn.v_proj"], None),
        (r".*\.self_attn\.(q|v)_proj", None),
        ("all-linear", r".*(k_proj|o_proj|mlp\..*)"),
        (["v_proj", "q_proj", "k_proj"], ["k_proj"]),
        ([f"model.layers.{i}.self_attn.{n}_proj" for i in range(3) for n in "qv"], None),
    ],
)
def test_target_patterns_of_peft(saved, targets, excluded):
    change_config(saved, target_modules=targets, exclude_modules=excluded)
    assert load_peft_adapter(saved, BASE).config.targets == ("q_proj", "v_proj")


def test_targets_must_fit_the_tensors(saved):
    change_config(saved, target_modules=["q_proj", "k_proj"])
    match = "without tensors: .*0.self_attn.k_proj.*; with tensors but not selected: .*v_proj"
    with pytest.raises(AdapterFormatError, match=match):
        load_peft_adapter(saved, BASE)
    change_config(saved, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 1])
    with pytest.raises(AdapterFormatError, match="not selected: model.layers.2.self_attn"):
        load_peft_adapter(saved, BASE)


def set_nan(tensors):
    tensors[Q_KEY][0, 0] = np.inf


def drop_b(tensors):
    del tensors[Q_KEY.replace("_A", "_B")]


def add_layer(tensors):
    tensors[Q_KEY.replace(".1.", ".7.")] = tensors[Q_KEY]


def add_head(tensors):
    tensors["base_model.model.lm_head.lora_A.weight"] = tensors[Q_KEY]


def add_embedding(tensors):
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = tensors[Q_KEY]


def change_rank(tensors):
    tensors[Q_KEY] = tensors[Q_KEY][:2].copy()


def narrow_one(tensors):
    tensors[Q_KEY] = tensors[Q_KEY].astype(np.float16)


def to_integers(tensors):
    for key in tensors:
        tensors[key] = tensors[key].astype(np.int32)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (set_nan, f"{Q_KEY} holds values that are not finite"),
        (drop_b, r"layers\.1\.self_attn\.q_proj has lora_A without lora_B"),
        (add_layer, r"layers\.7\..* is for layer 7; the base model has 3 layers"),
        (add_head, r"unexpected keys: base_model\.model\.lm_head\.lora_A\.weight"),
        (add_embedding, "unexpected keys: .*embed_tokens"),
        (change_rank, rf"{Q_KEY} must have shape \(3, 24\) .*`r`=3; got \(2, 24\)"),
        (narrow_one, "must be float32 as the others; got float16|must be float16"),
        (to_integers, "must be float32, bfloat16 or float16; got int32"),
        (dict.clear, "holds no tensors"),
    ],
)
def test_bad_tensors(saved, change, match):
    change_tensors(saved, change)
    with pytest.raises(AdapterFormatError, match=match):
        load_peft_adapter(saved, BASE)


def test_adapter_of_another_base(saved):
    import dataclasses

    other = dataclasses.replace(BASE, hidden_size=32)
    match = r"q_proj.lora_A.weight must have shape \(3, 32\).*got \(3, 24\)"
    with pytest.raises(AdapterFormatError, match=match):
        load_peft_adapter(saved, other)


def test_missing_and_damaged_files(saved, tmp_path):
    with pytest.raises(AdapterFormatError, match="does not exist"):
        load_peft_adapter(tmp_path / "absent", BASE)
    file = saved / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-5])
    with pytest.raises(AdapterFormatError, match=r"adapter_model\.safetensors is damaged"):
        load_peft_adapter(saved, BASE)
    file.unlink()
    (saved / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(AdapterFormatError, match="save the adapter as safetensors"):
        load_peft_adapter(saved, BASE)
    (saved / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterFormatError, match=r"adapter_config\.json is damaged"):
        load_peft_adapter(saved, BASE)
    (saved / "adapter_config.json").unlink()
    with pytest.raises(AdapterFormatError, match="has no adapter_config.json"):
        load_peft_adapter(saved, BASE)
