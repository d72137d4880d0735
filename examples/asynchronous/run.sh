#!/usr/bin/env bash
# The tiny task with one SGLang server beside the trainer: synchronously, and asynchronously with two bounds.
#
#   bash examples/asynchronous/run.sh
#   STALENESS="0 2" bash examples/asynchronous/run.sh steps=10     other bounds, and overrides
#
# Runs go to runs/staleness_0, runs/staleness_1, ...; finished ones are left as they are.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
config=examples/asynchronous/run.yaml
export CUDA_VISIBLE_DEVICES='' # the server is started for a CPU
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

dsrl serve "$config" --port 30000 &
server=$!
trap 'kill "$server"; wait "$server" || true' EXIT

runs=()
for staleness in ${STALENESS:-0 1 2}; do
  dsrl train "$config" "name=staleness_$staleness" "rollout.max_staleness=$staleness" "$@"
  runs+=("runs/staleness_$staleness")
done
python -m examples.asynchronous.table "${runs[@]}"
dsrl compare "${runs[@]}" --output runs/asynchronous
