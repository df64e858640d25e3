"""Adapt a model to a task with a method and keep a record of it. `python train.py --help` shows what there is.

python train.py
python train.py model=llama3-8b task=glue/rte method=dual_lora
python train.py -m method=lora,lora_plus,dora,dual_lora seed=0,1,2
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
    if argv in (["--help"], ["-h"]):  # answered before anything slow is imported
        from dual_lora.lab.commands.settings_help import render_help

        print(render_help())
        return 0
    from dual_lora.lab.commands.train import train_command

    return train_command(argv)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
