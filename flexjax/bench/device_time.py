"""Seconds that a function takes on the device: many calls inside one program, no dispatch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class FastDraws(np.random.Generator):
    """A generator whose large normal draws repeat a pool: gigabytes of operands in seconds.

    Products and attention take as long on repeated values as on fresh ones.
    """

    _POOL = 1 << 20

    def __init__(self, seed: int):
        super().__init__(np.random.PCG64(seed))
        self._pool = super().standard_normal(self._POOL)

    def standard_normal(self, size: Any = None, dtype: Any = np.float64, out: Any = None) -> Any:
        """Draws like numpy's; beyond a million values they repeat."""
        if size is None or out is not None or np.prod(size) <= self._POOL:
            draw: Any = super().standard_normal
            return draw(size, dtype, out)
        return np.resize(self._pool.astype(dtype), size)


def repeated(
    function: Callable[..., Any], donate_argnums: Sequence[int], num_calls: int
) -> Callable[..., tuple[Any, jax.Array]]:
    """Returns a function that makes `num_calls` calls in a loop that XLA cannot shorten.

    Donated arguments go from call to call in place; every call depends on the one before.
    """

    def run(*args: Any) -> tuple[Any, jax.Array]:
        donated = [args[i] for i in donate_argnums]

        def body(_, carry):
            donated, token = carry
            call_args = list(args)
            for i, value in zip(donate_argnums, donated, strict=True):
                call_args[i] = value
            leaves, treedef = jax.tree.flatten(call_args)
            held = {id(leaf) for leaf in jax.tree.leaves(donated)}
            free = [i for i, leaf in enumerate(leaves) if id(leaf) not in held]
            smallest = min(free, key=lambda i: leaves[i].size)
            # The call waits for the one before: its smallest operand does.
            leaves[smallest], token = lax.optimization_barrier((leaves[smallest], token))
            results = lax.optimization_barrier(function(*jax.tree.unflatten(treedef, leaves)))
            for leaf in jax.tree.leaves(results):
                token = token + leaf[(0,) * leaf.ndim].astype(jnp.float32)
            return _pick(donated, results), token

        return lax.fori_loop(0, num_calls, body, (donated, jnp.zeros((), jnp.float32)))

    return run


def _pick(donated: list[Any], results: Any) -> list[Any]:
    """The results that take the donated arguments' places: the first of the same shape each."""
    left = jax.tree.leaves(results)

    def take(old: jax.Array) -> jax.Array:
        for index, new in enumerate(left):
            if (new.shape, new.dtype) == (old.shape, old.dtype):
                return left.pop(index)
        raise ValueError(f"no result has the shape of a donated argument, {old.shape}.")

    return jax.tree.map(take, donated)


def device_times(
    function: Callable[..., Any],
    args: Sequence[Any],
    *,
    donate_argnums: Sequence[int] = (),
    num_calls: int = 20,
    repeats: int = 5,
) -> tuple[float, ...]:
    """Measures a function.

    Args:
      function: Takes and returns arrays.
      args: Device arrays; those donated are copied once, here.
      donate_argnums: Arguments that it adds to in place.
      num_calls: Calls of one program.
      repeats: Runs of the program, after one that is not counted.

    Returns:
      Seconds for one call, of each run.
    """
    donated = tuple(donate_argnums)
    program = jax.jit(repeated(function, donated, num_calls), donate_argnums=donated)
    call_args = list(args)
    for i in donated:
        call_args[i] = jax.tree.map(jnp.copy, call_args[i])
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        values, token = jax.block_until_ready(program(*call_args))
        times.append((time.perf_counter() - started) / num_calls)
        for i, value in zip(donated, values, strict=True):
            call_args[i] = value
        del token
    return tuple(times[1:])


def chained_times(run: Callable[[Any], Any], state: Any, *, num_calls: int, repeats: int) -> Any:
    """Measures a program whose result is its next argument, dispatched ahead of the device.

    Args:
      run: state -> state; the state may be donated.
      state: First argument.
      num_calls: Calls between two looks at the clock.
      repeats: Looks, after one that is not counted.

    Returns:
      Seconds for one call of each run, and the last state.
    """
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        for _ in range(num_calls):
            state = run(state)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - started) / num_calls)
    return tuple(times[1:]), state


def median(times: Sequence[float]) -> float:
    """Median of some times."""
    return statistics.median(times)
