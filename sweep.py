"""Run what a table or figure needs, then write its report below runs/.

    python sweep.py experiment=NAME                 every missing run, then the report
    python sweep.py experiment=NAME run=false       the report again, from the records alone
    python sweep.py experiment=NAME KEY=VALUE ...   with further settings for every run, as for train.py
    python sweep.py experiment=NAME hydra/launcher=workstation|slurm     several runs at once, or on a cluster

conf/experiment/ holds the experiments; each file says what it asks, the command, how long it takes and what to expect.
"""

import os
import signal
import sys

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C waits for `run_command`, which answers it
os.environ.setdefault("DUAL_LORA_LAZY", "1")  # settings are checked before torch is imported
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH leaves it out

from dual_lora.lab.commands.guard import run_command


def main(argv: list[str]) -> int:
    """Import the command, guarded like all that it does, and run it."""
    if {"-h", "--help"} & set(argv):
        from dual_lora.lab.config.paths import list_choices

        print(f"{__doc__}\nKnown experiments: {', '.join(list_choices('experiment'))}")
        return 0
    from dual_lora.lab.commands.sweep import sweep_command

    return sweep_command(argv)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
