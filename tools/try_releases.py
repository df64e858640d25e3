"""Run the method's tests beside the oldest and the newest torch and PEFT that pyproject.toml allows.

python -m tools.try_releases [oldest] [newest] [--keep FOLDER]      `make test-torch` runs both

Each environment is new and temporary, unless --keep names a folder: what `pip install .` brings, and pytest. pip takes
CUDA builds of torch (several GB) unless its settings offer others, such as
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ["tests/tuner", "tests/kernels"]
# What the oldest torch and PEFT met when they were new. Later releases of these broke them: PEFT 0.19 cannot wrap T5 of
# transformers 5.24, and Triton's interpreter in torch 2.7 fails on NumPy 2.4.
CONTEMPORARIES = ["transformers==5.0.0", "numpy==2.2.6"]
SHOW_VERSIONS = """
from importlib.metadata import version
print(*(f"{name} {version(name)}" for name in ("torch", "peft", "transformers", "numpy")), sep=", ")
"""


def list_floors() -> list[str]:
    """Return the oldest torch and PEFT that pyproject.toml allows, as pip's requirements."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    oldest = {name: bounds.split(",")[0] for name, _, bounds in (d.partition(">=") for d in dependencies)}
    return [f"{name}=={oldest[name]}" for name in ("torch", "peft")]


def make_environment(folder: Path, pins: list[str]) -> Path:
    """Return the Python of an environment that holds the method, its newest dependencies within `pins`, and pytest.

    Raises:
        subprocess.CalledProcessError: pip cannot install them.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    newest = ["--upgrade", "--upgrade-strategy", "eager"]  # of an environment that was kept, too
    subprocess.run([*install, *newest, str(ROOT), "pytest", "pytest-timeout", *pins], check=True)
    return python


def run_tests(folder: Path, pins: list[str]) -> int:
    """Make an environment in a folder, print what it holds, run the tests in it and return pytest's exit code.

    Raises:
        subprocess.CalledProcessError: pip cannot install it.
    """
    python = make_environment(folder, pins)
    subprocess.run([str(python), "-c", SHOW_VERSIONS], check=True)
    return subprocess.run([str(python), "-m", "pytest", "-rs", *TESTS], cwd=ROOT).returncode


def main() -> int:
    """Test the environments that are named, all if none is, and return the first exit code that is not 0."""
    environments = {"oldest": [*list_floors(), *CONTEMPORARIES], "newest": []}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", default=[*environments], metavar="oldest|newest")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="make them there, keep them and use them again")
    given = parser.parse_args()
    if unknown := [name for name in given.environments if name not in environments]:
        parser.error(f"{unknown[0]}: no such environment; known: {', '.join(environments)}")
    codes = []
    for name in given.environments:
        with tempfile.TemporaryDirectory() if not given.keep else contextlib.nullcontext(given.keep / name) as folder:
            codes.append(run_tests(Path(folder), environments[name]))
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main())
