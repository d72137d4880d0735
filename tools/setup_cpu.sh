#!/usr/bin/env bash
# Create the CPU environment of this repository in .venv: everything that training, evaluation and the tests need.
#
#   bash tools/setup_cpu.sh            create or update; instant when nothing changed since the last time
#   bash tools/setup_cpu.sh --check    only say whether it is up to date (exit status 0) or not (1)
#
# DSRL_PYTHON names the Python to use (3.11 or 3.12; default: the first of python3.11, python3.12, python3 that fits).
# DSRL_VENV names another folder than .venv.
#
# An interrupted run can simply be started again: finished steps are kept, and the stamp that marks the environment as
# complete is written last. Needs Python with venv, a C compiler for Triton and Megatron's helpers, and pip's index.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${DSRL_VENV:-$root/.venv}"
lock="$root/tools/requirements-cpu.lock"
lock_no_deps="$root/tools/requirements-cpu-no-deps.lock"
stamp="$venv/dsrl-setup.sha256"

# The environment is a function of these files and of where the checkout lies (it is installed in editable mode).
wanted_stamp() {
    { cat "$lock" "$lock_no_deps" "$root/pyproject.toml"; echo "$root"; } | sha256sum | cut -d ' ' -f 1
}

up_to_date() {
    [[ -x "$venv/bin/python" && -f "$stamp" && "$(cat "$stamp")" == "$(wanted_stamp)" ]]
}

# Print what is done, do it, print how long it took. The output of a failing step is shown.
step() {
    local title="$1" started=$SECONDS log
    shift
    log="$(mktemp)"
    printf '  %-58s' "$title"
    if ! "$@" >"$log" 2>&1; then
        printf ' failed after %d s\n' $((SECONDS - started))
        tail -n 40 "$log" >&2
        rm -f "$log"
        echo "set-up stopped at: $title. Fix the cause above and run the same command again." >&2
        exit 1
    fi
    rm -f "$log"
    printf ' %4d s\n' $((SECONDS - started))
}

fits() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${DSRL_PYTHON:-python3.11 python3.12 python3}; do
        if fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "no Python 3.11 or 3.12 with the venv module found; install one, or name it: DSRL_PYTHON=/path/to/python" >&2
    exit 1
}

pip_install() {
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@"
}

make_venv() {
    if ! { fits "$venv/bin/python" && "$venv/bin/python" -m pip --version; }; then
        "$python" -m venv --clear "$venv"
    fi
}

# Read from torch's own version file: importing a CUDA build without its libraries fails.
torch_cuda_version() {
    "$venv/bin/python" - <<'PYTHON'
import importlib.util, pathlib, runpy
root = pathlib.Path(importlib.util.find_spec("torch").origin).parent
print(runpy.run_path(str(root / "version.py"))["cuda"])
PYTHON
}

check_torch_is_cpu_build() {
    local cuda
    cuda="$(torch_cuda_version)"
    if [[ "$cuda" != None ]]; then
        cat >&2 <<MESSAGE
pip installed a CUDA build of torch (CUDA $cuda), which this CPU environment does not use: several gigabytes more.
Point pip at PyTorch's CPU wheel index (set PIP_EXTRA_INDEX_URL, or extra-index-url in pip.conf), then run
    $venv/bin/python -m pip uninstall -y torch
and this command again. On a GPU machine install with \`pip install -e .[gpu]\` instead: see the README.
MESSAGE
        exit 1
    fi
    echo "  torch is the CPU build (torch.version.cuda is None)"
}

if up_to_date; then
    echo "environment is up to date: $venv"
    exit 0
fi
if [[ "${1:-}" == --check ]]; then
    echo "environment is missing or out of date: $venv (run: bash tools/setup_cpu.sh)"
    exit 1
fi

python="$(find_python)"
echo "setting up $venv with $("$python" --version) (about 3 GB of disk, some minutes the first time)"
rm -f "$stamp"
step "create the virtual environment" make_venv
step "install torch" pip_install --no-deps "$(grep '^torch==' "$lock")"
check_torch_is_cpu_build
step "install requirements-cpu.lock" pip_install -r "$lock"
step "install requirements-cpu-no-deps.lock" pip_install --no-deps --ignore-requires-python -r "$lock_no_deps"
step "install this repository (editable)" pip_install --no-deps --no-build-isolation -e "$root"
step "check the result (dsrl doctor)" "$venv/bin/dsrl" doctor
wanted_stamp >"$stamp"
echo "environment is ready: $venv ($SECONDS s)"
