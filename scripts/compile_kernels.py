"""Compiles every kernel case for GPUs that need not be there, and prints the table.

    python scripts/compile_kernels.py [--devices h200,a100] [--ops NAME,...] [--output FILE.jsonl]

Fails (status 1) if a case does not compile, needs more shared memory than the device has, is marked
hot and spills registers, or is meant to use wgmma on sm_90a and does not.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pallas_kernels._cases import OPS


def compile_case(op: str, index: int, implementation: str, device: str) -> dict[str, Any]:
    """Compiles one case; what came of it, as plain data."""
    from pallas_kernels import aot, roofline

    case = importlib.import_module(f"pallas_kernels.{op}.cases").CASES[index]
    row: dict[str, Any] = {
        "op": op,
        "case": case.name,
        "implementation": implementation,
        "device": device,
        "tags": sorted(case.tags),
        "problems": [],
    }
    began_s = time.perf_counter()
    try:
        compiled = aot.compile_for(
            case.function(implementation),
            case.avals(),
            device=device,
            donate_argnums=case.donate_argnums,
        )
    except NotImplementedError as error:
        row["unsupported"] = str(error)
        if implementation not in case.unsupported:
            row["problems"].append("unsupported")
        return row
    except Exception as error:
        row["problems"].append(f"{type(error).__name__}: {error}"[:300])
        return row
    limit = aot.device(device).shared_memory_bytes
    kernels = compiled.kernels
    row |= {
        "compile_s": time.perf_counter() - began_s,
        "floor_us": 1e6 * roofline.floor_s(roofline.Cost(case.flops(), case.bytes()), device),
        "temp_bytes": compiled.temp_bytes,
        "kernels": [
            {
                "name": kernel.name,
                "registers": kernel.registers,
                "spill_bytes": kernel.spill_bytes,
                "shared_bytes": kernel.shared_bytes,
                "num_warps": kernel.num_warps,
                "wgmma": kernel.uses_wgmma,
                "tensor_cores": kernel.uses_tensor_cores,
            }
            for kernel in kernels
        ],
    }
    if not kernels:
        row["problems"].append("no generated kernel")
    if any(kernel.shared_bytes > limit for kernel in kernels):
        row["problems"].append("too much shared memory")
    if "hot" in case.tags and any(kernel.spill_bytes for kernel in kernels):
        row["problems"].append("spills")
    is_wgmma = any(kernel.uses_wgmma for kernel in kernels)
    if "wgmma" in case.tags and device in ("h100", "h200") and not is_wgmma:
        row["problems"].append("no wgmma")
    return row


def all_jobs(ops: Sequence[str], devices: Sequence[str]) -> list[tuple[str, int, str, str]]:
    """Every case, implementation and device."""
    jobs = []
    for op in ops:
        for index, case in enumerate(importlib.import_module(f"pallas_kernels.{op}.cases").CASES):
            for implementation in case.implementations:
                jobs += [(op, index, implementation, device) for device in devices]
    return jobs


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line for each op, implementation and device, hot cases apart."""
    head = ("op", "implementation", "device", "cases", "hot", "registers", "spills", "spills (hot)",
            "shared KiB", "wgmma", "failed")  # fmt: skip
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["implementation"], row["device"]), []).append(row)
    lines = [head, tuple("-" * len(name) for name in head)]
    for key, found in sorted(groups.items()):
        done = [row for row in found if "kernels" in row]
        kernels = [kernel for row in done for kernel in row["kernels"]]
        hot = [row for row in done if "hot" in row["tags"]]
        spilling = [row for row in done if any(k["spill_bytes"] for k in row["kernels"])]
        lines.append(
            (
                *key,
                str(len(done)),
                str(len(hot)),
                f"<= {max((k['registers'] for k in kernels), default=0)}",
                str(len(spilling)),
                str(sum(row in hot for row in spilling)),
                f"<= {max((k['shared_bytes'] for k in kernels), default=0) / 1024:.0f}",
                str(sum(any(k["wgmma"] for k in row["kernels"]) for row in done)),
                str(sum(bool(row["problems"]) for row in found)),
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the script."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--devices", default="h200,a100", help="comma-separated")
    parser.add_argument("--ops", default=",".join(OPS), help="comma-separated")
    parser.add_argument("--output", type=Path, help="JSON lines, one a case")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    args = parser.parse_args(argv)
    from pallas_kernels import aot

    if lack := aot.missing():
        parser.error(lack)
    ops, devices = args.ops.split(","), args.devices.split(",")
    for name, given, known in (("ops", ops, OPS), ("devices", devices, aot.device_names())):
        if unknown := sorted(set(given) - set(known)):
            parser.error(f"--{name} must be out of {', '.join(known)}; got {', '.join(unknown)}")
    jobs = all_jobs(ops, devices)
    rows = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        futures = [pool.submit(compile_case, *job) for job in jobs]
        for done, future in enumerate(futures, 1):
            row = future.result()
            rows.append(row)
            for problem in row["problems"]:
                where = f"{row['op']} {row['case']} {row['implementation']} {row['device']}"
                print(f"{where}: {problem}", flush=True)
            if done % 50 == 0:
                print(f"{done} of {len(jobs)}", file=sys.stderr, flush=True)
    if args.output is not None:
        args.output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(table(rows))
    return int(any(row["problems"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
