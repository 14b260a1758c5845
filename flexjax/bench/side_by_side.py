"""FlexJAX and transformers/PEFT at the same work, timed in turns in one process.

Each part first checks that both sides compute the same thing (logits, greedy tokens, losses), then
measures them alternately. Compilation and first runs are outside of every measurement. Needs torch.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from flexjax.bench.bound import Bound, Kernels, Passes, PassTime, part_work
from flexjax.bench.harness import (
    Cost,
    Timing,
    alternate,
    measure,
    now,
    ratio_of_medians,
    timings,
)
from flexjax.bench.model import random_tokens, text_rows, write_model
from flexjax.bench.torch_peer import TorchPeer, TrainedSteps
from flexjax.config import EngineConfig, FinetuneConfig, LoraConfig, SamplingParams
from flexjax.engine.engine import Engine
from flexjax.engine.job import Job
from flexjax.io.hf_weights import load_weights
from flexjax.io.peft_adapter import LoraAdapter, save_peft_adapter
from flexjax.lora.bank import init_lora
from flexjax.models.decoder import decoder_logits

_LORA = LoraConfig(r=16, alpha=32.0, target_modules="all-linear")
_LEARNING_RATE = 2e-4
_MAX_GRAD_NORM = 1.0
_LOGIT_TOLERANCE = 2e-4
_LOSS_TOLERANCE = 1e-3
_CACHES = (None, "static")

TARGETS = {"finetune": 1.3, "generate 1": 1.8, "generate 8": 2.5, "coserve": 1.5}
"""How many times faster than the peers each part is meant to be."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of the comparison.

    Attributes:
      model: Name of the architecture in `bench.model.MODELS`.
      engine: Configuration of FlexJAX's engine.
      sample_len: Tokens of a finetuning sample.
      batch_size: Samples per optimizer step.
      finetune_steps: Measured optimizer steps of a run, after one that is not measured.
      prompt_len: Tokens of a prompt.
      output_len: Tokens generated for each.
      group: Requests at once; the peer's batch size.
      coserve_requests: Requests of the co-serving part.
      coserve_steps: Optimizer steps of the co-serving part.
      num_threads: torch's threads.
      seed: Seed of weights and data.
    """

    model: str
    engine: EngineConfig
    sample_len: int
    batch_size: int
    finetune_steps: int
    prompt_len: int
    output_len: int
    group: int
    coserve_requests: int
    coserve_steps: int
    num_threads: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One measured ratio.

    Attributes:
      name: Part, a key of `TARGETS`.
      work: Tokens that a run processes (trained, or generated).
      peer: Costs of the peer's runs.
      flexjax: Costs of FlexJAX's runs.
      notes: What else is worth recording.
    """

    name: str
    work: int
    peer: Sequence[Cost]
    flexjax: Sequence[Cost]
    notes: dict

    @property
    def wall(self) -> tuple[Timing, Timing]:
        """Wall-clock seconds of the peer and of FlexJAX."""
        return timings(self.name, self.peer)[0], timings(self.name, self.flexjax)[0]

    @property
    def ratio(self) -> float:
        """How many times faster FlexJAX is: medians of wall-clock time."""
        return ratio_of_medians(*self.wall)

    @property
    def cpu_ratio(self) -> float:
        """How many times less CPU time FlexJAX takes: medians."""
        return ratio_of_medians(
            timings(self.name, self.peer)[1], timings(self.name, self.flexjax)[1]
        )

    def records(self) -> list[dict]:
        """JSON records: all timings with every sample, then the ratios."""
        records = []
        for side, costs in (("peer", self.peer), ("flexjax", self.flexjax)):
            for timing in timings(self.name, costs):
                records.append(timing.record(part=self.name, side=side, work_tokens=self.work))
        peer, flexjax = self.wall
        ratio = {
            "kind": "ratio",
            "part": self.name,
            "ratio": self.ratio,
            "cpu_ratio": self.cpu_ratio,
            "target": TARGETS[self.name],
            "peer_tokens_per_s": self.work / peer.median,
            "flexjax_tokens_per_s": self.work / flexjax.median,
        }
        return [*records, {**ratio, **self.notes}]


