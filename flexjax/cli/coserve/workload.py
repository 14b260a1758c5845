"""Which requests a co-serving run gets, and when."""

from __future__ import annotations

import dataclasses
import itertools

from flexjax.axes import PADDING
from flexjax.cli.common import Base, encode_prompt, plural, read_prompts, sampling_fields
from flexjax.cli.options import COSERVE_MAX_TOKENS, CoserveOptions
from flexjax.config import SamplingParams
from flexjax.data import demo_prompts
from flexjax.errors import CapacityError
from flexjax.io.dataset import Dataset, TokenizedRow
from flexjax.io.tokenizer import Tokenizer
from flexjax.workload import (
    Arrival,
    load_trace,
    poisson_arrivals,
    rebase,
    scale_lengths,
)

_NUM_COMPARED = 6
_MAX_SEED = 2**31


@dataclasses.dataclass(frozen=True)
class PromptText:
    """A prompt for the engine and for people."""

    text: str
    token_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PlannedRequest:
    """One request before it arrives.

    Attributes:
      arrival_s: Seconds after the start of the run.
      prompt: What is asked.
      params: How it is answered.
    """

    arrival_s: float
    prompt: PromptText
    params: SamplingParams


@dataclasses.dataclass(frozen=True)
class Workload:
    """All requests of a run.

    Attributes:
      requests: In order of arrival.
      compared: Prompts to answer before and after finetuning.
      notes: How arrivals and lengths came about, for people to read.
    """

    requests: tuple[PlannedRequest, ...]
    compared: tuple[PromptText, ...]
    notes: tuple[str, ...]


def plan_workload(
    options: CoserveOptions, base: Base, dataset: Dataset, context: int, *, is_demo: bool
) -> Workload:
    """Plans every request of a run.

    Args:
      options: What the user asked for.
      base: The model.
      dataset: Finetuning rows, whose prompts are asked where the user gave none.
      context: Tokens of the longest sequence.
      is_demo: Whether the embedded model is finetuned on its demo.

    Raises:
      CapacityError: If a prompt cannot fit.
      ValueError: If an option is out of range, or a file cannot be used.
    """
    if options.num_requests < 1:
        raise ValueError(f"`--num-requests` must be at least 1; got {options.num_requests}.")
    max_tokens = COSERVE_MAX_TOKENS if options.max_tokens is None else options.max_tokens
    params = SamplingParams(**sampling_fields(options), max_tokens=max_tokens)
    prompts = _prompts(options, base, dataset, context, max_tokens, is_demo=is_demo)
    arrivals, notes = _arrivals(options, context)
    requests = tuple(
        _request(index, arrival, prompts, params, base.tokenizer, options.seed)
        for index, arrival in enumerate(arrivals)
    )
    return Workload(requests, tuple(prompts[:_NUM_COMPARED]), notes)


def _request(
    index: int,
    arrival: Arrival,
    prompts: list[PromptText],
    params: SamplingParams,
    tokenizer: Tokenizer,
    seed: int,
) -> PlannedRequest:
    prompt = prompts[index % len(prompts)]
    params = dataclasses.replace(params, seed=(seed + index) % _MAX_SEED)
    if arrival.prompt_tokens is not None:
        prompt = _prompt_of_length(index, arrival.prompt_tokens, prompts, tokenizer)
    if arrival.output_tokens is not None:
        params = dataclasses.replace(params, max_tokens=arrival.output_tokens, ignore_eos=True)
    return PlannedRequest(arrival.arrival_s, prompt, params)


def _prompt_of_length(
    index: int, length: int, prompts: list[PromptText], tokenizer: Tokenizer
) -> PromptText:
    """Joins the prompts from the index-th on and takes the first `length` tokens."""
    turned = itertools.islice(itertools.cycle(prompts), index % len(prompts), None)
    tokens = itertools.chain.from_iterable(prompt.token_ids for prompt in turned)
    taken = tuple(itertools.islice(tokens, length))
    return PromptText(tokenizer.decode(taken), taken)


