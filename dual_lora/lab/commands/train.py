"""`train.py`: check the command line, then train, plan, or show the settings (--cfg)."""

import sys
from dataclasses import replace
from typing import Any

import tasks
from dual_lora.lab.commands.guard import describe_end
from dual_lora.lab.config import paths
from dual_lora.lab.config.compatibility import check_untrained
from dual_lora.lab.config.compose import check_length, load_settings
from dual_lora.lab.config.outside.models import found_models, print_found_models
from dual_lora.lab.config.outside.words import take_outside_words
from dual_lora.lab.config.overrides import parse_override, parse_overrides
from dual_lora.lab.config.recorded import format_settings
from dual_lora.lab.config.schema import Settings, get_setting
from dual_lora.lab.config.secrets import redact_secrets
from dual_lora.lab.errors import EXIT_OK, choose_exit_code, get_first_line, require
from dual_lora.lab.record.identity import NOT_IDENTITY
from dual_lora.lab.record.run import Run, prepare_runs
from dual_lora.lab.study.execute import execute_run, report_failures
from dual_lora.lab.study.launch.command import check_launcher, launch_runs, select_launcher_words, uses_launcher
from dual_lora.lab.study.listing import format_plans, format_results
from dual_lora.lab.study.schedule import run_in_process
from dual_lora.lab.study.time_left import TimeLeft
from dual_lora.lab.system.distributed import check_process_count, is_first_process
from dual_lora.lab.system.libraries import import_heavy_libraries
from dual_lora.lab.system.signals import STOP

# Hydra's options that only show something. Its other options are refused: some can load code.
HYDRA_FLAGS = {"--hydra-help", "--version", "--cfg", "-c", "--resolve"}
CFG_FLAGS = {"--cfg", "-c"}
HELP = {"--help", "-h"}
MULTIRUN = {"-m", "--multirun"}
NAMED_GROUPS = ("method.", "train.")


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
    found = [load_settings([word for word in job if not select_launcher_words([word])]) for job in jobs]
    require(len({settings.plan for settings in found}) == 1, "plan: true for all runs or for none")
    check_untrained(found, jobs)
    for settings, job in zip(found, jobs, strict=True):
        check_length(settings, job)
        if not settings.plan:
            check_process_count(settings)
            settings.check_installed()
    runs = prepare_runs(found)  # hashes data and weights, which must be there
    if len(jobs) == 1:
        runs = [replace(runs[0], differences=select_named_settings(found[0], jobs[0]))]
    for run in runs:
        run.record.finish_cleanup()
        if not run.settings.force:
            run.record.read_finished()  # a damaged one is refused before the first run
    return runs


def select_named_settings(settings: Settings, words: list[str]) -> dict[str, Any]:
    """Return the settings of method and training that the command line of a single run gives, by full name: its
    headline names them, as those of several runs name what varies."""
    keys = [key for key in (parse_override(word).key_or_group for word in words) if key.startswith(NAMED_GROUPS)]
    left_out = {f"train.{key}" for key in NOT_IDENTITY["train"]}
    return {key: get_setting(settings, key) for key in keys if key not in left_out}


