"""What the commands share: checking input before an engine starts, and starting one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from flexjax.builtin_models import BUILTIN_MODELS
from flexjax.cli.main import RunError
from flexjax.cli.options import ModelOptions, PromptOptions, SamplingOptions, TrainingOptions
from flexjax.config import EngineConfig, FinetuneConfig, LoraConfig
from flexjax.data import tiny_model_dir
from flexjax.engine.engine import Engine
from flexjax.engine.sizing import Sizing
from flexjax.errors import ModelNotFoundError
from flexjax.io.dataset import Dataset, load_dataset
from flexjax.io.peft_adapter import load_peft_adapter
from flexjax.io.tokenizer import Tokenizer
from flexjax.model_config import ModelConfig, load_model_config


@dataclasses.dataclass(frozen=True)
class Base:
    """The model that a command works on, as far as it is known before its weights are read.

    Attributes:
      source: Directory or name, for `Engine.from_pretrained`.
      config: Architecture.
      tokenizer: Its tokenizer.
    """

    source: str
    config: ModelConfig
    tokenizer: Tokenizer

    @property
    def is_embedded(self) -> bool:
        """Whether this is the model that comes with the package."""
        return Path(self.source).resolve() == tiny_model_dir().resolve()


def find_base(options: ModelOptions) -> Base:
    """Reads configuration and tokenizer of the model that the options name.

    Raises:
      ModelNotFoundError: If there is no such model.
      ValueError: If it has no tokenizer, or a file is damaged.
    """
    source = str(tiny_model_dir()) if options.model is None else options.model
    names = ", ".join(BUILTIN_MODELS)
    if not Path(source).is_dir():
        if source in BUILTIN_MODELS:
            raise ValueError(
                f"`--model {source}` is an architecture with random weights and no tokenizer: it "
                "cannot read text. Give a model directory, or leave `--model` out for the model "
                "that comes with FlexJAX."
            )
        raise ModelNotFoundError(
            f"`--model` must be a directory, or one of {names}; got {source!r}."
        )
    return Base(source, load_model_config(source), Tokenizer.from_pretrained(source))


def context_len(base: Base, config: EngineConfig) -> int:
    """Tokens of the longest sequence; checks the engine's configuration on the way."""
    return Sizing.derive(base.config, config, jax.default_backend()).max_context_len


def read_prompts(options: PromptOptions) -> list[str]:
    """Prompts of the command line and of the prompt file, in this order.

    Raises:
      FileNotFoundError: If the file does not exist.
      ValueError: If a prompt is empty, or the file is not UTF-8 or holds none.
    """
    prompts = list(options.prompt or [])
    for number, prompt in enumerate(prompts, start=1):
        if not prompt:
            raise ValueError(f"`--prompt` must not be empty; prompt {number} is.")
    if options.prompt_file is not None:
        path = options.prompt_file
        if not path.is_file():
            raise FileNotFoundError(f"`--prompt-file` must be a file; got {str(path)!r}.")
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"`--prompt-file` {str(path)!r} is not UTF-8: {error}.") from error
        found = [line.removesuffix("\r") for line in lines if line.strip()]
        if not found:
            raise ValueError(f"`--prompt-file` {str(path)!r} holds no prompt.")
        prompts += found
    return prompts


def encode_prompt(tokenizer: Tokenizer, prompt: str, *, is_chat: bool) -> list[int]:
    """Token ids of a prompt, as it is or as a user's turn.

    Raises:
      ValueError: If the model has no chat template, or the prompt no token.
    """
    if is_chat and not tokenizer.has_chat_template:
        raise ValueError("`--chat` needs a chat template, and this model has none; use `--raw`.")
    if is_chat:
        message = {"role": "user", "content": prompt}
        return tokenizer.encode_chat([message], add_generation_prompt=True)
    return tokenizer.encode(prompt)


def sampling_fields(options: SamplingOptions) -> dict[str, Any]:
    """The fields of `SamplingParams` that every command has."""
    fields = dataclasses.fields(SamplingOptions)
    return {field.name: getattr(options, field.name) for field in fields}


def bucket_fields(*, max_running: int, chunk: int) -> dict[str, Any]:
    """The fields of `EngineConfig` that decide how much is compiled.

    On a CPU, where compilation takes longer than rows of padding cost, one size of each kind is
    compiled instead of a ladder.

    Args:
      max_running: Requests that run at once.
      chunk: Prefill and finetuning-forward rows of a step on a CPU.
    """
    fields: dict[str, Any] = {"max_running": max_running}
    if jax.default_backend() == "cpu":
        fields |= {"decode_buckets": (max_running,), "chunk_buckets": (chunk,)}
    return fields


