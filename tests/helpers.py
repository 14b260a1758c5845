"""Tiny models, adapters, tokenizers and oracles that the tests share."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from flexjax.config import LORA_TARGETS, EngineConfig, LoraConfig
from flexjax.engine.engine import Engine
from flexjax.io.hf_weights import save_weights
from flexjax.io.peft_adapter import LoraAdapter, save_peft_adapter
from flexjax.io.tokenizer import Tokenizer
from flexjax.model_config import ModelConfig, RopeConfig
from flexjax.models.decoder import decoder_logits
from flexjax.models.weights import DecoderWeights, random_weights

VOCAB = 61
EOS = VOCAB - 1

GRADIENT_TOLERANCE = 1e-5
"""Relative error (norm of the difference over norm), float32, against jax.grad."""
TORCH_GRADIENT_TOLERANCE = 1e-4
LOGPROB_TOLERANCE = 2e-5
"""Log probabilities of a request in batches of different shapes, float32, nats."""

_FAMILIES = {
    "llama": {},
    "qwen2": {"qkv_bias": True, "tie_embeddings": True, "num_kv_heads": 1},
    "qwen3": {"qk_norm": True, "head_dim": 12},
    "mistral": {"sliding_window": 7, "num_heads": 6, "num_kv_heads": 3, "head_dim": 6},
}
FAMILIES = tuple(_FAMILIES)


def tiny_config(family: str = "llama", **changes) -> ModelConfig:
    """A model of a few thousand weights whose head dim is not D / N."""
    options = {
        "vocab_size": VOCAB,
        "hidden_size": 28,
        "intermediate_size": 36,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 10,
        "max_position": 256,
        "rope": RopeConfig(10_000.0),
        "rms_norm_eps": 1e-5,
        "tie_embeddings": False,
        "dtype": "float32",
        "eos_token_ids": (EOS,),
        **_FAMILIES[family],
        **changes,
    }
    return ModelConfig(family=family, **options)


def tiny_weights(config: ModelConfig, seed: int = 0) -> DecoderWeights:
    """Weights in which every array is random, norms and biases included."""
    shapes = random_weights(config, "float32", seed)
    leaves, treedef = jax.tree.flatten(shapes)
    rng = np.random.default_rng([seed, 1])
    drawn = []
    for leaf in leaves:
        noise = rng.standard_normal(leaf.shape)
        is_norm = bool((np.asarray(leaf) == 1.0).all())
        drawn.append(jnp.asarray(1.0 + 0.2 * noise if is_norm else 0.25 * noise, jnp.float32))
    return jax.tree.unflatten(treedef, drawn)


def draw_lora(
    rng: np.random.Generator, config: ModelConfig, lora: LoraConfig, size: float = 0.2
) -> dict[str, dict[str, np.ndarray]]:
    """An adapter with non-zero A and B in the layers that `lora` names."""
    dims, arrays = config.projection_dims(), {}
    layers = lora.layers_to_transform
    is_adapted = np.isin(np.arange(config.num_layers), layers or range(config.num_layers))
    for name in lora.targets:
        num_in, num_out = dims[name]
        a = size * rng.standard_normal((config.num_layers, num_in, lora.r))
        b = size * rng.standard_normal((config.num_layers, lora.r, num_out))
        mask = is_adapted[:, None, None]
        arrays[name] = {"A": (a * mask).astype(np.float32), "B": (b * mask).astype(np.float32)}
    return arrays


def write_adapter(path: Path, config: ModelConfig, lora: LoraConfig, arrays) -> Path:
    """Saves an adapter as a PEFT directory."""
    names = tuple(name for name in LORA_TARGETS if name in lora.targets)
    lora = dataclasses.replace(lora, target_modules=names)
    save_peft_adapter(path, LoraAdapter(lora, arrays), config)
    return path


def word_tokenizer(vocab_size: int = VOCAB) -> Tokenizer:
    """Token i is the word "t{i}", the last one is the end token: texts give exact token ids."""
    vocab = {f"t{i}": i for i in range(vocab_size - 1)} | {"<eos>": vocab_size - 1}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="t0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<eos>"])
    return Tokenizer(backend, {"eos_token": "<eos>"})


def text_of(tokens) -> str:
    """Text whose tokens these are."""
    return " ".join(f"t{int(token)}" for token in tokens)


def draw_tokens(rng: np.random.Generator, length: int) -> list[int]:
    """Token ids without the end token."""
    return [int(token) for token in rng.integers(0, VOCAB - 1, length)]


@dataclasses.dataclass(frozen=True)
class Row:
    """A dataset row and the tokens and targets that it must become."""

    source: dict
    tokens: np.ndarray
    targets: np.ndarray


def draw_rows(rng: np.random.Generator, lengths, is_masked: bool = False) -> list[Row]:
    """Rows of given lengths; masked ones bear loss on their second part only."""
    rows = []
    for length in lengths:
        tokens = np.asarray(draw_tokens(rng, length))
        first = 1
        if is_masked and length > 2:
            first = int(rng.integers(1, length - 1))
            tokens[-1] = EOS
            source = {"prompt": text_of(tokens[:first]), "completion": text_of(tokens[first:-1])}
        else:
            source = {"text": text_of(tokens)}
        targets = np.full(length, -1)
        targets[first - 1 : -1] = tokens[first:]
        rows.append(Row(source, tokens, targets))
    return rows


@functools.partial(jax.jit, static_argnums=0)
def _sum_loss_and_grad(config, weights, lora, scale, tokens, targets):
    def loss_of(lora):
        logits = decoder_logits(config, weights, tokens, lora, lora_scale=scale)
        table = jax.nn.log_softmax(logits, axis=-1)
        picked = jnp.take_along_axis(table, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        return -jnp.where(targets >= 0, picked, 0.0).sum()

    return jax.value_and_grad(loss_of)(lora)


def whole_sequence_gradients(config, weights, arrays, scale: float, rows: list[Row]):
    """Summed loss of the rows and its gradient by `jax.grad` of dense, whole sequences.

    Rows are padded behind to one length; with causal attention that changes nothing.
    """
    length = max(len(row.tokens) for row in rows)
    tokens = np.zeros((len(rows), length), np.int32)
    targets = np.full((len(rows), length), -1, np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = row.tokens
        targets[index, : len(row.targets)] = row.targets
    lora = jax.tree.map(jnp.asarray, arrays)
    args = (jnp.float32(scale), jnp.asarray(tokens), jnp.asarray(targets))
    loss, grads = _sum_loss_and_grad(config, weights, lora, *args)
    return float(loss), jax.tree.map(np.asarray, grads)


def relative(ours, theirs) -> float:
    """Norm of the difference over the norm of the reference."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    norm = np.linalg.norm(theirs)
    gap = np.linalg.norm(ours - theirs)
    return float(gap if norm == 0 else gap / norm)


