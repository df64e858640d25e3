"""`sweep.py`: run what an experiment needs, then write its report."""

import sys

from dual_lora.lab.commands.cell_study import CellStudy, is_forced
from dual_lora.lab.commands.guard import describe_end
from dual_lora.lab.config import paths
from dual_lora.lab.config.outside.models import print_found_models
from dual_lora.lab.config.outside.words import take_outside_words
from dual_lora.lab.config.overrides import parse_overrides, parse_switch, split_words
from dual_lora.lab.config.paths import list_choices
from dual_lora.lab.config.secrets import redact_secrets
from dual_lora.lab.errors import EXIT_OK, EXIT_USER, choose_exit_code, require
from dual_lora.lab.study.experiment import Cell, Experiment
from dual_lora.lab.study.launch.command import check_launcher, select_launcher_words
from dual_lora.lab.study.outcome import Outcome, find_outcomes
from dual_lora.lab.study.schedule import run_cells
from dual_lora.lab.system.distributed import check_process_count, is_first_process
from dual_lora.lab.system.files import remove_temporary_files, translate_write_errors
from dual_lora.lab.system.lock import hold_lock
from dual_lora.lab.system.signals import STOP

OWN_WORDS = ("experiment", "scale", "run")  # all other words are settings of every run


def sweep_command(argv: list[str]) -> int:
    """Do what `sweep.py` is asked: run the missing cells (unless run=false) of one or more experiments, then write the
    reports; return the exit code. All cells are composed and checked before the first one runs.

    Raises:
        UserError: the command line or an experiment's file is wrong.
    """
    argv = take_outside_words(argv)
    own = [a for a in argv if a.partition("=")[0] in OWN_WORDS or "=" not in a]
    given = split_words(own, OWN_WORDS, "sweep.py", first="experiment")
    require("experiment" in given, f"experiment=NAME is needed; known: {', '.join(list_choices('experiment'))}")
    run = parse_switch("run", given.get("run", "true"))
    launcher = select_launcher_words(argv)
    extra = [a for a in argv if a not in launcher and a not in own]
    parse_overrides(launcher)
    check_launcher(argv)
    every = given["experiment"] == "all"  # then other words need not apply to each of them
    names = list_choices("experiment") if every else given["experiment"].split(",")
    cell_studies = {name: study for name in names if (study := CellStudy.find(name, given.get("scale")))}
    for study in cell_studies.values() if not every else ():
        study.check_words(extra, launcher)
    force = bool(cell_studies) and is_forced(extra)
    asked_for = [Experiment.load(name, given.get("scale")) for name in names if name not in cell_studies]
    composed = [(experiment, experiment.compose_cells(extra)) for experiment in asked_for]
    print_found_models()
    if any(cell.settings.plan for _, cells in composed for cell in cells):
        require(not launcher, "hydra/launcher: plans are made in this process; drop it")
        from dual_lora.lab.study.plans import plan_experiments

        return plan_experiments(composed)
    forced = force or any(cell.settings.force for _, cells in composed for cell in cells)
    require(run or not forced, "run=false force=true: nothing is to run; drop one")
    STOP.repeats = forced
    for cell in [cell for _, cells in composed for cell in cells if run]:
        check_process_count(cell.settings)
        cell.settings.check_installed()
    codes = [study.run(run, force) for study in cell_studies.values()]
    codes += [run_experiment(experiment, cells, launcher if run else None) for experiment, cells in composed]
    return choose_exit_code(codes)


def run_experiment(experiment: Experiment, cells: list[Cell], launcher: list[str] | None) -> int:
    """Run what is missing of an experiment, write its report, print it and return the exit code.

    launcher: the words that choose a launcher; None: run nothing.
    """
    study, run = cells[0].settings.study, launcher is not None
    code = run_cells(cells, study, launcher) if run else EXIT_OK
    if not is_first_process():
        return code
    try:
        reported = report_experiment(experiment, cells, run)
    except Exception as error:  # one failing report must not cost the others
        reported, reason = describe_end(error)
        print(f"{experiment.name}: no report: {redact_secrets(reason)}", file=sys.stderr)
    return code or reported


def report_experiment(experiment: Experiment, cells: list[Cell], run: bool) -> int:
    """Write an experiment's report from the records, print it and return the exit code.

    run: true: also analyse the runs that are not analysed yet, and mirror the report.
    """
    from dual_lora.lab.report.write import Findings, choose_folder, mirror_report, write_report

    study = cells[0].settings.study
    home = paths.RUNS / experiment.find_report_study(study)
    analysed = analyse_outcomes(experiment, find_outcomes(cells, study)) if experiment.analyse and run else EXIT_OK
    # Without the lock, the older of two reports could be written last, or one replace another that it did not see. All
    # reports in a study's folder have this one, because where a report is written depends on the others.
    with hold_lock(home / "report", wait=True), translate_write_errors(home):
        folder = choose_folder(experiment, cells, home)
        folder.mkdir(exist_ok=True)
        remove_temporary_files(folder)
        outcomes = find_outcomes(cells, study)
        findings = Findings.compute(experiment, outcomes)
        print(write_report(experiment, outcomes, folder, findings))
    for trouble in findings.unreadable:
        print(f"not read: {trouble}", file=sys.stderr)
    if run:
        mirror_report(experiment, outcomes, folder, findings.values)
    missing = run and any(outcome.result is None for outcome in outcomes)
    return choose_exit_code([analysed, EXIT_USER if missing or findings.unreadable else EXIT_OK])


def analyse_outcomes(experiment: Experiment, outcomes: list[Outcome]) -> int:
    """Analyse the runs that are not analysed yet, print why one could not be, and return the exit code."""
    from dual_lora.lab.report.analyses.kinds import analyse_missing

    codes = []
    for outcome in outcomes:
        try:
            analyse_missing(experiment, outcome, outcomes)
        except Exception as error:  # one failing analysis must not cost the others
            code, reason = describe_end(error)
            print(f"not analysed: {outcome.record.name}: {redact_secrets(reason)}", file=sys.stderr)
            codes.append(code)
    return choose_exit_code(codes)
