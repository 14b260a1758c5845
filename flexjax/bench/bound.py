"""The raw products of a model's steps in JAX and in torch: what no step can be faster than.

Every product with a frozen kernel, at the row counts of the steps and with kernels as cold as they
are there; each library with the layout and the options that suit it best, JAX by XLA's products or
by the kernels of `pallas_kernels`. Attention, adapters, norms, sampling and the host count as free,
so that a ratio against these times is an upper bound. Needs torch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from flexjax.bench.harness import Cost, measure, timings
from flexjax.model_config import ModelConfig
from pallas_kernels import can_run_llvm, stacked_matmul, stacked_matmul_transposed

if TYPE_CHECKING:
    from flexjax.bench.side_by_side import Settings

_LIBRARIES = {
    "default": {},
    "library dots": {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"},
    "no library": {"xla_cpu_experimental_ynn_fusion_type": ""},
}
"""Compiler options under which XLA's CPU backend takes its products from different code."""

_LAYOUTS = ("in-out", "out-in")
_TOLERANCE = 1e-3


class Pass(NamedTuple):
    """Products that are measured together, each kernel read once.

    Attributes:
      rows: Rows of each product.
      of: "layers" or "head".
      is_backward: Whether gradients go through the kernels, from out to in.
    """

    rows: int
    of: str
    is_backward: bool = False

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.of}{' backward' if self.is_backward else ''}, {self.rows} rows"


@dataclasses.dataclass(frozen=True)
class PassTime:
    """What one pass takes, each side at its best.

    Attributes:
      work: The pass.
      flop: Its multiplications and additions.
      seconds: Median by side, "jax" and "torch".
      choice: What was quickest, by side.
      samples: Wall-clock seconds of every run, by side and choice.
    """

    work: Pass
    flop: float
    seconds: dict[str, float]
    choice: dict[str, str]
    samples: dict[str, tuple[float, ...]]

    def record(self) -> dict:
        """A JSON record, with every sample."""
        return {
            "kind": "products",
            "name": self.work.name,
            "gflop": self.flop / 1e9,
            "s": self.seconds,
            "gflop_per_s": {side: self.flop / 1e9 / s for side, s in self.seconds.items()},
            "choice": self.choice,
            "samples": {name: list(values) for name, values in self.samples.items()},
        }


class Kernels:
    """Random kernels of every linear and of the head, in both layouts, for both sides.

    Attributes:
      num_bytes: Bytes of one copy: what a pass over layers and head reads.
    """

    def __init__(self, config: ModelConfig, seed: int):
        generator = np.random.default_rng(seed)

        def draw(num_in: int, num_out: int) -> dict[str, np.ndarray]:
            array = generator.standard_normal((num_in, num_out), dtype=np.float32)
            array /= np.sqrt(np.float32(num_in))
            return {"in-out": array, "out-in": np.ascontiguousarray(array.T)}

        dims = config.projection_dims().values()
        arrays = {
            "layers": [draw(*dim) for _ in range(config.num_layers) for dim in dims],
            "head": [draw(config.hidden_size, config.vocab_size)],
        }
        self.num_bytes = sum(pair["in-out"].nbytes for pairs in arrays.values() for pair in pairs)
        self._arrays = arrays
        self._jax = {
            of: [{layout: jnp.asarray(array) for layout, array in pair.items()} for pair in pairs]
            for of, pairs in arrays.items()
        }
        self._generator = generator

    def flop(self, work: Pass) -> float:
        """Multiplications and additions of a pass."""
        return 2.0 * work.rows * sum(pair["in-out"].size for pair in self._arrays[work.of])

    def runs(self, work: Pass) -> dict[str, Callable[[], Any]]:
        """Every way to run a pass, compiled and run once.

        Args:
          work: The pass.

        Returns:
          Calls that return when the products are there, by "side, choice".

        Raises:
          AssertionError: If two of them give different products.
        """
        flip = dict(zip(_LAYOUTS, reversed(_LAYOUTS), strict=True))
        runs: dict[str, Callable[[], Any]] = {}
        shapes = [
            pair["in-out"].shape[:: -1 if work.is_backward else 1] for pair in self._arrays[work.of]
        ]
        inputs = {size: self._draw_rows(work.rows, size) for size in {shape[0] for shape in shapes}}
        sizes = [shape[0] for shape in shapes]
        for layout in _LAYOUTS:
            stored = flip[layout] if work.is_backward else layout
            ours = [pair[stored] for pair in self._jax[work.of]]
            for name, run in _jax_runs([jnp.asarray(inputs[n]) for n in sizes], ours, layout):
                runs[f"jax, {layout}, {name}"] = run
            theirs = [torch.from_numpy(pair[stored]) for pair in self._arrays[work.of]]
            rows = [torch.from_numpy(inputs[n]) for n in sizes]
            runs[f"torch, {layout}"] = _torch_run(rows, theirs, layout)
        outputs = {name: np.asarray(run()[-1]) for name, run in runs.items()}
        is_turned = {name: name.endswith("kernel first") for name in outputs}
        _check_same({name: y.T if is_turned[name] else y for name, y in outputs.items()})
        return runs

    def read_runs(self) -> dict[str, Callable[[], Any]]:
        """Ways to read every kernel once and do next to nothing with it."""
        pairs = [pair for of in self._jax for pair in self._jax[of]]
        arrays = [pair["in-out"] for pair in pairs]
        program = jax.jit(lambda arrays: [array.sum() for array in arrays]).lower(arrays).compile()
        tensors = [
            torch.from_numpy(pair["in-out"]) for of in self._arrays for pair in self._arrays[of]
        ]
        runs = {
            "jax": lambda: jax.block_until_ready(program(arrays)),
            "torch": lambda: [tensor.sum() for tensor in tensors],
        }
        for run in runs.values():
            run()
        return runs

    def _draw_rows(self, rows: int, size: int) -> np.ndarray:
        return self._generator.standard_normal((rows, size), dtype=np.float32)