def split_hydra_options(argv: list[str]) -> tuple[set[str], str | None, list[str]]:
    """Return the options of a command line, the word after --cfg if there is one, and the other words."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("-") else [word])]
    place = next((place for place, word in enumerate(words) if word in CFG_FLAGS), None)
    shown = None if place is None or place + 1 == len(words) else words.pop(place + 1)
    return {word for word in words if word.startswith("-")}, shown, [w for w in words if not w.startswith("-")]


def asks_hydra(argv: list[str]) -> bool:
    """Return whether the settings, or what Hydra has to show, are to be shown rather than anything run.

    Raises:
        UserError: it is to do more than that, or to show settings that are wrong.
    """
    flags, shown, words = split_hydra_options(argv)
    require(not flags & HELP, "--help: takes no other words; --cfg job KEY=VALUE shows the values of a run")
    if not flags & HYDRA_FLAGS:
        return False
    for flag in flags:
        require(flag in HYDRA_FLAGS, f"{flag}: no such option here; Hydra's own are {', '.join(sorted(HYDRA_FLAGS))}")
    cfg = bool(flags & CFG_FLAGS)
    require(cfg or "--resolve" not in flags, "--resolve: only with --cfg; --cfg job shows the values of a run")
    named = f"--cfg {shown}" if shown else "--cfg"
    remedy = "job shows the values of a run, hydra Hydra's own; take --cfg job"
    require(not cfg or shown in ("job", "hydra"), f"{named}: {remedy}")
    jobs = parse_overrides(words)
    require(len(jobs) == 1, f"{len(jobs)} runs asked for: {min(flags)} shows one; give single values")
    load_settings([word for word in jobs[0] if not select_launcher_words([word])])
    return True


def show_hydra(argv: list[str]) -> None:
    """Print the settings of a run as its record would hold them (--cfg job), or let Hydra show its own. Hydra would
    print the settings as composed, before some follow from others (`build_settings`), and it does not know models,
    settings and code from outside of conf/.

    Raises:
        UserError: it asks for Hydra's own of a run with these.
    """
    flags, shown, words = split_hydra_options(argv)
    settings = load_settings([word for word in words if not select_launcher_words([word])])
    if shown == "job":
        print(format_settings(settings), end="")
        return
    outside = paths.own_folders or tasks.plugins or found_models
    require(not outside, f"{min(flags)}: Hydra does not know what lies outside of conf/; take --cfg job")
    import hydra

    hydra.main(version_base="1.3", config_path=str(paths.CONF), config_name="config")(lambda config: None)()


def train_command(argv: list[str]) -> int:
    """Check the command line and execute its runs, here or by a launcher; return the exit code.

    Raises:
        UserError: the command line is wrong, or a plan does not fit.
    """
    argv = take_outside_words(argv)
    if asks_hydra(argv):
        show_hydra(argv)
        return EXIT_OK
    runs, launcher = check_command(argv), select_launcher_words(argv)
    print_found_models()
    if runs[0].settings.plan:
        require(not launcher, "hydra/launcher: plans are made in this process; drop it")
        return plan_runs(runs)
    STOP.repeats = len(runs) > 1 and any(run.settings.force for run in runs)
    if uses_launcher(launcher):
        launch_runs(runs, launcher)
    elif len(runs) > 1:
        run_in_process(runs, TimeLeft())
    else:
        execute_run(runs[0])
    code = report_failures(runs)
    if len(runs) > 1 and is_first_process():
        print(f"\n{format_results(runs)}")
    return code


def plan_runs(runs: list[Run]) -> int:
    """Plan every run, print a table if there are several, and return the exit code. One failed plan does not stop the
    others.

    Raises:
        UserError: the only plan is refused.
    """
    drawn = [draw_plan(run, is_only=len(runs) == 1) for run in runs]
    plans, refusals, codes = zip(*drawn, strict=True)
    if len(runs) > 1:
        print(f"\n{format_plans(runs, plans, refusals)}")
    for run, refusal in zip(runs, refusals, strict=True):
        if refusal:
            print(redact_secrets(f"no plan: {run.label}: {refusal}"), file=sys.stderr)
    return choose_exit_code(codes)


def draw_plan(run: Run, is_only: bool) -> tuple[dict[str, Any] | None, str | None, int]:
    """Return the plan of a run if one can be made, why the run is refused if it is, and the exit code.

    Raises:
        UserError: the run is refused and the only one.
    """
    with import_heavy_libraries():
        from dual_lora.lab.train.plan import check_fit, make_plan

    plan = None
    try:
        plan = make_plan(run)
        check_fit(run.settings, plan)
        return plan, None, EXIT_OK
    except Exception as error:
        if is_only:
            raise
        code, reason = describe_end(error)
        return plan, get_first_line(reason), code