def _arrivals(options: CoserveOptions, context: int) -> tuple[list[Arrival], tuple[str, ...]]:
    if options.trace is None:
        arrivals = poisson_arrivals(options.rate, options.num_requests, options.seed)
        return arrivals, (f"Poisson arrivals, {options.rate:g} a second.",)
    arrivals = rebase(load_trace(options.trace, options.num_requests), options.time_scale)
    notes = [
        f"Trace {options.trace.name}: {plural(len(arrivals), 'request')} in "
        f"{arrivals[-1].arrival_s:.1f} s, times multiplied by {options.time_scale:g}."
    ]
    if arrivals[0].prompt_tokens is not None:
        arrivals, note = _fit(arrivals, options, context)
        notes.append(note)
    return arrivals, tuple(notes)


def _fit(
    arrivals: list[Arrival], options: CoserveOptions, context: int
) -> tuple[list[Arrival], str]:
    """Scales a trace's lengths so that the longest prompt and the longest output fit together."""
    longest_output = max(arrival.output_tokens or 1 for arrival in arrivals)
    longest_prompt = max(arrival.prompt_tokens or 1 for arrival in arrivals)
    max_output = options.max_tokens or min(longest_output, max(1, context // 4))
    max_prompt = options.trace_prompt_tokens
    max_prompt = max(1, context - max_output) if max_prompt is None else max_prompt
    if max_prompt + max_output > context:
        raise CapacityError(
            "`--trace-prompt-tokens` and `--max-tokens` must fit the context together, "
            f"{context} tokens; got {max_prompt} and {max_output}."
        )
    scaled, scale = scale_lengths(
        arrivals, max_prompt_tokens=max_prompt, max_output_tokens=max_output
    )
    return scaled, (
        f"Lengths scaled to the context of {context} tokens, none cut: prompts by "
        f"{scale.prompt:.3f} (longest {longest_prompt:,} -> "
        f"{max(a.prompt_tokens or 0 for a in scaled)}), outputs by {scale.output:.3f} (longest "
        f"{longest_output:,} -> {max(a.output_tokens or 0 for a in scaled)})."
    )


def _prompts(
    options: CoserveOptions,
    base: Base,
    dataset: Dataset,
    context: int,
    max_tokens: int,
    *,
    is_demo: bool,
) -> list[PromptText]:
    """What is asked: the user's prompts, the demo's, or those of the dataset."""
    texts = read_prompts(options)
    if not texts and not is_demo:
        return _dataset_prompts(dataset, base.tokenizer, context - max_tokens)
    is_chat = base.tokenizer.has_chat_template if options.chat is None else options.chat
    prompts = []
    for text in texts or demo_prompts():
        tokens = encode_prompt(base.tokenizer, text, is_chat=is_chat)
        if len(tokens) >= context:
            raise CapacityError(
                f"`--prompt` must be shorter than the context, {context} tokens; got "
                f"{len(tokens)}: {text[:40]!r}..."
            )
        prompts.append(PromptText(text, tuple(tokens)))
    return prompts


def _dataset_prompts(dataset: Dataset, tokenizer: Tokenizer, longest: int) -> list[PromptText]:
    """The part of each row that comes before its first target, exactly as it is trained on."""
    found: dict[tuple[int, ...], None] = {}
    for row in dataset.rows:
        tokens = _before_targets(row)
        if len(tokens) <= longest:
            found[tokens] = None
    if not found:
        raise CapacityError(
            f"`--data` holds no prompt of at most {longest} tokens, which leave room for the "
            "answer; give prompts, a longer context, or fewer `--max-tokens`."
        )
    return [PromptText(tokenizer.decode(tokens).strip(), tokens) for tokens in found]


def _before_targets(row: TokenizedRow) -> tuple[int, ...]:
    """Tokens before the first one that bears loss; half the row where that is the second."""
    first = next(index for index, target in enumerate(row.targets) if target != PADDING)
    count = first + 1 if first > 0 else max(1, len(row.tokens) // 2)
    return tuple(int(token) for token in row.tokens[:count])
