"""What an adapter costs: LoRA, DoRA, LoHa and Dual LoRA side by side in one run.

python -m dual_lora.bench                                   single layers
python -m dual_lora.bench --model DIR --batch 32x32         a complete model, on random tokens
python -m dual_lora.bench --threads                         one step by threads, with and without a busy neighbour
python -m dual_lora.bench --show benchmarks/FILE.json       the tables of a finished run
python -m dual_lora.bench --trend benchmarks                every machine's ratios by date
python -m dual_lora.bench --page                            rewrite the tables of docs/cost.md from benchmarks/
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import peft
import torch

from .cases import Case, build_layer_case, build_model_case
from .measure import measure_case
from .page import (
    format_page_tables,
    format_record,
    format_table,
    format_threads,
    format_trend,
    read_record,
    update_page,
)
from .record import BenchError, check_folder, create_record, replace_text, write_record
from .threads import measure_threads

ROOT = Path(__file__).resolve().parents[2]  # the repository


def parse_batch_shape(text: str) -> tuple[int, int]:
    """Return the rows and tokens of a batch from ROWSxTOKENS.

    Raises:
        argparse.ArgumentTypeError: it is not of that form.
    """
    try:
        rows, tokens = (parse_number(1)(n) for n in text.split("x"))
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected ROWSxTOKENS, such as 32x32") from error
    return rows, tokens


def parse_number(least: int) -> Callable[[str], int]:
    """Return a function that returns the whole number that a text is.

    Raises:
        argparse.ArgumentTypeError: (the function) it is none, or lower than `least`.
    """

    def parse(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {least}")
        return int(text)

    return parse


def parse_device(text: str) -> str:
    """Return the name of a device on which torch can compute.

    Raises:
        argparse.ArgumentTypeError: it cannot.
    """
    try:
        torch.zeros(1, device=text).item()
    except Exception as error:  # each kind of device has its own
        raise argparse.ArgumentTypeError(f"{text!r}: no device on which torch can compute here") from error
    return text


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; the device is a GPU by default where there is one."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m dual_lora.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--width", type=parse_number(1), nargs="+", default=[1024, 2048], help="in = out of a layer")
    parser.add_argument("--tokens", type=parse_number(1), nargs="+", default=[1024, 4096], help="rows of an input")
    parser.add_argument("--model", nargs="+", default=[], help="folders of models; no layers are measured then")
    parser.add_argument(
        "--batch", type=parse_batch_shape, nargs="+", default=[(8, 64)], help="ROWSxTOKENS, one a model"
    )
    parser.add_argument("--rank", type=parse_number(2), default=16, help="LoRA's rank, Dual LoRA's r1 + r2")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the base weights")
    parser.add_argument("--device", type=parse_device, default="cuda" if cuda else "cpu")
    parser.add_argument("--repeats", type=parse_number(1), default=15, help="turns that count")
    parser.add_argument("--threads", action="store_true", help="measure threads on the first width and tokens only")
    parser.add_argument("--out", type=Path, help="write a JSON file to this folder, or add to the one it has of today")
    parser.add_argument("--show", type=Path, help="print the tables of a JSON file and measure nothing")
    parser.add_argument("--trend", type=Path, help="print the ratios of a folder's files by date and measure nothing")
    parser.add_argument("--page", action="store_true", help="rewrite the tables of docs/cost.md and measure nothing")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Do what the arguments ask for.

    Raises:
        SystemExit: an argument, or a file that it names, is wrong, or memory or the disk is full; with one line.
    """
    given = build_parser().parse_args(arguments)
    try:
        run_command(given)
        if sys.stdout:
            sys.stdout.flush()
    except BrokenPipeError:  # its reader had enough (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (BenchError, MemoryError, torch.OutOfMemoryError) as error:
        raise SystemExit(f"error: {str(error).splitlines()[0] if str(error) else 'out of memory'}") from error
    except OSError as error:
        raise SystemExit(f"error: {error}") from error
    except RuntimeError as error:  # as torch reports that the machine's memory is full
        if "allocate memory" not in str(error):
            raise
        raise SystemExit(f"error: out of memory ({str(error).splitlines()[0]})") from error


def run_command(given: argparse.Namespace) -> None:
    """Measure what the arguments ask for, print the tables, and write a JSON file if `--out` is given.

    Raises:
        BenchError: an argument, or a file that it names, is wrong.
        SystemExit: there is no page to rewrite.
    """
    if given.show:
        print(format_record(read_record(given.show)))
    elif given.trend:
        print(format_trend(given.trend))
    elif given.page:
        rewrite_page(ROOT / "docs" / "cost.md", ROOT / "benchmarks")
    else:
        run_benchmark(given)


def rewrite_page(page: Path, folder: Path) -> None:
    """Replace the tables of the page of costs by those of a folder's files.

    Raises:
        SystemExit: there is no such page, as next to an installed package.
    """
    if not page.is_file():
        raise SystemExit(f"--page: {page} is not there; only the repository has it")
    replace_text(page, update_page(page.read_text("utf-8"), format_page_tables(folder)))


def run_benchmark(given: argparse.Namespace) -> None:
    """Measure, write and print.

    Raises:
        BenchError: an argument is wrong.
    """
    device = torch.device(given.device)
    record = create_record(device)
    if given.out:
        check_folder(record, given.out)
    print(f"{record['hardware']}\n", flush=True)
    if given.threads:
        record["threads"] = measure_threads(given.width[0], given.tokens[0], given.repeats)
        if given.out:
            write_record(record, given.out)
        print(format_threads(record["threads"]))
        return
    for case in list_cases(given, device):
        conditions = {"rank": given.rank, "repeats": given.repeats, "load_before": os.getloadavg()[0]}
        conditions |= {"torch": torch.__version__, "peft": peft.__version__}
        rows = measure_case(case, given.rank, given.repeats, device)
        record["cases"][case.name] = {**conditions, "rows": [asdict(row) for row in rows]}
        if given.out:
            write_record(record, given.out)
        print(f"{case.name}\n\n{format_table(rows)}\n", flush=True)


def list_cases(given: argparse.Namespace, device: torch.device) -> list[Case]:
    """Return the layers, or the models, that the arguments name.

    Raises:
        BenchError: a model or the shape of a batch is missing.
    """
    dtype = getattr(torch, given.dtype)
    if not given.model:
        return [build_layer_case(width, tokens, dtype, device) for width in given.width for tokens in given.tokens]
    if len(given.batch) not in (1, len(given.model)):
        raise BenchError(f"--batch: give one shape, or one for each of the {len(given.model)} models")
    if odd := [folder for folder in given.model if not (Path(folder) / "config.json").is_file()]:
        raise BenchError(f"--model {odd[0]}: no config.json there; give the folder of a saved Hugging Face model")
    shapes = given.batch * len(given.model) if len(given.batch) == 1 else given.batch
    try:
        return [build_model_case(path, shape, dtype, device) for path, shape in zip(given.model, shapes, strict=True)]
    except (OSError, ValueError) as error:
        raise BenchError(f"--model: cannot be read ({str(error).splitlines()[0]})") from error


if __name__ == "__main__":
    main()