class SideBySide:
    """Both sides, loaded from the same files.

    Attributes:
      settings: Sizes.
      start_s: Seconds that the engine took to start, compilation included; 0 until it is used.
      max_logit_error: Largest difference between the two sides' logits.
    """

    def __init__(self, settings: Settings, work_dir: str | Path):
        model_dir, adapter_dir = Path(work_dir) / "model", Path(work_dir) / "adapter"
        self.settings = settings
        self._model = write_model(model_dir, settings.model, settings.seed)
        arrays = init_lora(self._model, _LORA, settings.seed)
        save_peft_adapter(adapter_dir, LoraAdapter(_LORA, arrays), self._model)
        self._adapter_dir = adapter_dir
        self._peer = TorchPeer(model_dir, adapter_dir, settings.num_threads)
        self.max_logit_error = self._check_logits(model_dir)
        self.start_s = 0.0
        self._model_dir = model_dir
        self._num_jobs = 0

    @functools.cached_property
    def engine(self) -> Engine:
        """FlexJAX; starts at first use."""
        started = time.perf_counter()
        engine = Engine.from_pretrained(self._model_dir, self.settings.engine)
        self.start_s = time.perf_counter() - started
        return engine

    def _check_logits(self, model_dir: Path) -> float:
        tokens = random_tokens(self._model, 2, self.settings.prompt_len, self.settings.seed + 1)
        weights = load_weights(model_dir, self._model, "float32")
        ours = np.asarray(decoder_logits(self._model, weights, jnp.asarray(tokens)))
        error = float(np.abs(ours - self._peer.logits(tokens)).max())
        if not error < _LOGIT_TOLERANCE:
            raise AssertionError(f"Logits differ by {error}.")
        return error

    # Work.

    def _generate(self, prompts: np.ndarray) -> list[list[int]]:
        params = SamplingParams(max_tokens=self.settings.output_len, ignore_eos=True)
        outputs = self.engine.generate([row.tolist() for row in prompts], params)
        return [list(output.token_ids) for output in outputs]

    def _prompts(self, count: int) -> np.ndarray:
        return random_tokens(self._model, count, self.settings.prompt_len, self.settings.seed + 2)

    def _samples(self, steps: int) -> np.ndarray:
        sizes = self.settings
        return random_tokens(
            self._model, steps * sizes.batch_size, sizes.sample_len, sizes.seed + 3
        )

    def _start_job(self, steps: int) -> Job:
        self._num_jobs += 1
        return self.engine.finetune(
            FinetuneConfig(
                adapter=f"bench-{self._num_jobs}",
                dataset=text_rows(self._samples(steps)),
                init_adapter=self._adapter_dir,
                max_steps=steps,
                batch_size=self.settings.batch_size,
                learning_rate=_LEARNING_RATE,
                schedule="constant",
                warmup_ratio=0.0,
                max_grad_norm=_MAX_GRAD_NORM,
                shuffle=False,
            )
        )

    def _finetune(self, steps: int) -> TrainedSteps:
        job = self._start_job(steps)
        marks = [now()]
        while len(marks) <= steps:
            if not self.engine.step():
                raise AssertionError(f"The job is {job.status} after {len(marks) - 1} steps.")
            if len(job.metrics().steps) == len(marks):
                marks.append(now())
        job.wait()
        self.engine.unload_adapter(job.config.adapter)
        return TrainedSteps(tuple(job.metrics().losses), tuple(marks))

    def _peer_finetune(self, steps: int, micro_batch: int) -> TrainedSteps:
        return self._peer.finetune(
            self._samples(steps),
            steps=steps,
            batch_size=self.settings.batch_size,
            micro_batch=micro_batch,
            learning_rate=_LEARNING_RATE,
            max_grad_norm=_MAX_GRAD_NORM,
        )

    # Choices of the peer.

    def _best_micro_batch(self) -> int:
        sizes = (self.settings.batch_size, 1)
        costs = {n: self._peer_finetune(2, n).cost(first=1) for n in sizes}
        return min(costs, key=lambda n: costs[n].wall_s)

    def _best_cache(self, prompts: np.ndarray) -> str | None:
        costs = {}
        for cache in _CACHES:
            self._peer.generate(prompts, self.settings.output_len, cache)
            costs[cache] = min(
                measure(lambda c=cache: self._peer.generate(prompts, self.settings.output_len, c))
                for _ in range(2)
            )
        return min(costs, key=lambda cache: costs[cache])

    # Parts.

    def finetune(self, repeats: int) -> Iterator[Comparison]:
        """Steady-state finetuning; a run's first step is not measured."""
        steps = 1 + self.settings.finetune_steps
        micro_batch = self._best_micro_batch()
        check_losses(self._finetune(steps).losses, self._peer_finetune(steps, micro_batch).losses)
        peer, ours = [], []
        for _ in range(repeats):
            peer.append(self._peer_finetune(steps, micro_batch).cost(first=1))
            ours.append(self._finetune(steps).cost(first=1))
        work = self.settings.finetune_steps * self.settings.batch_size * self.settings.sample_len
        yield Comparison("finetune", work, peer, ours, {"peer_micro_batch": micro_batch})

    def generate(self, repeats: int) -> Iterator[Comparison]:
        """Greedy generation: one request, and as many at once as `group`."""
        for name, count in (("generate 1", 1), ("generate 8", self.settings.group)):
            prompts = self._prompts(count)
            cache = self._best_cache(prompts)
            length = self.settings.output_len
            check_tokens(self._generate(prompts), self._peer.generate(prompts, length, cache))
            costs = alternate(
                {
                    "peer": lambda p=prompts, n=length, c=cache: self._peer.generate(p, n, c),
                    "flexjax": lambda p=prompts: self._generate(p),
                },
                repeats,
            )
            notes = {"peer_cache": cache or "dynamic", "requests": count}
            yield Comparison(name, count * length, costs["peer"], costs["flexjax"], notes)

    def coserve(self, repeats: int) -> Iterator[Comparison]:
        """Requests and a job: at once in one engine, against one after the other."""
        sizes = self.settings
        prompts = self._prompts(sizes.coserve_requests)
        cache = self._best_cache(prompts[: sizes.group])
        micro_batch = self._best_micro_batch()

        def peer_generate() -> list[list[int]]:
            tokens: list[list[int]] = []
            for start in range(0, len(prompts), sizes.group):
                batch = prompts[start : start + sizes.group]
                tokens += self._peer.generate(batch, sizes.output_len, cache)
            return tokens

        def ours() -> tuple[list[list[int]], Sequence[float]]:
            job = self._start_job(sizes.coserve_steps)
            tokens = self._generate(prompts)
            job.wait()
            self.engine.unload_adapter(job.config.adapter)
            return tokens, job.metrics().losses

        tokens, losses = ours()
        check_tokens(tokens, peer_generate())
        check_losses(losses, self._peer_finetune(sizes.coserve_steps, micro_batch).losses)
        costs: dict[str, list[Cost]] = {"generate": [], "finetune": [], "ours": []}
        for _ in range(repeats):
            costs["generate"].append(measure(peer_generate))
            trained = self._peer_finetune(sizes.coserve_steps, micro_batch)
            costs["finetune"].append(trained.cost())
            costs["ours"].append(measure(ours))
        both = zip(costs["generate"], costs["finetune"], strict=True)
        peer = [Cost(a.wall_s + b.wall_s, a.cpu_s + b.cpu_s) for a, b in both]
        medians = {name: timings(name, values)[0].median for name, values in costs.items()}
        notes = {
            "peer_cache": cache or "dynamic",
            "peer_micro_batch": micro_batch,
            "peer_generate_s": [cost.wall_s for cost in costs["generate"]],
            "peer_finetune_s": [cost.wall_s for cost in costs["finetune"]],
            "ratio_of_sum_of_medians": (medians["generate"] + medians["finetune"])
            / medians["ours"],
        }
        trained_tokens = sizes.coserve_steps * sizes.batch_size * sizes.sample_len
        work = trained_tokens + sizes.coserve_requests * sizes.output_len
        yield Comparison("coserve", work, peer, costs["ours"], notes)

    def bound(self, repeats: int) -> tuple[list[PassTime], float, list[Bound]]:
        """Measures what the products of each part take alone, beside the peer's runs.

        The peer of "coserve" is its finetuning and its generation in groups, scaled from the runs
        of those parts.

        Returns:
          Times of the products, seconds of reading all kernels once, and the bound of each part.
        """
        sizes, length = self.settings, self.settings.output_len
        work = part_work(sizes)
        kernels = Kernels(self._model, sizes.seed)
        passes = Passes(kernels, (one for part in work.values() for one in part.passes))
        steps, micro_batch = 1 + sizes.finetune_steps, self._best_micro_batch()
        prompts = {"generate 1": self._prompts(1), "generate 8": self._prompts(sizes.group)}
        caches = {name: self._best_cache(rows) for name, rows in prompts.items()}
        peer: dict[str, list[Cost]] = {name: [] for name in work}
        for _ in range(repeats):
            trained = self._peer_finetune(steps, micro_batch).cost(first=1)
            peer["finetune"].append(trained)
            for name, rows in prompts.items():
                run = functools.partial(self._peer.generate, rows, length, caches[name])
                peer[name].append(measure(run))
            groups = -(-sizes.coserve_requests // sizes.group)
            share = sizes.coserve_steps / sizes.finetune_steps
            both = zip(peer["generate 8"][-1], trained, strict=True)
            peer["coserve"].append(Cost(*(groups * a + share * b for a, b in both)))
            passes.measure()
        times, read_s = passes.times(), passes.read_s()
        bounds = [
            Bound(
                name,
                TARGETS[name],
                peer[name],
                {side: part.seconds(times, side) for side in ("jax", "torch")},
                part.reads * read_s,
            )
            for name, part in work.items()
        ]
        return list(times.values()), read_s, bounds


def check_losses(ours: Sequence[float], theirs: Sequence[float]) -> None:
    """Checks that both sides trained on the same thing.

    Raises:
      AssertionError: If a step's losses differ by more than a thousandth.
    """
    error = float(np.abs(np.subtract(ours, theirs)).max())
    if not error < _LOSS_TOLERANCE:
        raise AssertionError(f"Losses differ by {error}: {list(ours)} and {list(theirs)}.")


def check_tokens(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> None:
    """Checks that both sides generated the same tokens.

    Raises:
      AssertionError: If a token differs.
    """
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if list(mine) != list(other):
            same = [a == b for a, b in zip(mine, other, strict=False)]
            where = same.index(False) if False in same else min(len(mine), len(other))
            raise AssertionError(f"Output {index} differs from the peer's at token {where}.")
