"""Pretrains the tiny model that is shipped in `flexjax/data/tiny`, from nothing, on a CPU.

    python scripts/pretrain_tiny.py --output DIR --seed 0

The defaults make the shipped model. The same seed gives the same world, the same texts in the same
order and the same initial weights; the trained bits may differ between JAX versions and machines.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tiny_tokenizer import ChatCodec, train_tokenizer, write_tokenizer
from tiny_world import Document, World, Writer

from flexjax.io.hf_weights import save_weights
from flexjax.model_config import ModelConfig, RopeConfig
from flexjax.models.decoder import decoder_logits
from flexjax.models.weights import DecoderWeights, random_weights

MAX_VOCAB = 1536
"""A little less than what the texts would yield; a multiple of 128, as kernels like it."""
LONG_ROW = 1024
"""Tokens of the long rows (the context length), so that late positions are trained."""
LONG_EVERY = 12
"""Every so many steps of the second half have long rows; they cost several times more."""


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
      steps: Optimizer steps.
      tokens_per_step: Tokens of a batch; a multiple of both row lengths.
      row_len: Tokens of a row, several documents packed.
      long_row_len: Tokens of a long row; 0 for none.
      learning_rate: Peak.
      warmup: Share of the steps in which the rate rises.
      weight_decay: Of matrices.
      minutes: Stop after this wall time even if steps are left; None for never.
    """

    steps: int = 3200
    tokens_per_step: int = 1024
    row_len: int = 128
    long_row_len: int = LONG_ROW
    learning_rate: float = 3e-3
    warmup: float = 0.05
    weight_decay: float = 0.05
    minutes: float | None = None


def tiny_config(vocab_size: int, eos_token_ids: tuple[int, ...]) -> ModelConfig:
    """The shipped architecture."""
    return ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_layers=4,
        num_heads=6,
        num_kv_heads=2,
        head_dim=32,
        max_position=LONG_ROW,
        rope=RopeConfig(10_000.0),
        rms_norm_eps=1e-5,
        tie_embeddings=True,
        dtype="float32",
        eos_token_ids=eos_token_ids,
    )


