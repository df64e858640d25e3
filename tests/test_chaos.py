"""A few kills of the fault injection in tests/chaos.py; `make chaos` does all of it."""

import forked


def test_a_study_survives_a_few_kills():
    done = forked.run("tests/chaos.py", "--kills", "3", "--only", "kill")
    assert done.returncode == 0, done.stdout + done.stderr
