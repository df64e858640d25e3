"""Run the method's tests beside the oldest and the newest torch and PEFT that pyproject.toml allows.

python -m tools.try_releases [oldest|newest]      `make test-torch` runs both

Each environment is new and temporary: what `pip install .` brings, and pytest. pip takes CUDA builds of torch (several
GB) unless its settings offer others, such as PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
"""

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
    """Return the Python of a new environment that holds the method, its dependencies within `pins`, and pytest.

    Raises:
        subprocess.CalledProcessError: pip cannot install them.
    """
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, str(ROOT), "pytest", "pytest-timeout", *pins], check=True)
    return python


def run_tests(pins: list[str]) -> int:
    """Make an environment, print what it holds, run the tests in it and return pytest's exit code.

    Raises:
        subprocess.CalledProcessError: pip cannot install it.
    """
    with tempfile.TemporaryDirectory() as folder:
        python = make_environment(Path(folder), pins)
        subprocess.run([str(python), "-c", SHOW_VERSIONS], check=True)
        return subprocess.run([str(python), "-m", "pytest", "-rs", *TESTS], cwd=ROOT).returncode


def main(which: list[str]) -> int:
    """Test the environments that are named, all if none is, and return the first exit code that is not 0."""
    environments = {"oldest": [*list_floors(), *CONTEMPORARIES], "newest": []}
    if unknown := [name for name in which if name not in environments]:
        sys.exit(f"{unknown[0]}: no such environment; known: {', '.join(environments)}")
    codes = [run_tests(environments[name]) for name in which or environments]
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
