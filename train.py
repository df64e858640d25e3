"""Adapt a model to a task with a method and keep a record of it. `python train.py --help` shows what there is.

python train.py
python train.py model=llama3-8b task=glue/rte method=dual_lora
python train.py -m method=lora,lora_plus,dora,dual_lora seed=0,1,2
"""

import os

os.environ.setdefault("DUAL_LORA_LAZY", "1")  # settings are checked before torch is imported

import hydra
from omegaconf import DictConfig

from dual_lora.lab import cli


@hydra.main(version_base="1.3", config_path=str(cli.CONF), config_name="config")
def job(config: DictConfig) -> None:
    cli.attempt(cli.settings(config))


if __name__ == "__main__":
    cli.guard(cli.train, job)
