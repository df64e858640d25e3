"""Run the tests of the method in other tools, with the extra `tools` of pyproject.toml installed.

python -m tools.try_tools      `make test-tools` runs it

The environment is new and temporary. It sees the packages of this one and adds only what the extra lacks, within
constraints.txt: pip fails if the pinned versions do not fit together.
"""

import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = ["tests/test_in_other_tools.py"]
SHOW_VERSIONS = """
import lm_eval, trl  # the tests would skip what is missing
from importlib.metadata import version
names = ("trl", "lm_eval", "torch", "transformers", "peft", "datasets")
print(*(f"{name} {version(name)}" for name in names), sep=", ")
"""


def list_requirements() -> list[str]:
    """Return what the extra consists of, as pip's requirements."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["tools"]


def make_environment(folder: Path) -> Path:
    """Return the Python of a new environment that holds this one's packages and the extra.

    Raises:
        subprocess.CalledProcessError: pip cannot install it.
    """
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    (there,) = (folder / "lib").glob("python*/site-packages")
    (there / "packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", "constraints.txt"]
    subprocess.run([*install, *list_requirements()], cwd=ROOT, check=True)
    return python


def main() -> int:
    """Make the environment, print its versions, run the tests and return pytest's exit code.

    Raises:
        subprocess.CalledProcessError: pip cannot install the extra, or it cannot be imported.
    """
    with tempfile.TemporaryDirectory() as folder:
        python = make_environment(Path(folder))
        subprocess.run([str(python), "-c", SHOW_VERSIONS], check=True)
        return subprocess.run([str(python), "-m", "pytest", "-q", "-rs", *TESTS], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
