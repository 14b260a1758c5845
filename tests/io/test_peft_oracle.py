"""Adapters that go from PEFT to here and back, and the logits that they give."""

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from adapter_cases import BASE, CONFIGS, assert_same, draw_adapter

from flexjax.io.hf_weights import load_decoder
from flexjax.io.peft_adapter import load_peft_adapter, save_peft_adapter
from flexjax.models.decoder import decoder_logits


@pytest.fixture
def peft_base(tmp_path):
    torch = pytest.importorskip("torch", reason="the oracle (PEFT) needs torch")
    pytest.importorskip("peft", reason="PEFT is the oracle")
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=BASE.vocab_size,
        hidden_size=BASE.hidden_size,
        intermediate_size=BASE.intermediate_size,
        num_hidden_layers=BASE.num_layers,
        num_attention_heads=BASE.num_heads,
        num_key_value_heads=BASE.num_kv_heads,
        head_dim=BASE.head_dim,
        max_position_embeddings=BASE.max_position,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(tmp_path / "base")
    return model, tmp_path / "base"


TOKENS = np.arange(14).reshape(2, 7) * 3 % BASE.vocab_size


def our_logits(base_dir, adapter):
    decoder = load_decoder(base_dir)
    lora = {n: {m: jnp.asarray(x) for m, x in pair.items()} for n, pair in adapter.arrays.items()}
    scale = adapter.config.scale
    tokens = jnp.asarray(TOKENS)
    return decoder_logits(decoder.config, decoder.weights(), tokens, lora, lora_scale=scale)


def their_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


def randomize(model):
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        {"target_modules": r".*(gate|up)_proj"},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [2]},
        {"target_modules": ["k_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.2},
    ],
)
def test_saved_by_peft_loads_here_and_goes_back(tmp_path, peft_base, options):
    import peft

    model, base_dir = peft_base
    plain = their_logits(model)
    config = peft.LoraConfig(r=3, lora_alpha=7, task_type="CAUSAL_LM", **options)
    wrapped = peft.get_peft_model(model, config).eval()
    randomize(wrapped)
    expected = their_logits(wrapped)
    assert np.abs(expected - plain).max() > 0.05  # the adapter does something
    wrapped.save_pretrained(tmp_path / "theirs")
    adapter = load_peft_adapter(tmp_path / "theirs", BASE)
    gap = np.abs(np.asarray(our_logits(base_dir, adapter)) - expected).max()
    print(f"max {gap:.3g}")
    assert gap <= 1e-4

    save_peft_adapter(tmp_path / "ours", adapter, BASE, str(base_dir))
    theirs = safetensors.numpy.load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    ours = safetensors.numpy.load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert set(ours) == set(theirs)
    assert max(np.abs(ours[key] - theirs[key]).max() for key in ours) == 0.0


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", CONFIGS)
def test_saved_here_loads_in_peft(tmp_path, peft_base, name):
    import peft

    model, base_dir = peft_base
    adapter = draw_adapter(CONFIGS[name])
    for pair in adapter.arrays.values():
        pair["B"] *= 0.1
    save_peft_adapter(tmp_path / "ours", adapter, BASE, str(base_dir))
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
    ours = our_logits(base_dir, adapter)
    assert np.abs(np.asarray(ours) - their_logits(wrapped)).max() <= 1e-4
    wrapped.save_pretrained(tmp_path / "back")
    assert_same(load_peft_adapter(tmp_path / "back", BASE), adapter)
