#!/bin/sh
# LoRA and Dual LoRA on your own CSV, two seeds each, then a report and a table.
#
#     sh examples/classify_your_csv.sh                             240 reviews, a bundled model: shows that it works
#     sh examples/classify_your_csv.sh DIR MODEL [KEY=VALUE ...]
#
# DIR holds train.csv and perhaps test.csv, with columns text and label: docs/own-data.md. MODEL is a folder, a hub name or
# a name of conf/model. KEY=VALUE is a setting of every run, such as train.lr=5e-4 or task.options.text=review.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
data=${1:-$root/examples/reviews}
model=${2:-tiny-roberta}
shift $(($# < 2 ? $# : 2))
set -- study=classify_your_csv task=classification "model=$model" "data_dir=$data" "$@"

# Four runs. Finished ones are skipped, so the same command resumes what was stopped.
"$python" "$root/train.py" -m method=lora,dual_lora seed=0,1 "$@"

# Their report, from the records alone; its last line names the folder.
report=$("$python" "$root/sweep.py" --config-dir "$root/examples/settings" experiment=classify_your_csv run=false "$@")
echo
echo "$report" | tail -n 1
