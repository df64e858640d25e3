"""Runs PEFT's own test matrix on DualLoraConfig.

    python -m tests.peft_suite.runner [--groups custom,config,...] [-k EXPRESSION] [--work DIR]

The tests are those of the installed PEFT: its source distribution is fetched with pip, and its tests/ folder is
unpacked in a scratch folder (--work keeps it). `plugin.py` puts our cases where PEFT's tests have their list of
methods. No network is used beyond that: models are small random ones, written to the scratch folder.

Prints `N passed, N failed, N skipped`; fails when a test fails that KNOWN_FAILURES does not name, or none has passed.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
GROUPS = {
    "custom": "test_custom_models",
    "config": "test_config",
    "decoder": "test_decoder_models",
    "encoder_decoder": "test_encoder_decoder_models",
    "feature_extraction": "test_feature_extraction_models",
    "sequence_classification": "test_seq_classifier",
    "token_classification": "test_token_classification_qa",
    "quantization": "test_quantization",
}
# test name -> why it cannot pass. Each reason has a test of its own under tests/tuner.
KNOWN_FAILURES: dict[str, str] = {}
INI = "[pytest]\naddopts =\nmarkers =\n single_gpu_tests\n multi_gpu_tests\n regression\n bitsandbytes\n"


def fetch_tests(work: Path) -> Path:
    """The tests/ folder of the installed PEFT's source distribution, in work."""
    tests = work / "tests"
    if tests.exists():
        return tests
    requirement = f"peft=={importlib.metadata.version('peft')}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=peft", requirement]
    subprocess.run([*pip, "--dest", work], check=True)
    (archive,) = work.glob("peft-*.tar.gz")
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            root, _, inside = member.name.partition("/")
            if inside.startswith("tests/"):
                member.name = inside
                tar.extract(member, work, filter="data")
    (tests / "__init__.py").touch()  # the tests import each other relatively, the archive lacks this file
    (tests / "conftest.py").unlink(missing_ok=True)
    return tests


def run(groups: list[str], work: Path, expression: str | None = None) -> dict[str, str]:
    """Run the groups this PEFT has; {test id: passed, failed or skipped}."""
    tests = fetch_tests(work)
    (work / "suite.ini").write_text(INI)
    outcomes = work / "outcomes.json"
    outcomes.unlink(missing_ok=True)
    path = [work, *filter(None, [os.environ.get("PYTHONPATH")]), REPOSITORY / "tests", REPOSITORY]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PEFT_SUITE_WORK": str(work),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    files = [tests / f"{GROUPS[group]}.py" for group in groups]
    command = [sys.executable, "-m", "pytest", "-c", "suite.ini", "--rootdir", ".", "-p", "peft_suite.plugin"]
    command += [
        "-p",
        "no:cacheprovider",
        "-q",
        "--tb=short",
        "-W",
        "ignore",
        *(["-k", expression] if expression else []),
    ]
    subprocess.run([*command, *(f for f in files if f.exists())], env=env, cwd=work)
    if not outcomes.exists():
        raise RuntimeError("pytest did not get as far as running tests; see its output above")
    return json.loads(outcomes.read_text())


def unexpected(outcomes: dict[str, str]) -> list[str]:
    """The failures that KNOWN_FAILURES does not name."""
    return [name for name, outcome in outcomes.items() if outcome == "failed" and name not in KNOWN_FAILURES]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", default=",".join(GROUPS), help="comma-separated: " + ", ".join(GROUPS))
    parser.add_argument("--work", type=Path, help="scratch folder to keep")
    parser.add_argument("-k", dest="expression", help="pytest -k expression")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        work = (arguments.work or Path(scratch)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        outcomes = run(arguments.groups.split(","), work, arguments.expression)
    counts = {kind: list(outcomes.values()).count(kind) for kind in ("passed", "failed", "skipped")}
    print(", ".join(f"{n} {kind}" for kind, n in counts.items()))
    return int(bool(unexpected(outcomes)) or not counts["passed"])


if __name__ == "__main__":
    sys.exit(main())
