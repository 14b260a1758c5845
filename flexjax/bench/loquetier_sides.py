"""FlexJAX and PEFT with the same weights, adapters, prompts, samples and hyper-parameters.

Owns what makes the two comparable, the check that they compute the same thing, and one run of
either; which runs there are is `loquetier`'s. Needs torch.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexjax.bench.peft_model import FORMS, PeftJob, PeftModel
from flexjax.bench.peft_serving import PeftRequest, serve
from flexjax.bench.serving import run_workload
from flexjax.bench.side_by_side import check_losses, check_tokens
from flexjax.config import EngineConfig, FinetuneConfig, LoraConfig, SamplingParams
from flexjax.data import demo_dataset, tiny_model_dir
from flexjax.engine.engine import Engine
from flexjax.io.dataset import TokenizedRow, load_dataset
from flexjax.io.peft_adapter import LoraAdapter, save_peft_adapter
from flexjax.io.tokenizer import Tokenizer
from flexjax.lora.bank import init_lora
from flexjax.metrics import RunRecord
from flexjax.model_config import ModelConfig, load_model_config
from flexjax.workload import Arrival, Workload

LORA = LoraConfig(r=8, alpha=16.0)
"""Loquetier's adapters, on all linears."""
LEARNING_RATE = 2e-5
MICRO_BATCH = 2
"""Loquetier's samples a pass, of four passes a batch."""

_B_SCALE = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class SideSizes:
    """What both sides work on.

    Attributes:
      engine: FlexJAX's sizes; `max_running` is also the peer's largest batch.
      num_adapters: Adapters that are served, and as many others that are trained.
      prompt_tokens: Shortest and longest prompt.
      output_tokens: Fewest and most tokens that are generated.
      data: JSON lines to train on; None for those that come with the package.
      num_samples: Rows that are taken, from the first, and over again once they are used up.
      max_seq_len: Longest sample; longer ones are left out.
      batch_size: Samples of an optimizer step.
      seed: Seed of the adapters.

    Raises:
      ValueError: If a number is out of range, or the engine has no place for the adapters or jobs.
    """

    engine: EngineConfig
    num_adapters: int
    prompt_tokens: tuple[int, int] = (24, 72)
    output_tokens: tuple[int, int] = (16, 48)
    data: str | Path | None = None
    num_samples: int = 128
    max_seq_len: int = 256
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_adapters", "batch_size"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("prompt_tokens", "output_tokens"):
            low, high = getattr(self, name)
            require(1 <= low <= high, name, "two numbers >= 1 in order", (low, high))
        rule = f"a multiple of `batch_size`={self.batch_size}"
        is_right = self.num_samples >= 1 and self.num_samples % self.batch_size == 0
        require(is_right, "num_samples", rule, self.num_samples)
        slots, jobs = self.engine.max_adapters, self.engine.max_jobs
        rule = f"at least {2 * self.num_adapters}, for as many served as trained"
        require(slots >= 2 * self.num_adapters, "engine.max_adapters", rule, slots)
        rule = f"at least {self.num_adapters}"
        require(jobs >= self.num_adapters, "engine.max_jobs", rule, jobs)


def require(is_right: bool, name: str, rule: str, value: object) -> None:
    """Raises unless a field keeps its rule.

    Raises:
      ValueError: If it does not.
    """
    if not is_right:
        raise ValueError(f"`{name}` must be {rule}; got {value!r}.")