def worst_gradient_error(ours, theirs) -> float:
    """Largest relative error over all tensors of {"q_proj": {"A", "B"}, ...}."""
    assert set(ours) == set(theirs)
    errors = {(n, m): relative(ours[n][m], theirs[n][m]) for n in theirs for m in ("A", "B")}
    return max(errors.values())


def make_engine(config: ModelConfig, weights: DecoderWeights, **options) -> Engine:
    """An engine with few buckets; `options` are those of `EngineConfig`."""
    defaults = {
        "max_context_len": 96,
        "max_running": 4,
        "page_size": 8,
        "max_adapters": 6,
        "max_lora_rank": 5,
        "max_jobs": 1,
        "decode_buckets": (4,),
        "chunk_buckets": (16,),
        "window_buckets": (16,),
        "slo_class": "batch",  # no targets: how much is mixed does not depend on the machine
    }
    engine_config = EngineConfig(**{**defaults, **options})
    return Engine(config, weights, word_tokenizer(config.vocab_size), engine_config)


@dataclasses.dataclass(frozen=True)
class Launched:
    """What a launched step held, in rows."""

    decode: int
    prefill: int
    forward: int
    backward: int

    @property
    def is_mixed(self) -> bool:
        """Whether the step held inference and finetuning rows."""
        return bool((self.decode or self.prefill) and (self.forward or self.backward))