class Packer:
    """Cuts an endless stream of documents into rows; each row begins with a document."""

    def __init__(self, documents: Iterator[Document], codec: ChatCodec):
        self._documents = documents
        self._codec = codec

    def batch(self, rows: int, row_len: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns `rows` x (`row_len` + 1) token ids, and the loss weight of each."""
        pairs = [self._row(row_len + 1) for _ in range(rows)]
        tokens, weights = zip(*pairs, strict=True)
        return np.array(tokens, np.int32), np.array(weights, np.float32)

    def _row(self, length: int) -> tuple[list[int], list[float]]:
        tokens: list[int] = []
        weights: list[float] = []
        while len(tokens) < length:
            ids, parts = self._codec.encode_document(next(self._documents))
            tokens += ids
            weights += parts
        return tokens[:length], weights[:length]


def make_step(
    config: ModelConfig, optimizer: optax.GradientTransformation
) -> Callable[..., tuple[DecoderWeights, optax.OptState, jax.Array]]:
    """Returns the jitted (weights, state, tokens, loss weights) -> (weights, state, loss)."""

    def loss_fn(weights: DecoderWeights, tokens: jax.Array, parts: jax.Array) -> jax.Array:
        logits = decoder_logits(config, weights, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.sum(losses * parts[:, 1:]) / jnp.sum(parts[:, 1:])

    def step(
        weights: DecoderWeights, state: optax.OptState, tokens: jax.Array, parts: jax.Array
    ) -> tuple[DecoderWeights, optax.OptState, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(weights, tokens, parts)
        updates, state = optimizer.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state, loss  # type: ignore[return-value]

    return jax.jit(step, donate_argnums=(0, 1))


def train(
    config: ModelConfig, packer: Packer, settings: TrainSettings, seed: int
) -> tuple[DecoderWeights, dict]:
    """Trains all parameters from random ones.

    Returns:
      The weights, and a log: "losses" of every step, "tokens", "wall_s".
    """
    weights = random_weights(config, "float32", seed)
    warmup = max(1, int(settings.steps * settings.warmup))
    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, warmup, max(settings.steps, warmup + 1), 1e-5
    )

    def is_matrix(weights: DecoderWeights) -> DecoderWeights:
        mask = jax.tree.map(lambda _: False, weights)
        layers = {name: name.endswith(".kernel") for name in weights.layers}
        return mask._replace(layers=layers, embed=True)

    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.98, weight_decay=settings.weight_decay, mask=is_matrix),
    )
    state, step_fn = optimizer.init(weights), make_step(config, optimizer)
    losses: list[jax.Array] = []
    started = time.monotonic()
    for step in range(settings.steps):
        is_long = settings.long_row_len and step >= settings.steps // 2 and step % LONG_EVERY == 0
        row_len = settings.long_row_len if is_long else settings.row_len
        batch = packer.batch(settings.tokens_per_step // row_len, row_len)
        weights, state, loss = step_fn(weights, state, *batch)
        losses.append(loss)
        elapsed = time.monotonic() - started
        if step % 50 == 0 or step == settings.steps - 1:
            done = (step + 1) * settings.tokens_per_step
            rate_now = done / max(elapsed, 1e-9)
            print(f"step {step:5d}  loss {float(loss):.4f}  {rate_now:.0f} tokens/s", flush=True)
        if settings.minutes is not None and elapsed > 60 * settings.minutes:
            print(f"stopped after {settings.minutes} minutes")
            break
    curve = [float(loss) for loss in losses]
    log = {"losses": curve, "tokens": len(curve) * settings.tokens_per_step}
    return weights, {**log, "wall_s": time.monotonic() - started}


def greedy_answers(
    config: ModelConfig,
    weights: DecoderWeights,
    codec: ChatCodec,
    questions: list[str],
    *,
    raw: bool = False,
    max_tokens: int = 32,
    **lora: object,
) -> list[str]:
    """Answers by greedy decoding with the whole-sequence decoder; for small models only.

    Args:
      config: Architecture.
      weights: Its weights.
      codec: Tokenizer.
      questions: User messages, or plain text to continue.
      raw: Whether the questions are plain text.
      max_tokens: Longest answer.
      **lora: `lora` and `lora_scale` of `decoder_logits`.
    """
    prompts = [codec.encode_text(q) if raw else codec.encode_prompt(q) for q in questions]
    lengths = np.array([len(p) for p in prompts])
    tokens = np.zeros((len(prompts), int(lengths.max()) + max_tokens), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    logits = jax.jit(lambda w, t: decoder_logits(config, w, t, **lora))  # type: ignore[arg-type]
    rows = np.arange(len(prompts))
    for i in range(max_tokens):
        # Rows beyond their length hold zeros, which causal attention hides from those before.
        tokens[rows, lengths + i] = np.asarray(logits(weights, tokens))[
            rows, lengths + i - 1
        ].argmax(-1)
    ends = set(config.eos_token_ids)
    answers = (row[n : n + max_tokens].tolist() for row, n in zip(tokens, lengths, strict=True))
    return [
        codec.decode(itertools.takewhile(lambda token: token not in ends, answer))
        for answer in answers
    ]


def exact_match(
    config: ModelConfig,
    weights: DecoderWeights,
    codec: ChatCodec,
    items: list[tuple[str, str, str]],
    rows: int = 32,
) -> dict[str, list[bool]]:
    """Whether greedy decoding yields each (kind, question, answer)'s answer and stops, by kind.

    Greedy decoding writes the answer exactly if and only if each of its tokens, the end token
    included, is the most likely one after the question and the answer's tokens before it; so one
    forward pass per question is enough.
    """
    logits = jax.jit(lambda w, t: jnp.argmax(decoder_logits(config, w, t), -1))
    found: dict[str, list[bool]] = {}
    for start in range(0, len(items), rows):
        part = items[start : start + rows]
        tokens = np.zeros((rows, 64), np.int32)
        spans = []
        for row, (_, question, answer) in zip(tokens, part, strict=False):
            prompt, reply = codec.encode_prompt(question), codec.encode_reply(answer)
            row[: len(prompt) + len(reply)] = prompt + reply
            spans.append((len(prompt), len(prompt) + len(reply)))
        best = np.asarray(logits(weights, tokens))
        for (kind, _, _), (a, b), row, guess in zip(part, spans, tokens, best, strict=False):
            hit = bool((guess[a - 1 : b - 1] == row[a:b]).all())
            found.setdefault(kind, []).append(hit)
    return found


def summarize(found: dict[str, list[bool]]) -> dict:
    """Exact-match figures: overall, mean over kinds, and by kind."""
    hits = [hit for kind in found.values() for hit in kind]
    by_kind = {kind: float(np.mean(values)) for kind, values in sorted(found.items())}
    return {
        "questions": len(hits),
        "exact_match": round(float(np.mean(hits)), 4),
        "exact_match_mean_of_kinds": round(float(np.mean(list(by_kind.values()))), 4),
        "by_kind": {kind: round(value, 3) for kind, value in by_kind.items()},
    }


def write_generation_config(model_dir: Path, codec: ChatCodec) -> None:
    """Writes `generation_config.json`: where generation ends, and that it is greedy."""
    raw = {
        "eos_token_id": [codec.end_id, codec.endoftext_id],
        "pad_token_id": codec.endoftext_id,
        "do_sample": False,
    }
    text = json.dumps(raw, indent=2) + "\n"
    (model_dir / "generation_config.json").write_text(text, encoding="utf-8")


def run(output: Path, seed: int, settings: TrainSettings, eval_questions: int) -> dict:
    """Makes tokenizer, model and log in `output`; returns the log."""
    output.mkdir(parents=True, exist_ok=True)
    world = World(seed)
    tokenizer = train_tokenizer(world, seed, MAX_VOCAB)
    codec = ChatCodec(tokenizer)
    config = tiny_config(tokenizer.get_vocab_size(), (codec.end_id, codec.endoftext_id))
    print(f"{config.num_params:,} parameters, {config.vocab_size} tokens, {settings}", flush=True)
    packer = Packer(Writer(world, seed).documents(), codec)
    weights, log = train(config, packer, settings, seed)
    write_tokenizer(tokenizer, output)
    write_generation_config(output, codec)
    save_weights(output, config, weights, dtype=config.dtype)
    found = exact_match(config, weights, codec, world.held_out(eval_questions, seed))
    losses = log.pop("losses")
    last = losses[-min(100, len(losses)) :]
    log = {
        "seed": seed,
        "jax": jax.__version__,
        "parameters": config.num_params,
        "settings": dataclasses.asdict(settings),
        **{name: round(value) for name, value in log.items()},
        "steps": len(losses),
        "loss_every_100_steps": [round(x, 4) for x in losses[::100]],
        "loss_mean_of_last_100": round(float(np.mean(last)), 4),
        "held_out": summarize(found),
    }
    (output / "pretrain_log.json").write_text(json.dumps(log, indent=2) + "\n", encoding="utf-8")
    return log


def main() -> None:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="model directory to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=TrainSettings.steps)
    parser.add_argument("--minutes", type=float, default=None, help="stop after this long")
    parser.add_argument("--learning-rate", type=float, default=TrainSettings.learning_rate)
    parser.add_argument("--eval-questions", type=int, default=1000)
    args = parser.parse_args()
    settings = TrainSettings(
        steps=args.steps, minutes=args.minutes, learning_rate=args.learning_rate
    )
    log = run(args.output, args.seed, settings, args.eval_questions)
    print(json.dumps({name: log[name] for name in ("steps", "tokens", "wall_s", "held_out")}))


if __name__ == "__main__":
    main()
