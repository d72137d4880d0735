#!/usr/bin/env bash
# What every job does, in order (STEPS): environment check, configuration check, model and data from the hub, HF ->
# Megatron conversion, training, evaluation, report. The job scripts set their variables and source this file. Whatever
# is done already is skipped, so that a job that was requeued, or submitted again, continues where the last one stopped.
#
# How training and evaluation end, and what the job makes of it:
#   0      done
#   2      a mistake in the configuration: the job fails with the message
#   75     asked to stop (preemption, time limit), state saved: the job requeues itself
#   138    ended by USR1: an evaluation, whose finished samples are on disk always, or anything that was still starting;
#          the job requeues itself
#   other  a crash (a node, an engine, out of memory): requeued while it gets further, and at most MAX_CRASHES times in
#          a row without a new checkpoint or sample. 143, ended by TERM, is one of them: srun ends the ranks that are
#          left by TERM when one has crashed, and reports the highest status.
# The steps of a single process are repeated if they are ended by USR1 or TERM; when they fail, the job does.
#
# Variables (dsrl_8b.sh explains them): DSRL_ROOT, CONFIG, RUN_NAME, OUTPUT_DIR, MEGATRON_FOLDER, OVERRIDES, BENCHMARKS,
# SAMPLES, EVALUATION_OVERRIDES, VENV, CONTAINER, MAX_ATTEMPTS, POLICY, STEPS.
# shellcheck shell=bash
set -Eeuo pipefail

MAX_CRASHES=3
USER_ERROR_STATUS=2
PREEMPTED_STATUS=75
USR1_STATUS=138
TERM_STATUS=143
dsrl=(python -m megatron_dsrl.cli)
# From SLURM 22.05 on srun does not inherit --cpus-per-task: in some releases a rank would have a single CPU without this.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

attempt="${SLURM_RESTART_COUNT:-0}"
# shellcheck disable=SC2153  # the job scripts set the upper-case ones
read -ra overrides <<<"$OVERRIDES" && read -ra container <<<"$CONTAINER" &&
    read -ra evaluation_options <<<"$EVALUATION_OVERRIDES"
evaluation_options+=(--benchmarks "$BENCHMARKS" ${SAMPLES:+--samples "$SAMPLES"})
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then # a job array is one run per seed
    RUN_NAME="${RUN_NAME}_seed${SLURM_ARRAY_TASK_ID}"
    overrides+=("seed=$SLURM_ARRAY_TASK_ID")
fi
run_folder="$OUTPUT_DIR/$RUN_NAME"

cd "$DSRL_ROOT"
mkdir -p "$run_folder/slurm"
exec > >(tee -a "$run_folder/slurm/job_${SLURM_JOB_ID}_attempt_${attempt}.log") 2>&1

# On stderr: the output of some commands is read.
say() { echo "== $(date '+%F %T') $*" >&2; }

# One process on the first node, inside the container if there is one. Being asked to stop is no failure of it.
run_once() {
    local status=0
    srun --nodes=1 --ntasks=1 --kill-on-bad-exit=1 "${container[@]}" "$@" || status=$?
    case "$status" in
        "$USR1_STATUS" | "$TERM_STATUS") say "stopped as asked, before this step was done"; requeue "$status" ;;
    esac
    return "$status"
}

# One process per GPU over the whole job; the exit status is the highest of theirs.
run_on_all_ranks() {
    srun --kill-on-bad-exit=1 "${container[@]}" bash "$DSRL_ROOT/slurm/rank.sh" "$@"
}

# Work on all ranks that continues where it stopped. Returns when it is done; requeues or ends the job if it is not.
#   resumable NAME PROGRESS COMMAND...    PROGRESS is a function that prints how far the work is
resumable() {
    local name="$1" progress="$2" before status=0 crashes=0 crashes_file="$run_folder/slurm/${1}_crashes"
    shift 2
    before="$("$progress")"
    run_on_all_ranks "$@" || status=$?
    case "$status" in
        0) rm -f "$crashes_file" ;;
        "$USER_ERROR_STATUS") say "the configuration must be fixed"; exit "$status" ;;
        "$PREEMPTED_STATUS") say "$name stopped as asked; the state is saved"; requeue "$status" ;;
        "$USR1_STATUS") say "$name ended by USR1; what is on disk is kept"; requeue "$status" ;;
        *)
            [ "$("$progress")" != "$before" ] || crashes="$(cat "$crashes_file" 2>/dev/null || echo 0)"
            crashes="$((crashes + 1))"
            echo "$crashes" >"$crashes_file"
            say "$name ended with status $status, crash $crashes of $MAX_CRASHES without a new checkpoint or sample"
            [ "$crashes" -lt "$MAX_CRASHES" ] || exit "$status"
            requeue "$status"
            ;;
    esac
}

