#!/usr/bin/env bash
# One journey from data to a recogniser: scripts/demo.sh fashion-mnist|photos RECIPE
# Each verb is shown as a person would type it. Run again, it goes on where it stopped.
set -euo pipefail
data=$1
recipe=$2
venv=${VENV:-.venv}
demo=${DEMO:-demo}
manyeyes=$venv/bin/manyeyes
mkdir -p "$demo"

show() {
    printf '\n\033[1m$ manyeyes'
    printf ' %q' "$@"
    printf '\033[0m\n'
    "$manyeyes" "$@"
}

source_file=$demo/source/$data.source
[ -s "$source_file" ] || "$venv/bin/python" scripts/demo_data.py "$data" "$demo/source" >/dev/null
source=$(cat "$source_file")
dataset=$demo/$data
run=$demo/runs/$recipe
bundle=$demo/bundles/$recipe

case $data in
fashion-mnist) show ingest "$source" "$dataset" --class-names "$demo/source/class_names.txt" ;;
photos) show ingest "$source" "$dataset" --size 224 --encoding raw --fit pad --test 0.2 ;;
esac
if [ -f "$run/config.json" ]; then
    show train "$dataset" --recipe "configs/$recipe.toml" --out "$run" --resume
else
    show train "$dataset" --recipe "configs/$recipe.toml" --out "$run"
fi
show evaluate "$run" "$dataset" --split test
[ -f "$bundle/bundle.json" ] || show export "$run" "$bundle"
show predict "$bundle" "$dataset" "$demo/predictions-$recipe.jsonl" --split test

printf '\nThe recogniser is in %s. Serve it, then drop an image on its page:\n\n  %s serve %s\n\n' "$bundle" "$manyeyes" "$bundle"
