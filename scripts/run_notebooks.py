"""Runs the notebooks from top to bottom on the CPU and saves them with their outputs.

    python scripts/run_notebooks.py                  run and save all of notebooks/
    python scripts/run_notebooks.py --check          run, save nothing, fail on any error
    python scripts/run_notebooks.py --strip FILE...  only strip volatile metadata

What is saved is what a run gave, without execution times, kernel paths, widget state and
overwritten progress lines. A notebook fails if a cell raises, if an output names a directory of
this machine, or if the file is too large.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

REPOSITORY = Path(__file__).resolve().parent.parent
NOTEBOOKS_DIR = REPOSITORY / "notebooks"
MAX_BYTES = 500_000
CELL_TIMEOUT_S = 600
_KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
# What XLA writes where its CUDA plugin is installed and finds no GPU.
_NO_GPU = re.compile(
    r"^(WARNING: All log messages before absl|[IWE]\d{4} .*cudart_stub).*\n?", re.M
)
_WIDGET_TYPE = "application/vnd.jupyter.widget-view+json"


def strip(notebook: nbformat.NotebookNode) -> None:
    """Removes, in place, what differs between two runs that show the same."""
    notebook.metadata = nbformat.from_dict(
        {"kernelspec": _KERNELSPEC, "language_info": {"name": "python"}}
    )
    for index, cell in enumerate(notebook.cells):
        cell.id = f"cell-{index:02d}"
        cell.metadata = nbformat.NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = _strip_outputs(cell.outputs)


def _strip_outputs(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Joins neighbouring pieces of one stream, ends progress lines, drops widgets and GPU talk."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and output.name == "stderr":
            output.text = _NO_GPU.sub("", output.text)
            if not output.text.strip():
                continue
        if output.output_type != "stream":
            output.get("data", {}).pop(_WIDGET_TYPE, None)
            if "metadata" in output:
                output.metadata = nbformat.NotebookNode()
            kept.append(output)
        elif kept and kept[-1].output_type == "stream" and kept[-1].name == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)
    return [o for o in kept if o.output_type != "stream" or o.text.strip()]


def execute(notebook: nbformat.NotebookNode, directory: Path) -> None:
    """Runs all cells in a fresh kernel that starts in `directory`.

    Raises:
      CellExecutionError: If a cell raises.
    """
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        kernel_name=_KERNELSPEC["name"],
        resources={"metadata": {"path": str(directory)}},
        record_timing=False,
        store_widget_state=False,
    )
    client.execute()


def problems(notebook: nbformat.NotebookNode) -> list[str]:
    """What speaks against publishing a notebook that ran without an error."""
    num_bytes = len(nbformat.writes(notebook).encode())
    found = []
    if num_bytes > MAX_BYTES:
        found.append(f"must be at most {MAX_BYTES:,} bytes; got {num_bytes:,}")
    text = "\n".join(_texts(notebook))
    private = {str(REPOSITORY), str(Path.home()), tempfile.gettempdir(), socket.gethostname()}
    for name in sorted(private - {"/", ""}):
        if re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", text):
            found.append(f"names a path or the host of this machine: {name}")
    return found


def _texts(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """All that a reader sees as text: sources and outputs, but no image data."""
    for cell in notebook.cells:
        yield cell.source
        for output in cell.get("outputs", ()):
            yield output.get("text", "")
            yield from output.get("traceback", ())
            yield from (v for k, v in output.get("data", {}).items() if k.startswith("text/"))


def run(path: Path, *, is_check: bool) -> bool:
    """Runs one notebook and saves it unless `is_check`; returns whether all went well."""
    notebook = nbformat.read(path, as_version=4)
    start_s = time.perf_counter()
    failures = []
    try:
        execute(notebook, path.parent)
    except CellExecutionError as error:
        failures.append(str(error))
    strip(notebook)
    failures += problems(notebook)
    wall_s = time.perf_counter() - start_s
    print(f"{path.name}: {'failed' if failures else 'ok'} in {wall_s:.1f} s", flush=True)
    for failure in failures:
        print(f"{path.name}: {failure}", file=sys.stderr)
    if not failures and not is_check:
        nbformat.write(notebook, path)
    return not failures


def main() -> int:
    """Returns the exit status: 0 if every notebook is well."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of notebooks/")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="run, but save nothing")
    mode.add_argument("--strip", action="store_true", help="strip metadata; run nothing")
    args = parser.parse_args()
    paths = args.notebooks or sorted(NOTEBOOKS_DIR.glob("*.ipynb"))
    if args.strip:
        for path in paths:
            notebook = nbformat.read(path, as_version=4)
            strip(notebook)
            nbformat.write(notebook, path)
        return 0
    os.environ["JAX_PLATFORMS"] = "cpu"
    results = [run(path, is_check=args.check) for path in paths]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