requeue() {
    if [ "$((attempt + 1))" -ge "$MAX_ATTEMPTS" ]; then
        say "attempt $attempt was the last of $MAX_ATTEMPTS; submit the script again to continue"
        exit "$1"
    fi
    say "requeueing"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 120 # SLURM ends this script while it waits
    exit "$1"
}

# The newest step_... in a folder, nothing if there is none.
newest_step() { { find "$1" -maxdepth 1 -name 'step_*' 2>/dev/null || true; } | sort | tail -1; }

check_environment() {
    if [ -n "$VENV" ] && [ ! -x "$VENV/bin/python" ]; then
        say "there is no Python environment in $VENV; VENV names another one, VENV= with a CONTAINER none"
        exit "$USER_ERROR_STATUS"
    fi
    [ -z "$VENV" ] || export PATH="$VENV/bin:$PATH"
    export MASTER_ADDR MASTER_PORT
    MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1)"
    MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"
    say "job $SLURM_JOB_ID, attempt $attempt, on $SLURM_JOB_NODELIST; run folder $run_folder"
    run_once "${dsrl[@]}" doctor
}

# A mistake ends the job here with its message, before anything was fetched or converted.
check_configuration() {
    run_once "${dsrl[@]}" train "$CONFIG" "${overrides[@]}" --dry-run --processes "$SLURM_NTASKS" >/dev/null
    [ -n "$BENCHMARKS" ] || return 0
    run_once "${dsrl[@]}" eval "${POLICY:-the policy}" "${evaluation_options[@]}" --dry-run
}

# Model, prompts and benchmarks, by one process: all ranks would ask the hub at the same time. They read its cache
# afterwards.
fetch_inputs() {
    say "reading model, prompts and benchmarks (waiting for the hub, should they not be here)"
    run_once "${dsrl[@]}" fetch "$CONFIG" "${overrides[@]}" --benchmarks "$BENCHMARKS"
}

# The model path of the configuration with the overrides, which may name another one.
configured_model() {
    run_once python -c 'import sys; from megatron_dsrl.config.load import load_config
print(load_config(sys.argv[1], sys.argv[2:]).model.path)' "$CONFIG" "${overrides[@]}"
}

convert_checkpoint() {
    [ -n "$MEGATRON_FOLDER" ] || return 0
    local model target
    model="$(configured_model)"
    target="$MEGATRON_FOLDER/$(basename "$model")"
    mkdir -p "$MEGATRON_FOLDER"
    say "converted model: $target (waiting, should another job be making it)"
    (
        flock 9
        [ -e "$target" ] || run_once "${dsrl[@]}" convert hf-to-megatron "$model" "$target"
    ) 9>"$target.lock"
    overrides+=("model.path=$target")
}

newest_checkpoint() { newest_step "$run_folder/checkpoints"; }

train() {
    local before
    before="$(newest_checkpoint)"
    say "training $CONFIG ${overrides[*]}${before:+, continuing from $before}"
    resumable training newest_checkpoint \
        "${dsrl[@]}" train "$CONFIG" "name=$RUN_NAME" "output_dir=$OUTPUT_DIR" "${overrides[@]}"
}

sampled_bytes() { { cat "$run_folder"/evaluation/samples/*.jsonl 2>/dev/null || true; } | wc -c; }

evaluate() {
    [ -n "$BENCHMARKS" ] || return 0
    local policy
    policy="${POLICY:-$(newest_step "$run_folder/hf")}"
    if [ -z "$policy" ]; then
        say "there is no policy in $run_folder/hf to evaluate; train first, or set POLICY to a folder or hub name"
        exit "$USER_ERROR_STATUS"
    fi
    say "evaluating $policy on $BENCHMARKS"
    resumable evaluation sampled_bytes \
        "${dsrl[@]}" eval "$policy" "${evaluation_options[@]}" --output "$run_folder/evaluation"
}

# SIGTERM and SIGUSR1 are for what runs, which gets them as well; this script goes on to requeue.
trap 'say "line $LINENO failed with status $?"' ERR
trap 'say "asked to stop"' TERM USR1

report() {
    run_once "${dsrl[@]}" report "$run_folder"
}

for step in $STEPS; do
    "$step"
done
say "done: $run_folder"
