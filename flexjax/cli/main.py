"""The command line: `flexjax generate`, `finetune`, `coserve`, `compile`, `profile`, `bench`.

Exit status: 0 on success; 2 for arguments or input that cannot be used, with the reason as one line
on standard error; 1 for anything else; 130 after Ctrl-C. A command's module, and with it jax, is
imported when the command runs.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer

from flexjax.cli.bench_options import BenchOptions, ProfileOptions
from flexjax.cli.options import (
    CompileOptions,
    CoserveOptions,
    FinetuneOptions,
    GenerateOptions,
    as_signature,
)
from flexjax.errors import EngineDeadError, FlexJaxError, JobStateError

UsageError: Any = typer.BadParameter.__bases__[0]
"""What typer raises for arguments that it cannot use; lives in click or typer by version."""

_LIST_OPTIONS = (
    *("--prompt", "--stop", "--target-modules", "--rates", "--policies", "--contexts"),
    *("--decode-buckets", "--chunk-buckets", "--window-buckets"),
)

app = typer.Typer(
    name="flexjax",
    help="Serve a language model and finetune LoRA adapters of it in the same JAX steps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class RunError(Exception):
    """Something failed after the input had been accepted; the cause says what."""


def _command(name: str, options: type, text: str) -> None:
    """Adds a command that runs `flexjax.cli.<name>.run(options)`."""

    def run(**values: object) -> None:
        importlib.import_module(f"flexjax.cli.{name}").run(options(**values))

    app.command(name, help=text)(as_signature(run, options))


_command(
    "generate",
    GenerateOptions,
    "Answer prompts. Prompts are taken as they are; --chat writes them with the chat template.",
)
_command(
    "finetune",
    FinetuneOptions,
    "Train a LoRA adapter and write it as a PEFT directory.",
)
_command(
    "coserve",
    CoserveOptions,
    "Answer arriving requests and train a LoRA adapter at the same time, in the same steps, then "
    "show what both got. Requests are answered by the base model. Without arguments: the embedded "
    "tiny model, its questions and its pirate dataset.",
)


_command(
    "compile",
    CompileOptions,
    "Compile the step of every bucket for a GPU that need not be there, and show memory, generated "
    "kernels, copies, and the least time that a step can take.",
)

_command(
    "profile",
    ProfileOptions,
    "Measure what every step costs on this device, and save it for the latency model.",
)
_command(
    "bench",
    BenchOptions,
    "Compare ways to share the device between requests and finetuning: every policy answers the "
    "same requests at several rates, on one engine; then show who is in time, and what is trained.",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line.

    Args:
      argv: Arguments without the program's name; None for those of the process.

    Returns:
      The exit status.
    """
    arguments = expand_lists(sys.argv[1:] if argv is None else argv)
    try:
        status = app(arguments, prog_name="flexjax", standalone_mode=False)
    except UsageError as error:
        return _refuse(error.format_message())
    except RunError as error:
        return _fail(error.__cause__ or error)
    except BrokenPipeError:
        # The reader has gone; keep the interpreter from failing once more when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (JobStateError, EngineDeadError) as error:
        return _fail(error)
    except (ValueError, FlexJaxError, OSError) as error:
        return _refuse(str(error))
    except (KeyboardInterrupt, typer.Abort):
        print("flexjax: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        return _fail(error)
    return status if isinstance(status, int) else 0


def expand_lists(arguments: Sequence[str]) -> list[str]:
    """Lets `--prompt A B` mean `--prompt A --prompt B`; the same for other lists."""
    expanded: list[str] = []
    name = ""
    is_value = False
    for argument in arguments:
        if is_value:
            is_value = False
        elif argument.startswith("-") and argument != "-":
            name, has_equals, _ = argument.partition("=")
            is_value = name in _LIST_OPTIONS and not has_equals
        elif name in _LIST_OPTIONS:
            expanded.append(name)
        expanded.append(argument)
    return expanded


def _refuse(message: str) -> int:
    if message:  # typer has printed the help when there were no arguments
        print(f"flexjax: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _fail(error: BaseException) -> int:
    if isinstance(error, JobStateError):
        print(f"flexjax: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
        print(f"flexjax: internal error: {type(error).__name__}", file=sys.stderr)
    return 1
