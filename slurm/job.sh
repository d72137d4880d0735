#!/usr/bin/env bash
# The steps of every job, in order (STEPS): check the environment, check the configuration, download model and data,
# convert HF -> Megatron, train, evaluate, write the report. The job scripts set their variables and source this file.
# Steps that are already done are skipped, so a job that is requeued or submitted again continues where it stopped.
#
# Exit statuses of training and evaluation, and what the job does then:
#   0      done
#   2      a mistake in the configuration: the job fails with the message
#   75     stopped on request (preemption, time limit) with its state saved: the job requeues itself
#   138    ended by USR1: an evaluation, whose finished samples are always on disk, or anything that was still starting;
#          the job requeues itself
#   other  a crash (a node, an engine, out of memory): the job requeues itself while it makes progress, and at most
#          MAX_CRASHES times in a row without a new checkpoint or sample. This includes 143 (TERM): when one rank
#          crashes, srun ends the others with TERM and reports the highest status.
# Single-process steps are repeated if USR1 or TERM ends them; if they fail, the job fails.
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
# Since SLURM 22.05 srun does not inherit --cpus-per-task: in some releases a rank would get a single CPU without this.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

attempt="${SLURM_RESTART_COUNT:-0}"
# shellcheck disable=SC2153  # the job scripts set the upper-case ones
read -ra configs <<<"$CONFIG" && read -ra overrides <<<"$OVERRIDES" && read -ra container <<<"$CONTAINER" &&
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

# To stderr, because the output of some commands is parsed.
say() { echo "== $(date '+%F %T') $*" >&2; }

# One process on the first node, inside the container if one is set. A request to stop does not count as a failure.
run_once() {
    local status=0
    srun --nodes=1 --ntasks=1 --kill-on-bad-exit=1 "${container[@]}" "$@" || status=$?
    case "$status" in
        "$USR1_STATUS" | "$TERM_STATUS") say "stopped on request before this step was done"; requeue "$status" ;;
    esac
    return "$status"
}

# One process per GPU across the whole job; returns the highest exit status.
run_on_all_ranks() {
    # Neighbouring ranks, and so neighbouring GPUs, on the same socket: SLURM alternates between the sockets by default.
    srun --distribution=block:block --kill-on-bad-exit=1 "${container[@]}" bash "$DSRL_ROOT/slurm/rank.sh" "$@"
}

# Run resumable work on all ranks. Returns when it is done; otherwise requeues or ends the job.
#   resumable NAME PROGRESS COMMAND...    PROGRESS is a function that prints how far the work has come
resumable() {
    local name="$1" progress="$2" before status=0 crashes=0 crashes_file="$run_folder/slurm/${1}_crashes"
    shift 2
    before="$("$progress")"
    run_on_all_ranks "$@" || status=$?
    case "$status" in
        0) rm -f "$crashes_file" ;;
        "$USER_ERROR_STATUS") say "the configuration must be fixed"; exit "$status" ;;
        "$PREEMPTED_STATUS") say "$name stopped on request; the state is saved"; requeue "$status" ;;
        "$USR1_STATUS") say "$name ended by USR1; what is on disk is kept"; requeue "$status" ;;
        *)
            [ "$("$progress")" != "$before" ] || crashes="$(cat "$crashes_file" 2>/dev/null || echo 0)"
            crashes="$((crashes + 1))"
            echo "$crashes" >"$crashes_file"
            say "$name exited with status $status, crash $crashes of $MAX_CRASHES without a new checkpoint or sample"
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
    sleep 120 # SLURM ends this script in the meantime
    exit "$1"
}

# Print the newest step_... in a folder, or nothing.
newest_step() { { find "$1" -maxdepth 1 -name 'step_*' 2>/dev/null || true; } | sort | tail -1; }

check_environment() {
    if [ -n "$VENV" ] && [ ! -x "$VENV/bin/python" ]; then
        say "no Python environment in $VENV; set VENV to another folder, or VENV= with a CONTAINER"
        exit "$USER_ERROR_STATUS"
    fi
    [ -z "$VENV" ] || export PATH="$VENV/bin:$PATH"
    export MASTER_ADDR MASTER_PORT
    MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1)"
    MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"
    say "job $SLURM_JOB_ID, attempt $attempt, on $SLURM_JOB_NODELIST; run folder $run_folder"
    run_once "${dsrl[@]}" doctor
}

# A mistake ends the job here with its message, before anything is downloaded or converted.
check_configuration() {
    run_once "${dsrl[@]}" train "${configs[@]}" "${overrides[@]}" --dry-run --processes "$SLURM_NTASKS" >/dev/null
    [ -n "$BENCHMARKS" ] || return 0
    run_once "${dsrl[@]}" eval "${POLICY:-the policy}" "${evaluation_options[@]}" --dry-run
}

# Download model, prompts and benchmarks in one process, so that the ranks do not query the hub concurrently. They read
# its cache afterwards.
fetch_inputs() {
    say "loading model, prompts and benchmarks (from the hub, if they are not in its cache)"
    run_once "${dsrl[@]}" fetch "${configs[@]}" "${overrides[@]}" --benchmarks "$BENCHMARKS"
}

# Print the configured model path; the overrides may change it.
configured_model() {
    run_once python -c 'import sys
from megatron_dsrl.commands.arguments import files_and_overrides
from megatron_dsrl.config.load import load_config
print(load_config(*files_and_overrides(sys.argv[1:])).model.path)' "${configs[@]}" "${overrides[@]}"
}

convert_checkpoint() {
    [ -n "$MEGATRON_FOLDER" ] || return 0
    local model target
    model="$(configured_model)"
    target="$MEGATRON_FOLDER/$(basename "$model")"
    mkdir -p "$MEGATRON_FOLDER"
    say "converted model: $target (waits if another job is making it)"
    (
        flock 9 || say "this file system has no locks: do not start a second job before the model is converted"
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
        "${dsrl[@]}" train "${configs[@]}" "name=$RUN_NAME" "output_dir=$OUTPUT_DIR" "${overrides[@]}"
}

sampled_bytes() { { cat "$run_folder"/evaluation/samples/*.jsonl 2>/dev/null || true; } | wc -c; }

evaluate() {
    [ -n "$BENCHMARKS" ] || return 0
    local policy
    policy="${POLICY:-$(newest_step "$run_folder/hf")}"
    if [ -z "$policy" ]; then
        say "no policy to evaluate in $run_folder/hf; train first, or set POLICY to a folder or hub name"
        exit "$USER_ERROR_STATUS"
    fi
    say "evaluating $policy on $BENCHMARKS"
    resumable evaluation sampled_bytes \
        "${dsrl[@]}" eval "$policy" "${evaluation_options[@]}" --output "$run_folder/evaluation"
}

# SIGTERM and SIGUSR1 also reach the running command, which handles them; this script continues and requeues.
trap 'say "line $LINENO failed with status $?"' ERR
trap 'say "received a request to stop"' TERM USR1

report() {
    run_once "${dsrl[@]}" report "$run_folder"
}

for step in $STEPS; do
    "$step"
done
say "done: $run_folder"
