"""What an adapter costs: LoRA, DoRA, LoHa and Dual LoRA side by side in one run; `python -m dual_lora.bench --help`."""