def _jax_runs(rows: list[jax.Array], kernels: list[jax.Array], layout: str):
    axis = _LAYOUTS.index(layout)

    def rows_first(rows: list[jax.Array], kernels: list[jax.Array]) -> list[jax.Array]:
        dims = (((1,), (axis,)), ((), ()))
        pairs = zip(rows, kernels, strict=True)
        return [lax.dot_general(x, kernel, dims) for x, kernel in pairs]

    def kernel_first(rows: list[jax.Array], kernels: list[jax.Array]) -> list[jax.Array]:
        dims = (((axis,), (1,)), ((), ()))
        pairs = zip(rows, kernels, strict=True)
        return [lax.dot_general(kernel, x, dims) for x, kernel in pairs]  # [out, rows] each

    for order, products in (("", rows_first), (", kernel first", kernel_first)):
        lowered = jax.jit(products).lower(rows, kernels)
        for name, options in _LIBRARIES.items():
            try:
                program = lowered.compile(compiler_options=options or None)
            except jax.errors.JaxRuntimeError:  # a version of XLA that does not know the option
                continue
            yield name + order, lambda run=program: jax.block_until_ready(run(rows, kernels))
    if can_run_llvm():
        program = jax.jit(functools.partial(_llvm_products, layout)).lower(rows, kernels).compile()
        yield "our kernels", lambda: jax.block_until_ready(program(rows, kernels))


def _llvm_products(layout: str, rows: list[jax.Array], kernels: list[jax.Array]) -> list[jax.Array]:
    first, found = jnp.zeros((), jnp.int32), []
    options: dict[str, Any] = {"implementation": "llvm"}
    for x, kernel in zip(rows, kernels, strict=True):
        stack = (kernel[None],)
        if layout == "in-out":
            found.append(stacked_matmul(x, stack, first, **options)[0])
        else:
            found.append(stacked_matmul_transposed((x,), stack, first, **options))
    return found


def _torch_run(rows: list[torch.Tensor], kernels: list[torch.Tensor], layout: str):
    multiply = torch.matmul if layout == "in-out" else torch.nn.functional.linear

    def run() -> list[torch.Tensor]:
        with torch.inference_mode():
            return [multiply(x, kernel) for x, kernel in zip(rows, kernels, strict=True)]

    return run


def _check_same(outputs: Mapping[str, np.ndarray]) -> None:
    first = next(iter(outputs.values()))
    for name, output in outputs.items():
        error = float(np.abs(output - first).max())
        if not error < _TOLERANCE * float(np.abs(first).max()):
            raise AssertionError(f"Products by {name} differ by {error}.")