class Recorder:
    """Watches an engine: what each step held, and each batch's summed gradients."""

    def __init__(self, engine: Engine):
        self.steps: list[Launched] = []
        self.num_discarded = 0
        self.gradients: list[tuple[int, dict, float]] = []
        self._engine = engine
        self._launch = engine._runner.launch
        self._run_optimizer = engine._runner._run_optimizer
        engine._runner.launch = self._record_launch
        engine._runner._run_optimizer = self._record_optimizer

    def close(self) -> None:
        """Stops watching."""
        self._engine._runner.launch = self._launch
        self._engine._runner._run_optimizer = self._run_optimizer

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    @property
    def num_mixed(self) -> int:
        """Steps that held both kinds of rows."""
        return sum(step.is_mixed for step in self.steps)

    def _record_launch(self, plan):
        self.num_discarded += len(plan.discarded)
        self.steps.append(
            Launched(
                len(plan.decode),
                sum(chunk.length for chunk in plan.prefill),
                sum(piece.length for piece in plan.forward),
                plan.tile.length if plan.tile else 0,
            )
        )
        return self._launch(plan)

    def _record_optimizer(self, step):
        total = self._engine._runner._jobs[step.run.run_id].total
        lora = self._engine.jobs()[step.run.run_id].lora
        grads = {
            name: {
                "A": np.array(total.lora.a[name])[:, :, : lora.r],
                "B": np.array(total.lora.b[name])[:, : lora.r, :],
            }
            for name in lora.targets
        }
        self.gradients.append((step.run.run_id, grads, float(total.loss)))
        return self._run_optimizer(step)


def drain(engine: Engine, limit: int = 5_000) -> None:
    """Steps until nothing is left to do, checking the books after each step."""
    for _ in range(limit):
        if not engine.step():
            return
        engine.check_integrity()
    raise AssertionError(f"the engine was not idle after {limit} steps")


def write_model(path: Path, config: ModelConfig, weights: DecoderWeights) -> Path:
    """Saves a model directory without a tokenizer."""
    save_weights(path, config, weights)
    return path


def torch_model(path: Path):
    """The directory's model in transformers, float32, eager attention."""
    import transformers

    auto = transformers.AutoModelForCausalLM
    return auto.from_pretrained(path, attn_implementation="eager", dtype="float32").eval()


def torch_sum_loss(model, tokens, targets):
    """Summed token loss of one sequence, a torch scalar."""
    import torch

    logits = model(torch.tensor(np.asarray(tokens)[None])).logits[0].float()
    wanted = torch.tensor(np.asarray(targets), dtype=torch.long)
    return torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-1, reduction="sum")


def peft_gradients(model) -> dict[str, dict[str, np.ndarray]]:
    """Gradients of a PEFT model's adapter, in our layout."""
    found: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        parts = name.split(".")
        linear = next(part for part in parts if part in LORA_TARGETS)
        layer = int(parts[parts.index("layers") + 1])
        matrix = "A" if "lora_A" in name else "B"
        grad = parameter.grad.numpy().T.copy()
        found.setdefault(linear, {}).setdefault(matrix, {})[layer] = grad
    return {
        linear: {m: np.stack([by[i] for i in sorted(by)]) for m, by in pair.items()}
        for linear, pair in found.items()
    }


def merged_weights(config: ModelConfig, weights: DecoderWeights, arrays, scale: float):
    """Base weights with an adapter added to the kernels (float64 products)."""
    layers = dict(weights.layers)
    for name, pair in arrays.items():
        delta = scale * np.einsum("lir,lro->lio", *(np.float64(pair[m]) for m in ("A", "B")))
        kernel = np.float64(layers[f"{name}.kernel"]) + delta
        layers[f"{name}.kernel"] = jnp.asarray(kernel, jnp.float32)
    return weights._replace(layers=layers)


@functools.partial(jax.jit, static_argnums=0)
def _log_softmax(config, weights, tokens):
    return jax.nn.log_softmax(decoder_logits(config, weights, tokens[None])[0], axis=-1)


def dense_logprobs(config: ModelConfig, weights: DecoderWeights, tokens, length: int = 128):
    """Log probabilities after each token by dense attention, [S, V]; padded to one length."""
    padded = np.zeros(length, np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(_log_softmax(config, weights, jnp.asarray(padded)))[: len(tokens)]


def check_greedy(config, weights, output, tolerance: float = LOGPROB_TOLERANCE) -> float:
    """Asserts that an output is what dense attention chooses; returns the largest logprob gap."""
    tokens = [*output.prompt_token_ids, *output.token_ids]
    table = dense_logprobs(config, weights, tokens)[len(output.prompt_token_ids) - 1 : -1]
    assert list(table.argmax(-1)) == list(output.token_ids)
    if output.logprobs is None:
        return 0.0
    ours = np.asarray([entry.logprob for entry in output.logprobs])
    gap = float(np.abs(ours - table.max(-1)).max())
    assert gap <= tolerance, gap
    return gap


def logprob_gap(first, second) -> float:
    """Largest difference of two outputs' log probabilities; their tokens must be equal."""
    assert first.token_ids == second.token_ids
    pairs = zip(first.logprobs, second.logprobs, strict=True)
    return max(abs(a.logprob - b.logprob) for a, b in pairs)
