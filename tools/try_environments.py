"""Run the method's tests in other environments: with the oldest and the newest torch and PEFT that pyproject.toml
allows, and in the tools of its extra `tools`.

python -m tools.try_environments [oldest] [newest] [tools] [--keep FOLDER]      all three, if none is named

Each environment is new and temporary, unless --keep names a folder. `oldest` and `newest` hold what `pip install .`
brings, and pytest. pip takes CUDA builds of torch (several GB) unless its settings offer others, such as
PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu. `tools` sees the packages of this environment and adds the
extra, within constraints.txt: pip fails if the pinned versions do not fit together.
"""

import argparse
import contextlib
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What the oldest torch and PEFT met when they were new. Later releases of these broke them: PEFT 0.19 cannot wrap T5 of
# transformers 5.24, and Triton's interpreter in torch 2.7 fails on NumPy 2.4.
CONTEMPORARIES = ["transformers==5.0.0", "numpy==2.2.6"]
LATEST = ["--upgrade", "--upgrade-strategy", "eager"]  # also in an environment that was kept
SHOW_VERSIONS = """
import sys
from importlib import import_module, metadata
for name in sys.argv[1:]:
    import_module(name)  # tests would skip one that cannot be imported
print(*(f"{name} {metadata.version(name)}" for name in sys.argv[1:]), sep=", ")
"""


@dataclass(frozen=True)
class Environment:
    """What pip is asked to install, the packages that are shown, and the tests; `extends`: it sees the packages of this
    environment."""

    install: list[str]
    packages: list[str]
    tests: list[str]
    extends: bool = False


def read_project() -> dict:
    """Return the table `project` of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def list_floors() -> list[str]:
    """Return the oldest torch and PEFT that pyproject.toml allows, as pip's requirements."""
    bounds = (dependency.partition(">=") for dependency in read_project()["dependencies"])
    oldest = {name: bound.split(",")[0] for name, _, bound in bounds}
    return [f"{name}=={oldest[name]}" for name in ("torch", "peft")]


def list_environments() -> dict[str, Environment]:
    """Return the environments by name."""
    method = [*LATEST, str(ROOT), "pytest", "pytest-timeout"]
    shown, tests = ["torch", "peft", "transformers", "numpy"], ["tests/tuner", "tests/kernels"]
    extra = ["-c", "constraints.txt", *read_project()["optional-dependencies"]["tools"]]
    tools = ["trl", "lm_eval", "torch", "transformers", "peft", "datasets"]
    return {
        "oldest": Environment([*method, *list_floors(), *CONTEMPORARIES], shown, tests),
        "newest": Environment(method, shown, tests),
        "tools": Environment(extra, tools, ["tests/pages/test_other_tools.py"], extends=True),
    }


def run_tests(folder: Path, environment: Environment) -> int:
    """Make an environment in a folder, or bring it up to date, print what it holds, run the tests in it and return
    pytest's exit code.

    Raises:
        subprocess.CalledProcessError: pip cannot install it, or a package cannot be imported.
    """
    python = str(folder / "bin" / "python")
    if not Path(python).exists():
        venv.create(folder, with_pip=True)
    if environment.extends:
        (packages,) = (folder / "lib").glob("python*/site-packages")
        (packages / "packages.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", "utf-8")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *environment.install]
    subprocess.run(install, cwd=ROOT, check=True)
    subprocess.run([python, "-c", SHOW_VERSIONS, *environment.packages], check=True)
    return subprocess.run([python, "-m", "pytest", "-rs", *environment.tests], cwd=ROOT).returncode


def main() -> int:
    """Test the environments that are named, all if none is, and return the first exit code that is not 0."""
    environments = list_environments()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("environments", nargs="*", default=[*environments], metavar="|".join(environments))
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