class Sides:
    """Both sides, loaded from the same files.

    Attributes:
      sizes: What they work on.
      engine: FlexJAX.
      peer: PEFT.
      rows: Samples as tokens, as many as fill whole batches.
      micro_batch: Samples of the peer's training pass; divides the batch.
      start_s: Seconds that the engine took to start, compilation included.
    """

    def __init__(self, sizes: SideSizes, work_dir: str | Path):
        model_dir = tiny_model_dir()
        self.sizes = sizes
        self.model = load_model_config(model_dir)
        self._raw, self.rows = _samples(sizes, model_dir, self.model)
        numbers = range(sizes.num_adapters)
        names = [*map(served, numbers), *map(trained, numbers)]
        self._paths = {name: Path(work_dir) / name for name in names}
        for number, path in enumerate(self._paths.values()):
            _write_adapter(path, self.model, sizes.seed + number)
        begin_s = time.perf_counter()
        self.engine = Engine.from_pretrained(model_dir, sizes.engine)
        self.start_s = time.perf_counter() - begin_s
        for name in map(served, numbers):
            self.engine.load_adapter(name, self._paths[name])
        self.peer = PeftModel(model_dir, self._paths)
        self.micro_batch = sizes.batch_size

    # Work.

    def job_configs(self, count: int) -> list[FinetuneConfig]:
        """Jobs of the first `count` adapters in training."""
        return [
            FinetuneConfig(
                adapter=trained(number),
                init_adapter=self._paths[trained(number)],
                dataset=self._raw,
                batch_size=self.sizes.batch_size,
                learning_rate=LEARNING_RATE,
                schedule="constant",
                warmup_ratio=0.0,
                max_seq_len=self.sizes.max_seq_len,
                shuffle=False,
            )
            for number in range(count)
        ]

    def peer_jobs(self, count: int) -> list[PeftJob]:
        """The same of the peer, from the adapters' initial values."""
        jobs = []
        for config in self.job_configs(count):
            self.peer.reset(config.adapter, self._paths[config.adapter])
            jobs.append(PeftJob(self.peer, config, self.rows, self.micro_batch))
        return jobs

    def run_flexjax(
        self, workload: Workload | None, jobs: int, seed: int, **options: Any
    ) -> RunRecord:
        """Runs FlexJAX; `options` as for `run_workload`."""
        policy = "co_serve" if jobs and workload else "finetune_only" if jobs else "inference_only"
        configs = self.job_configs(jobs)
        return run_workload(
            self.engine, workload, policy=policy, jobs=configs, seed=seed, **options
        )

    def run_peer(
        self,
        workload: Workload | None,
        jobs: int,
        seed: int,
        *,
        form: str,
        header: Mapping[str, Any],
        rate: float | None = None,
        **options: Any,
    ) -> RunRecord:
        """Runs the peer with the prompts that FlexJAX gets; `options` as for `serve`."""
        fields = {**header, "policy": "peft", "rate": rate, "seed": seed}
        fields["workload"] = workload.name if workload else "none"
        requests = [
            PeftRequest(arrival, draw_prompt(self.model, arrival, seed, index))
            for index, arrival in enumerate(workload.arrivals if workload else ())
        ]
        return serve(
            self.peer,
            requests,
            form=form,
            max_batch=self.sizes.engine.max_running,
            jobs=self.peer_jobs(jobs),
            header=fields,
            **options,
        )

    # Checks.

    def check(self, *, num_prompts: int = 4, num_batches: int = 3) -> None:
        """Checks that both sides generate the same tokens, and train with the same losses.

        Raises:
          AssertionError: If they do not.
        """
        least, most = self.sizes.prompt_tokens
        draws = np.random.default_rng(self.sizes.seed)
        lengths = np.linspace(*self.sizes.output_tokens, num_prompts).astype(int).tolist()
        prompts = [
            draws.integers(0, self.model.vocab_size, size).tolist()
            for size in draws.integers(least, most + 1, num_prompts)
        ]
        ours = {}
        for name in map(served, range(self.sizes.num_adapters)):
            ours[name] = self.flexjax_tokens(prompts, lengths, name)
            for form in FORMS:
                theirs = self.peer_tokens(prompts, lengths, [name] * num_prompts, form)
                check_tokens(ours[name], theirs)
        turns = [name for name, _ in zip(itertools.cycle(ours), prompts, strict=False)]
        mixed = self.peer_tokens(prompts, lengths, turns, "mixed")
        check_tokens([ours[name][row] for row, name in enumerate(turns)], mixed)
        check_losses(self.flexjax_losses(num_batches), self.peer_losses(num_batches))

    def flexjax_tokens(
        self, prompts: Sequence[Sequence[int]], lengths: Sequence[int], adapter: str
    ) -> list[list[int]]:
        """Greedy tokens of FlexJAX."""
        outputs = [
            self.engine.add_request(
                list(prompt), SamplingParams(max_tokens=length, ignore_eos=True), adapter=adapter
            )
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        while self.engine.step():
            pass
        return [list(output.result().token_ids) for output in outputs]

    def peer_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        lengths: Sequence[int],
        adapters: Sequence[str],
        form: str,
    ) -> list[list[int]]:
        """Greedy tokens of the peer."""
        tokens: list[list[int]] = [[] for _ in prompts]
        for found in self.peer.generate(prompts, lengths, adapters, form):
            for row, token in zip(found.rows, found.tokens, strict=True):
                tokens[row].append(token)
        return tokens

    def flexjax_losses(self, num_batches: int) -> list[float]:
        """Losses of FlexJAX's first batches."""
        config = dataclasses.replace(self.job_configs(1)[0], max_steps=num_batches)
        job = self.engine.finetune(config)
        job.wait()
        self.engine.unload_adapter(config.adapter)
        return job.metrics().losses

    def peer_losses(self, num_batches: int) -> list[float]:
        """Losses of the peer's first batches."""
        job = self.peer_jobs(1)[0]
        while len(job.records) < num_batches:
            job.run_pass()
        return [record.loss for record in job.records]


