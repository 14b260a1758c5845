"""`flexjax generate`: answers prompts."""

from __future__ import annotations

import dataclasses
import queue
import sys
import time
from typing import Any

from flexjax.cli.common import (
    Base,
    bucket_fields,
    encode_prompt,
    find_base,
    make_console,
    print_json,
    read_prompts,
    running,
    sampling_fields,
    start_engine,
)
from flexjax.cli.options import GenerateOptions
from flexjax.config import EngineConfig, SamplingParams
from flexjax.engine.engine import Engine
from flexjax.engine.output import RequestOutput
from flexjax.io.peft_adapter import load_peft_adapter
from flexjax.request import GenerationOutput

_ADAPTER = "adapter"


def run(options: GenerateOptions) -> None:
    """Runs the command."""
    params = SamplingParams(
        **sampling_fields(options),
        max_tokens=options.max_tokens,
        repetition_penalty=options.repetition_penalty,
        presence_penalty=options.presence_penalty,
        frequency_penalty=options.frequency_penalty,
        seed=options.seed,
        stop=options.stop or (),
        ignore_eos=options.ignore_eos,
        logprobs=options.logprobs,
    )
    prompts = read_prompts(options)
    if not prompts:
        raise ValueError("`--prompt` or `--prompt-file` must give a prompt; got none.")
    base = find_base(options)
    encoded = [encode_prompt(base.tokenizer, prompt, is_chat=options.chat) for prompt in prompts]
    config = _engine_config(options, base, len(prompts))
    engine = start_engine(base, config, make_console(is_json=True))
    if options.adapter is not None:
        engine.load_adapter(_ADAPTER, options.adapter)
    adapter = _ADAPTER if options.adapter is not None else None
    outputs = [engine.add_request(tokens, params, adapter=adapter) for tokens in encoded]
    with running():
        for prompt, output in zip(prompts, outputs, strict=True):
            if options.json:
                _finish(engine, output)
                print_json(as_json(output.result()))
            else:
                _print_answer(engine, prompt, output)


def _engine_config(options: GenerateOptions, base: Base, num_prompts: int) -> EngineConfig:
    """An engine that only serves, of few sizes, so that most calls find their programs cached."""
    rank = EngineConfig.max_lora_rank
    if options.adapter is not None:
        rank = max(rank, load_peft_adapter(options.adapter, base.config).config.r)
    return EngineConfig(
        dtype=options.dtype,
        max_context_len=options.max_context_len,
        max_jobs=0,
        max_adapters=1,
        max_lora_rank=rank,
        **bucket_fields(max_running=1 if num_prompts == 1 else EngineConfig.max_running, chunk=128),
    )


def _step(engine: Engine) -> None:
    if not engine.step():
        time.sleep(0.001)


def _finish(engine: Engine, output: RequestOutput) -> None:
    while not output.finished.is_set():
        _step(engine)


def _print_answer(engine: Engine, prompt: str, output: RequestOutput) -> None:
    """Prints a prompt and its answer while it is generated; the others go on meanwhile."""
    sys.stdout.write(f"> {prompt}\n")
    while True:
        try:
            piece = output.next_piece()
        except queue.Empty:
            sys.stdout.flush()
            _step(engine)
            continue
        if isinstance(piece, BaseException):
            raise piece
        sys.stdout.write(piece.text)
        if piece.finish_reason is not None:
            break
    sys.stdout.write("\n\n")
    sys.stdout.flush()


def as_json(output: GenerationOutput) -> dict[str, Any]:
    """The fields of an output, for JSON; `usage` with the total."""
    fields = dataclasses.asdict(output)
    fields["usage"]["total_tokens"] = output.usage.total_tokens
    return fields
