"""Evaluate a finished run again, from its record alone.

    python eval.py run=runs/STUDY/ID
    python eval.py run=runs/STUDY/ID data_dir=DIR model.path=DIR eval.batch_size=8
    python eval.py run=runs/STUDY/ID export=DIR [model.dtype=bfloat16]
    python eval.py run=runs/STUDY/ID analyse=true [against=runs/STUDY/OTHER]
    python eval.py run=runs/STUDY/ID save_updates=FILE.safetensors

The scores are printed beside the recorded ones and kept as evaluation.json in the run's folder. data_dir and model.path
say where the files are now, if they moved. Another eval.batch_size changes no float32 score but by rounding; in 16 bits
more outputs are near ties, and a score may change a little.
With export=DIR nothing is evaluated: the model is written there with its adapter merged, for plain transformers to
load, and the adapter alone below DIR/adapter; how much the merge changed the logits is printed.
With analyse=true nothing is evaluated either, and no data is needed: ranks, zeros, flipped signs and histograms of what
the run did to each weight, beside those of random factors, are kept as analysis.json, analysis.csv and figures in the
run's folder; against=RUN adds the likeness to what another run of the same model did. save_updates=FILE writes dW of
every changed weight, by the name of its module.
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
        print(__doc__)
        return 0
    from dual_lora.lab.commands.evaluate import evaluate_command

    return evaluate_command(argv)


if __name__ == "__main__":
    run_command(main, sys.argv[1:])
