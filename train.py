"""Adapt a model to a task with a method and keep a record of it. `python train.py --help` shows what there is.

python train.py
python train.py model=llama3-8b task=glue/rte method=dual_lora
python train.py -m method=lora,lora_plus,dora,dual_lora seed=0,1,2
"""

import os
import sys

os.environ.setdefault("DUAL_LORA_LAZY", "1")  # settings are checked before torch is imported

from dual_lora.lab.system.threads import configure_threads

configure_threads()  # read by OpenMP when torch is imported

from dual_lora.lab.commands.guard import run_command
from dual_lora.lab.commands.train import train_command

if __name__ == "__main__":
    run_command(train_command, sys.argv[1:])
