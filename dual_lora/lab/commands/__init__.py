"""What train.py, eval.py and sweep.py do."""
