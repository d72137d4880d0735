#!/usr/bin/env bash
# Create the CPU environment of this repository in .venv: everything that training, evaluation and the tests need.
#
#   bash tools/setup_cpu.sh            create or update; instant if nothing has changed since the last time
#   bash tools/setup_cpu.sh --dev      with pytest and the linters
#   bash tools/setup_cpu.sh --packages only packages from an index, as a layer of an image
#   bash tools/setup_cpu.sh --check    only check whether it is up to date (exit status 0) or not (1); also after --dev
#
# Optional variables:
#   DSRL_VENV         the folder (default: .venv)
#   DSRL_PYTHON       the Python to use, 3.11 or 3.12 (default: the first of python3.11, python3.12, python3 that fits)
#   DSRL_INSTALLER    uv or pip (default: see tools/installer.sh)
#   DSRL_TORCH_INDEX  where to look for torch's CPU build (default: PyTorch's own index, the first address below)
#
# After an interruption just run it again: finished steps are kept, and the stamp that marks the environment as complete
# is written last.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${DSRL_VENV:-$root/.venv}"
torch_index="${DSRL_TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
lock="$root/tools/requirements-cpu.lock"
lock_no_deps="$root/tools/requirements-cpu-no-deps.lock"
lock_dev="$root/tools/requirements-dev.lock"
lock_transformer_engine="$root/tools/requirements-transformer-engine.lock"
stamp="$venv/dsrl-setup.sha256"
stamp_dev="$venv/dsrl-setup-dev.sha256"
# shellcheck source=tools/installer.sh
source "$root/tools/installer.sh"

# The environment depends on these files and on the location of the checkout (it is installed in editable mode).
wanted_stamp() {
    { cat "$lock" "$lock_no_deps" "$root/pyproject.toml"; echo "$root"; } | sha256sum | cut -d ' ' -f 1
}

wanted_stamp_dev() { cat "$lock_dev" "$lock_transformer_engine" | sha256sum | cut -d ' ' -f 1; }

has_stamp() { [[ -x "$venv/bin/python" && -f "$1" && "$(cat "$1")" == "$2" ]]; }

is_ready() { has_stamp "$stamp" "$(wanted_stamp)"; }

is_ready_dev() { has_stamp "$stamp_dev" "$(wanted_stamp_dev)"; }

# SGLang's wheels need Linux with glibc 2.34; without this check you would only find out after several hundred megabytes.
check_system() {
    local system libc image
    image="Use the CPU image instead: see \"Environments\" in README.md."
    system="$(uname -s) $(uname -m)"
    case "$system" in
        "Linux x86_64" | "Linux aarch64") ;;
        *)
            echo "needs Linux on x86-64 or aarch64; this is $system. $image" >&2
            return 1
            ;;
    esac
    libc="$(getconf GNU_LIBC_VERSION 2>/dev/null || echo "another C library (musl?)")"
    if [[ "$(printf 'glibc 2.34\n%s\n' "$libc" | sort -V | head -n 1)" != "glibc 2.34" || "$libc" != glibc* ]]; then
        echo "needs glibc 2.34 or newer (Ubuntu 22.04, Debian 12, RHEL 9): SGLang's wheels are built for it; this system" \
            "has $libc. $image" >&2
        return 1
    fi
}

# Print a title, run the step, print how long it took. If the step fails, show its output.
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

# Print the public version of the installed torch, or nothing.
installed_torch() {
    "$venv/bin/python" - <<'PYTHON'
from importlib.metadata import PackageNotFoundError, version
try:
    print(version("torch").partition("+")[0])
except PackageNotFoundError:
    pass
PYTHON
}

# The CPU build is called `+cpu`: asking for that name downloads nothing if it is not available. PyPI only has the CUDA
# build, which also runs on a CPU.
install_torch() {
    local wanted
    wanted="$(sed -n 's/^torch==//p' "$lock")"
    if [[ "$(installed_torch)" == "$wanted" ]]; then
        return
    elif offers torch "$wanted+cpu"; then
        step "install torch (CPU build)" install --no-deps "torch==$wanted+cpu"
    elif offers torch "$wanted+cpu" "$torch_index"; then
        step "install torch (CPU build, from $torch_index)" \
            install --no-deps "$(index_option)" "$torch_index" "torch==$wanted+cpu"
    else
        echo "  $torch_index does not answer, or lacks torch $wanted: taking the build for CUDA instead, which runs on" \
            "a CPU as well (2.7 GB of downloads instead of 0.2, 5 GB of disk)"
        step "install torch" install --no-deps "torch==$wanted"
    fi
}

# megatron-core and this repository declare Python 3.12 but also run on 3.11; only pip has an option for that.
on_any_python() {
    if [[ "$installer" == pip ]]; then
        install --ignore-requires-python "$@"
    else
        install "$@"
    fi
}

# On a machine with GPUs this environment does not use them: it lacks SGLang's kernels.
check_result() { CUDA_VISIBLE_DEVICES='' "$venv/bin/dsrl" doctor; }

install_packages() {
    rm -f "$stamp"
    step "create the virtual environment" make_venv
    install_torch
    step "install requirements-cpu.lock" install -r "$lock"
    step "install requirements-cpu-no-deps.lock" on_any_python --no-deps -r "$lock_no_deps"
}

install_project() {
    step "install this repository (editable)" on_any_python --no-deps --no-build-isolation -e "$root"
    step "check the result (dsrl doctor)" check_result
    wanted_stamp >"$stamp"
}

install_dev() {
    rm -f "$stamp_dev"
    step "install requirements-dev.lock" install -r "$lock_dev"
    step "install requirements-transformer-engine.lock" \
        install --no-deps --upgrade --target "$venv/transformer-engine" -r "$lock_transformer_engine"
    wanted_stamp_dev >"$stamp_dev"
}

main() {
    local dev='' check='' packages='' argument
    for argument in "$@"; do
        case "$argument" in
            --dev) dev=yes ;;
            --check) check=yes ;;
            --packages) packages=yes ;;
            *)
                echo "unknown option $argument; usage: bash tools/setup_cpu.sh [--dev] [--packages] [--check]" >&2
                exit 2
                ;;
        esac
    done
    if is_ready && { [[ -z "$dev" ]] || is_ready_dev; }; then
        echo "environment is up to date: $venv"
        return
    elif [[ -n "$check" ]]; then
        echo "environment is missing or out of date: $venv (run: bash tools/setup_cpu.sh${dev:+ --dev})"
        exit 1
    fi
    check_system || exit 1
    choose_installer || exit 1
    echo "setting up $venv with $installer and Python $python (about 3 GB of disk, a few minutes the first time)"
    is_ready || install_packages
    if [[ -n "$packages" ]]; then
        step "compile the packages" compile_packages
        return
    fi
    is_ready || install_project
    if [[ -n "$dev" ]] && ! is_ready_dev; then
        install_dev
    fi
    echo "environment is ready: $venv ($SECONDS s)"
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    main "$@"
fi
