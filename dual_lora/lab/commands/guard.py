"""The end of every command: an exit code, and one line for whatever ended it."""

import io
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from dual_lora.lab.config import paths
from dual_lora.lab.config.paths import resolve_path
from dual_lora.lab.config.secrets import redact_secrets
from dual_lora.lab.errors import Stopped, UserError, describe_machine_error, get_first_line
from dual_lora.lab.study.execute import EXIT_FAILED, EXIT_STOPPED, EXIT_USER
from dual_lora.lab.system.distributed import is_first_process, wait_for_first_process_error
from dual_lora.lab.system.signals import STOP


def describe_end(error: Exception) -> tuple[int, str]:
    """Return the exit code and the line for what ended the work. What is neither the user's nor the machine's fault is
    the program's: its traceback is printed before."""
    if isinstance(error, UserError):
        return EXIT_USER, str(error)
    if said := describe_machine_error(error):
        return EXIT_USER, said
    print(redact_secrets("".join(traceback.format_exception(error))), file=sys.stderr)
    return EXIT_FAILED, f"{type(error).__name__}: {get_first_line(error)}; a fault of the program, not of the settings"


def run_command(do: Callable[..., int], *args: object) -> None:
    """Exit with what `do` returns; whatever else ends it becomes one line, a stop somebody asked for included."""
    name = Path(sys.argv[0]).name
    silence = nullcontext() if is_first_process() else redirect_stdout(io.StringIO())
    try:
        with STOP.listen(), silence:
            resolve_path("DUAL_LORA_RUNS", str(paths.RUNS))
            try:
                sys.exit(do(*args))
            except Exception:
                wait_for_first_process_error()
                raise
    except Exception as error:
        code, message = describe_end(error)
        print(f"{name}: {redact_secrets(message)}", file=sys.stderr)
        sys.exit(code)
    except Stopped as stopped:
        if is_first_process():
            print(f"{name}: stopped by {stopped}; the same command {stopped.then}", file=sys.stderr)
        sys.exit(EXIT_STOPPED)
