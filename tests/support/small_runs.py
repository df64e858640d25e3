"""Settings of runs that take seconds."""


def plan_run(run) -> None:
    """Plan a run and check that it fits, as train.py does with plan=true."""
    from dual_lora.lab.train.plan import check_fit, make_plan

    check_fit(run.settings, make_plan(run))