def engine_fields(options: TrainingOptions) -> dict[str, Any]:
    """The fields of `EngineConfig` that the finetuning options decide."""
    fields: dict[str, Any] = {
        "max_jobs": 1,
        "saved_activations": options.saved_activations,
        "tile_order": options.tile_order,
        "tile_layers": options.tile_layers,
    }
    if options.window is not None:
        fields["window_buckets"] = (options.window,)
    return fields


def lora_config(options: TrainingOptions, base: Base) -> LoraConfig:
    """Shape of the adapter to train: the initial adapter's, or what the options say.

    Raises:
      AdapterFormatError: If the initial adapter cannot be used with this base.
      ValueError: If an option is out of range.
    """
    if options.init_adapter is not None:
        return load_peft_adapter(options.init_adapter, base.config).config
    modules = options.target_modules or ["all-linear"]
    return LoraConfig(
        r=options.rank,
        alpha=options.alpha,
        target_modules=modules[0] if modules == ["all-linear"] else modules,
        use_rslora=options.rslora,
    )


def finetune_config(
    options: TrainingOptions,
    lora: LoraConfig,
    *,
    data: Path,
    epochs: int,
    seed: int,
) -> FinetuneConfig:
    """The job that the options describe.

    Raises:
      ValueError: If an option is out of range.
    """
    return FinetuneConfig(
        adapter=options.adapter_name,
        dataset=data,
        lora=lora,
        init_adapter=options.init_adapter,
        epochs=epochs,
        max_steps=options.max_steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        schedule=options.schedule,
        warmup_ratio=options.warmup_ratio,
        max_grad_norm=None if options.max_grad_norm == 0 else options.max_grad_norm,
        weight_decay=options.weight_decay,
        max_seq_len=options.max_seq_len,
        overlong=options.overlong,
        window=options.window,
        shuffle=options.shuffle,
        drop_last=options.drop_last,
        seed=seed,
        eval_dataset=options.eval_data,
        eval_every=options.eval_every,
    )


def check_data(config: FinetuneConfig, base: Base, context: int) -> Dataset:
    """Reads the job's data as the engine will, so that mistakes show before it starts.

    Raises:
      DatasetError: If a row cannot be used; the message names file and line.
    """

    def load(source: Any) -> Dataset:
        return load_dataset(
            source,
            base.tokenizer,
            max_seq_len=config.max_seq_len or context,
            overlong=config.overlong,
            vocab_size=base.config.vocab_size,
        )

    if config.eval_dataset is not None:
        load(config.eval_dataset)
    return load(config.dataset)


def start_engine(base: Base, config: EngineConfig, console: Console) -> Engine:
    """Starts an engine; shows how compilation goes where someone watches."""
    began_s = time.perf_counter()
    columns = (TextColumn("[progress.description]{task.description}"), BarColumn())
    is_shown = console.is_terminal
    with Progress(
        *columns, MofNCompleteColumn(), console=console, transient=True, disable=not is_shown
    ) as bar:
        task = bar.add_task("compiling", total=None)
        engine = Engine.from_pretrained(
            base.source,
            config,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    console.print(
        f"Engine ready in {time.perf_counter() - began_s:.1f} s: {engine.num_programs} programs, "
        f"{engine.compile_s:.1f} s of it compilation, {device_name()}.",
        highlight=False,
    )
    return engine


def device_name() -> str:
    """The device that jax computes on, for people to read."""
    device = jax.devices()[0]
    return "CPU" if device.platform == "cpu" else f"{device.platform} {device.device_kind}"


def make_console(*, is_json: bool) -> Console:
    """Where messages for people go: standard error when standard output carries JSON."""
    return Console(stderr=is_json, quiet=is_json and not sys.stderr.isatty())


def print_json(value: Any) -> None:
    """Prints one JSON object on a line of its own, at once."""
    print(json.dumps(value, allow_nan=False), flush=True)


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Marks the part of a command where errors are no longer the user's."""
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError):
            raise
        raise RunError(str(error)) from error


def check_output(path: Path, marker: str, *, can_replace: bool) -> None:
    """Checks that an output directory can be written before anything is computed for it.

    Args:
      path: The directory.
      marker: File that shows that the directory is an earlier output of this command.
      can_replace: Whether an earlier output may be replaced.

    Raises:
      ValueError: If `path` is a file, or holds something that must stay.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"`--output` must be a directory; {str(path)!r} is a file.")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not (path / marker).is_file():
        raise ValueError(
            f"`--output` {str(path)!r} is not empty, and holds other files than an earlier output."
        )
    if not can_replace:
        raise ValueError(
            f"`--output` {str(path)!r} is not empty; give another directory, or `--overwrite`."
        )


def plural(count: int, noun: str) -> str:
    """'1 row', '2 rows'."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def shorten(text: str, width: int) -> str:
    """One line of at most `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


def distinct(texts: Sequence[str]) -> list[str]:
    """The texts without repetitions, in order."""
    return list(dict.fromkeys(texts))
