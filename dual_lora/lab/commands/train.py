"""`train.py`: check the command line, then train, plan or show what Hydra is asked for."""

import hydra

from dual_lora.lab.config import paths
from dual_lora.lab.config.compose import load_settings, parse_overrides
from dual_lora.lab.errors import UserError, require
from dual_lora.lab.record.run import Run, prepare_runs
from dual_lora.lab.study.execute import EXIT_OK, execute_run, report_failures
from dual_lora.lab.study.launch import check_launcher, launch_runs, select_launcher_words, uses_launcher
from dual_lora.lab.system.distributed import check_process_count
from dual_lora.lab.system.libraries import import_heavy_libraries

# What Hydra is asked to show, and the words that say which; it has options that read files of code, too.
HYDRA_FLAGS = {"--help", "-h", "--hydra-help", "--version", "--info", "-i", "--cfg", "-c", "--resolve"}
HYDRA_WORDS = {"job", "hydra", "all", "config", "defaults", "defaults-tree", "plugins", "searchpath"}
MULTIRUN = {"-m", "--multirun"}


def check_command(argv: list[str]) -> list[Run]:
    """Return the runs a command line asks for; nothing heavy is loaded.

    Raises:
        UserError: a name, a value or a file is wrong.
    """
    for flag in (a for a in argv if a.startswith("-")):
        require(flag in MULTIRUN, f"{flag}: no such option; settings are KEY=VALUE, -m runs several, --help shows all")
    jobs = parse_overrides([a for a in argv if not a.startswith("-")])
    check_launcher(argv)
    many = bool(MULTIRUN & set(argv))
    require(many or len(jobs) == 1, f"{len(jobs)} runs asked for: add -m to run them all")
    found = [load_settings(job) for job in jobs]
    for settings in found:
        if not settings.plan:
            check_process_count(settings)
            settings.hardware.check_installed()
    runs = prepare_runs(found)  # hashes data and weights, which must be there
    for run in runs:
        if not run.settings.force:
            run.record.read_finished()
    return runs


def asks_hydra(argv: list[str]) -> bool:
    """Return whether Hydra is to show something rather than to run anything.

    Raises:
        UserError: it is to do more than that, or to show settings that are wrong.
    """
    flags = {a.partition("=")[0] for a in argv if a.startswith("-")}
    if not flags & HYDRA_FLAGS:
        return False
    for flag in flags - MULTIRUN:
        require(flag in HYDRA_FLAGS, f"{flag}: no such option; of Hydra's own {', '.join(sorted(HYDRA_FLAGS))}")
    for job in parse_overrides([a for a in argv if not a.startswith("-") and a not in HYDRA_WORDS]):
        load_settings(job)
    return True


def show_hydra() -> None:
    """Let Hydra show what the command line asks it for: help, the composed config, its own settings."""
    hydra.main(version_base="1.3", config_path=str(paths.CONF), config_name="config")(lambda config: None)()


def train_command(argv: list[str]) -> int:
    """Check the command line and execute its runs, here or by a launcher; return the exit code.

    Raises:
        UserError: the command line is wrong, or a plan does not fit.
    """
    if asks_hydra(argv):
        show_hydra()
        return EXIT_OK
    runs, launcher = check_command(argv), select_launcher_words(argv)
    if any(run.settings.plan for run in runs):
        return plan_runs(runs)
    if uses_launcher(launcher):
        launch_runs(runs, launcher)
    else:
        for run in runs:
            execute_run(run)
    return report_failures(runs)


def plan_runs(runs: list[Run]) -> int:
    """Plan every run, and say in the end which do not fit.

    Raises:
        UserError: what one refused plan, or several, would need.
    """
    with import_heavy_libraries():
        from dual_lora.lab.train.plan import plan_run

    require(all(run.settings.plan for run in runs), "plan: true for all runs or for none")
    refused = []
    for run in runs:
        try:
            plan_run(run)
        except UserError as error:
            refused.append(str(error))
    require(not refused, "\n".join(refused))
    return EXIT_OK