def served(number: int) -> str:
    """Name of an adapter that answers."""
    return f"served-{number}"


def trained(number: int) -> str:
    """Name of an adapter in training."""
    return f"trained-{number}"


def draw_prompt(model: ModelConfig, arrival: Arrival, seed: int, index: int) -> list[int]:
    """The prompt that `run_workload` draws for request `index` of a workload."""
    draws = np.random.default_rng([seed, index])
    return draws.integers(0, model.vocab_size, arrival.prompt_tokens).tolist()


def _samples(
    sizes: SideSizes, model_dir: Path, model: ModelConfig
) -> tuple[list[dict[str, Any]], list[TokenizedRow]]:
    """The first rows that are short enough, as they are and as tokens; they fill whole batches."""
    path = demo_dataset() if sizes.data is None else Path(sizes.data)
    tokenizer = Tokenizer.from_pretrained(model_dir)
    limits: dict[str, Any] = {"max_seq_len": sizes.max_seq_len, "vocab_size": model.vocab_size}
    load_dataset(path, tokenizer, overlong="drop", **limits)  # names file and line of a bad row
    lines = path.read_text(encoding="utf-8").splitlines()
    raw = [json.loads(line) for line in lines if line.strip()]
    found = load_dataset(raw, tokenizer, overlong="drop", **limits).rows[: sizes.num_samples]
    rows = found[: len(found) - len(found) % sizes.batch_size]
    rule = f"`batch_size`={sizes.batch_size} rows of at most {sizes.max_seq_len} tokens"
    require(bool(rows), "data", f"a file with {rule}", len(found))
    numbers = [int(row.source.removeprefix("row ")) for row in rows]
    return [raw[number - 1] for number in numbers], list(rows)


def _write_adapter(path: Path, model: ModelConfig, seed: int) -> None:
    """Writes a random adapter that changes what the model says."""
    arrays = init_lora(model, LORA, seed)
    draws = np.random.default_rng([seed, 1])
    for matrices in arrays.values():
        matrices["B"] = draws.normal(0, _B_SCALE, matrices["B"].shape).astype(np.float32)
    save_peft_adapter(path, LoraAdapter(LORA, arrays), model)
