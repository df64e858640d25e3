# Two commands do all set-up: `make demo` and `make test`.
VENV ?= .venv
PY := $(VENV)/bin/python
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help env demo test test-unit test-slow test-slurm test-torch test-tools smoke chaos calibration gpu lint audit clean

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

env: $(VENV)/.ready  ## make the environment (.venv)

$(VENV)/.ready: pyproject.toml constraints.txt
	@for p in $(PYTHON) python3.13 python3.12 python3.11 python3 python; do \
	  "$$p" -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && found=$$p && break; \
	done; test -n "$$found" || { echo "make: needs Python 3.11, 3.12 or 3.13 with venv; name one with make PYTHON=..." >&2; exit 2; }; \
	test -x $(PY) || "$$found" -m venv $(VENV)
	@echo "installing into $(VENV) (about five minutes the first time)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

demo: env  ## adapt a bundled model to a demo task, about a minute
	$(PY) train.py

test: env  ## the test suite, 12 to 20 minutes on 2 cores
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --durations 25 --durations-min 5

# Without the harness: what a change of the method, its kernels, the statistics or the settings can break.
UNIT := tests/tuner tests/kernels tests/lab/statistics tests/tasks/test_measures.py tests/repository/test_structure.py
UNIT += tests/lab/commands/test_settings_help.py tests/lab/commands/test_startup.py tests/lab/config/test_overrides.py
UNIT += tests/paper/test_tables.py

test-unit: env  ## tuner, kernels, statistics and settings, about a minute on 2 cores
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal $(UNIT)

test-slow: env  ## the minutes-long tests
	$(PY) -m pytest -m slow

test-slurm: env  ## runs on a real Slurm of one node (Debian's packages, as root), minutes
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow tests/lab/study/test_slurm.py

test-torch: env  ## only the method, with the oldest and the newest torch and PEFT, minutes and several GB (network)
	OMP_NUM_THREADS=1 $(PY) -m tools.try_environments oldest newest

test-tools: env  ## the method in TRL and lm-evaluation-harness, installed in a temporary environment (network)
	OMP_NUM_THREADS=1 $(PY) -m tools.try_environments tools

smoke: env  ## every experiment with bundled models, report included, minutes
	$(PY) sweep.py experiment=all scale=smoke force=true wandb.mode=disabled

chaos: env  ## kill, starve and damage a small study in many ways, about 20 minutes
	$(PY) -m tests.chaos

calibration: env  ## simulate equal methods: are verdicts and intervals right as often as promised; minutes
	OMP_NUM_THREADS=1 $(PY) -m tools.calibrate

gpu: env  ## what only a GPU can show, written to benchmarks/; at most ten minutes, resumable
	$(PY) -m tools.gpu_check

lint: env  ## style checks
	$(VENV)/bin/ruff check .

audit: env  ## do the installed packages fit together, and are the pinned ones free of known vulnerabilities (network)
	$(PY) -m pip check
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[audit]'
	$(PY) -m pip_audit --no-deps --disable-pip --progress-spinner off --requirement constraints.txt

clean:  ## remove the environment and caches, never runs/
	rm -rf $(VENV) .pytest_cache .ruff_cache *.egg-info
