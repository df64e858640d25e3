"""An adapter saved by one release of PEFT loads in another and computes the same."""

import os
import subprocess
import sys

import peft
import pytest

OLDER = ["0.19.1", "0.20.0"]


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    """{release: folder it is installed in, None for the one at hand}."""
    folders = {peft.__version__: None}
    for version in OLDER:
        folders[version] = tmp_path_factory.mktemp(version)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folders[version]]
        subprocess.run([*pip, f"peft=={version}"], check=True)
    return folders


def run(action, folder, site):
    path = os.pathsep.join(filter(None, [site and str(site), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "tests.tuner.version_worker", action, str(folder)]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.split()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("older", OLDER)
def test_saved_by_one_release_and_loaded_by_another(older, releases, tmp_path):
    here = peft.__version__
    for writer, reader in ((here, older), (older, here)):
        folder = tmp_path / writer
        assert run("write", folder, releases[writer]) == writer
        assert run("read", folder, releases[reader]) == reader
