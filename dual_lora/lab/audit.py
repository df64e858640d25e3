"""`make audit`: are the packages this project asks for pinned, installed as pinned, and free of known vulnerabilities?

The pins are checked from pyproject.toml and constraints.txt alone. Vulnerabilities are asked from PyPI by pip-audit;
where it is missing, or knows none of the packages because its service cannot be reached, one line says so.
"""

import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from dual_lora.lab.runs import ROOT
from dual_lora.lab.settings import first_line

SECONDS = 300  # for the service to tell of all packages
FREE = {"triton"}  # a CUDA build of torch brings its own


def requirements(root: Path) -> Iterator[Requirement]:
    """Yield what pyproject.toml asks for, extras included."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    for group in (project["dependencies"], *project["optional-dependencies"].values()):
        yield from (r for r in map(Requirement, group) if canonicalize_name(r.name) != project["name"])


def pins(root: Path) -> tuple[dict[str, str], list[str]]:
    """Return the pinned versions of constraints.txt by name, and every line that pins nothing."""
    found, odd = {}, []
    for line in (root / "constraints.txt").read_text().splitlines():
        text = line.partition("#")[0].strip()
        try:
            pin = Requirement(text) if text else None
        except InvalidRequirement:
            pin, odd = None, [*odd, text]
        specs = list(pin.specifier) if pin else []
        if pin and (pin.url or [s.operator for s in specs] != ["=="] or "*" in specs[0].version):
            odd.append(text)
        elif pin:
            found[canonicalize_name(pin.name)] = specs[0].version
    return found, odd


def faults(root: Path) -> list[str]:
    """Return what is wrong with the pins, a line each."""
    pinned, odd = pins(root)
    found = [f"constraints.txt: {line}: must be NAME==VERSION" for line in odd]
    for asked in requirements(root):
        name = canonicalize_name(asked.name)
        exact = [s.version for s in asked.specifier if s.operator == "=="]
        if asked.url:
            found.append(f"pyproject.toml: {asked.name}: from {asked.url}, not from an index")
        elif name in pinned and not asked.specifier.contains(pinned[name]):
            found.append(f"pyproject.toml: {asked}: constraints.txt has {pinned[name]}")
        elif name not in pinned and not exact and name not in FREE:
            found.append(f"pyproject.toml: {asked}: pinned nowhere; add it to constraints.txt")
    here = {name: installed(name) for name in pinned}
    other = [f"{n}: {here[n]} is installed, {pinned[n]} pinned" for n in pinned if here[n] not in (None, pinned[n])]
    return found + other


def installed(name: str) -> str | None:
    """Return a package's version without what marks the build (torch 2.13.0+cpu), None where it is not installed."""
    try:
        return Version(version(name)).public
    except PackageNotFoundError:
        return None


def known_vulnerabilities(root: Path) -> tuple[list[str], str | None]:
    """Return the vulnerabilities of the pinned versions, a line each, and why they could not be asked for, if so."""
    options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    command = [sys.executable, "-m", "pip_audit", "--requirement", str(root / "constraints.txt"), *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return [], f"no answer within {SECONDS} seconds"
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, LookupError, TypeError):
        return [], (done.stderr.strip().splitlines() or ["pip-audit said nothing"])[-1][:200]
    asked = [package for package in packages if "vulns" in package]
    if not asked:
        return [], first_line(packages[0].get("skip_reason", "no package was looked up") if packages else "no packages")
    lines = []
    for package in asked:
        for flaw in package["vulns"]:
            mend = ", ".join(flaw.get("fix_versions", [])) or "none yet"
            lines.append(f"{package['name']} {package['version']}: {flaw['id']}; mended in {mend}")
    missed = len(packages) - len(asked)
    return lines, f"{missed} of {len(packages)} packages are not known there" if missed else None


def main(root: Path = ROOT) -> int:
    """Print what was found, and return 1 if there is anything to mend."""
    wrong = faults(root)
    print(
        "\n".join(wrong) or f"pins: {len(pins(root)[0])} versions, every requirement is pinned and installed as pinned"
    )
    flaws, missing = known_vulnerabilities(root)
    for flaw in flaws:
        print(flaw)
    if missing:
        print(f"vulnerabilities: not all could be asked for, only the pins were checked ({missing})")
    elif not flaws:
        print("vulnerabilities: none known")
    return int(bool(wrong or flaws))


if __name__ == "__main__":
    sys.exit(main())
