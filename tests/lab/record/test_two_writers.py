"""Two commands about one run at the same time: one does it, and the other's exit code says that it did not."""

import pytest

from dual_lora.lab.config.recorded import load_recorded_settings, replace_settings
from dual_lora.lab.errors import EXIT_ELSEWHERE, EXIT_OK
from dual_lora.lab.record.run import Run
from dual_lora.lab.study.execute import execute_run, report_failures
from dual_lora.lab.system.lock import hold_lock


@pytest.mark.parametrize(("force", "code"), [(True, EXIT_ELSEWHERE), (False, EXIT_OK)])
def test_a_forced_run_that_another_process_holds_is_not_done(force, code, record):
    settings = replace_settings(load_recorded_settings(record.folder), {"force": force})
    run = Run.prepare(settings)
    before = run.record.read_result()
    with hold_lock(run.record.folder):
        execute_run(run)
        assert report_failures([run]) == code
    assert run.record.read_result() == before