class Passes:
    """Measures every way to run each pass, and how fast kernels can be read."""

    def __init__(self, kernels: Kernels, passes: Iterable[Pass]):
        self._kernels = kernels
        self._runs = {work: kernels.runs(work) for work in dict.fromkeys(passes)}
        self._reads = kernels.read_runs()
        self._costs = {work: {name: [] for name in runs} for work, runs in self._runs.items()}
        self._read_costs: dict[str, list[Cost]] = {name: [] for name in self._reads}

    def measure(self) -> None:
        """Measures everything once more."""
        for work, runs in self._runs.items():
            for name, run in runs.items():
                self._costs[work][name].append(measure(run))
        for name, run in self._reads.items():
            self._read_costs[name].append(measure(run))

    def times(self) -> dict[Pass, PassTime]:
        """Times by pass."""
        return {work: self._time(work) for work in self._runs}

    def read_s(self) -> float:
        """Seconds that reading every kernel once takes: median, better side."""
        return min(timings(name, costs)[0].median for name, costs in self._read_costs.items())

    def _time(self, work: Pass) -> PassTime:
        found = {name: timings(name, costs)[0] for name, costs in self._costs[work].items()}
        seconds, choice = {}, {}
        for side in ("jax", "torch"):
            names = [name for name in found if name.startswith(side)]
            best = min(names, key=lambda name: found[name].median)
            seconds[side], choice[side] = found[best].median, best.partition(", ")[2]
        samples = {name: timing.samples for name, timing in found.items()}
        return PassTime(work, self._kernels.flop(work), seconds, choice, samples)


@dataclasses.dataclass(frozen=True)
class Bound:
    """The best ratio that one part of the comparison can reach.

    Attributes:
      name: Part.
      target: Ratio that the part is meant to reach.
      peer: Costs of the peer's runs of the part.
      products_s: Seconds of the part's products alone, by side.
      read_s: Seconds of reading the kernels alone, as often as the part must.
    """

    name: str
    target: float
    peer: Sequence[Cost]
    products_s: dict[str, float]
    read_s: float

    @property
    def peer_s(self) -> float:
        """Median wall-clock seconds of the peer."""
        return timings(self.name, self.peer)[0].median

    @property
    def best_ratio(self) -> float:
        """How many times faster than the peer the products alone are, in JAX."""
        return self.peer_s / self.products_s["jax"]

    @property
    def best_ratio_reading(self) -> float:
        """How many times faster the part were if it only read its kernels."""
        return self.peer_s / self.read_s

    def record(self) -> dict:
        """A JSON record, with every sample."""
        return {
            "kind": "bound",
            "part": self.name,
            "target": self.target,
            "best_ratio": self.best_ratio,
            "best_ratio_reading": self.best_ratio_reading,
            "peer_s": self.peer_s,
            "peer_samples": [cost.wall_s for cost in self.peer],
            "products_s": self.products_s,
            "read_s": self.read_s,
        }


@dataclasses.dataclass(frozen=True)
class Work:
    """The products of one part.

    Attributes:
      passes: How often each pass runs; a fraction stands for rows that ride in a larger pass.
      reads: How often every kernel must be read.
    """

    passes: Mapping[Pass, float]
    reads: float

    def seconds(self, times: Mapping[Pass, PassTime], side: str) -> float:
        """What the products take on one side."""
        return sum(count * times[work].seconds[side] for work, count in self.passes.items())


def part_work(sizes: Settings) -> dict[str, Work]:
    """The products of each part of the comparison, by part.

    Finetuning runs each sample forward and backward, generation one pass over the prompts and one
    for each later token. In "coserve" every row of the requests rides in passes as large as
    finetuning's, which is more than any scheduler can do.

    Args:
      sizes: Sizes of the comparison.
    """
    rows = sizes.sample_len
    layers, head = Pass(rows, "layers"), Pass(rows, "head")
    sample = Counter((layers, head, Pass(rows, "layers", True), Pass(rows, "head", True)))

    def trained(steps: int) -> Counter:
        return Counter({work: steps * sizes.batch_size * count for work, count in sample.items()})

    def generated(count: int) -> Work:
        passes: Counter = Counter({Pass(count, "layers"): sizes.output_len - 1})
        passes[Pass(count * sizes.prompt_len, "layers")] += 1
        passes[Pass(count, "head")] += sizes.output_len
        return Work(passes, sizes.output_len)

    samples = sizes.finetune_steps * sizes.batch_size
    together: dict[Pass, float] = dict(trained(sizes.coserve_steps))
    request_rows = sizes.prompt_len + sizes.output_len - 1
    together[layers] += sizes.coserve_requests * request_rows / rows
    together[head] += sizes.coserve_requests * sizes.output_len / rows
    return {
        "finetune": Work(trained(sizes.finetune_steps), 2 * samples),
        "generate 1": generated(1),
        "generate 8": generated(sizes.group),
        "coserve": Work(together, 2 * sizes.coserve_steps * sizes.batch_size),
    }
