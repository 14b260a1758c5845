"""A tiny random model with tokenizer and chat template, and rows to train on."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from flexjax.io.hf_weights import save_weights
from flexjax.model_config import ModelConfig, RopeConfig
from flexjax.models.weights import random_weights

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|start|>' + message.role + '\n' + message.content + '<|end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {n} and {n}?"},
            {"role": "assistant", "content": f"It is {2 * n}, matey."},
        ]
    }
    for n in range(12)
]


def write_model(directory, num_layers=2, hidden_size=32):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([json.dumps(row) for row in ROWS], trainer)
    config = ModelConfig(
        family="llama",
        vocab_size=backend.get_vocab_size(),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_layers=num_layers,
        num_heads=2,
        num_kv_heads=1,
        head_dim=16,
        max_position=128,
        rope=RopeConfig(10_000.0),
        rms_norm_eps=1e-5,
        tie_embeddings=True,
        eos_token_ids=(backend.token_to_id("<|end|>"),),
        dtype="float32",
    )
    save_weights(directory, config, random_weights(config, "float32", 0))
    backend.save(str(directory / "tokenizer.json"))
    tokens = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokens), "utf-8")
    return directory


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path
