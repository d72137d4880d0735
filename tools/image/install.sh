#!/usr/bin/env bash
# What both image recipes (Dockerfile, apptainer.def) do, and what a bare GPU machine with CUDA 13.0's toolkit can do:
#
#   bash tools/image/install.sh system     Debian packages (as root)
#   bash tools/image/install.sh wheels     a virtual environment in $DSRL_VENV with requirements.lock
#   bash tools/image/install.sh compiled   Transformer Engine's torch part and apex: half an hour or more
#   bash tools/image/install.sh project    this repository, editable, an import test, and `dsrl doctor`
#
# Variables: DSRL_VENV (/opt/dsrl), MAX_JOBS (8; each compiler takes up to 8 GB), CUDA_ARCHITECTURES (80;90;100).
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="${DSRL_VENV:-/opt/dsrl}"
architectures="${CUDA_ARCHITECTURES:-80;90;100}" # A100, H100 and H200, B200

pip() { "$venv/bin/python" -m pip --disable-pip-version-check --no-cache-dir "$@"; }

# One line of a requirements file by the beginning of its name.
pin() { grep -E "^$1( @ |==)" "$here/$2"; }

install_system() {
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    # gcc and Python's headers: Triton and the sources below compile; libnuma: SGLang's kernels; git: apex.
    # libibverbs1 finds no InfiniBand device without ibverbs-providers, and NCCL would use TCP between nodes.
    apt-get install -y --no-install-recommends \
        build-essential ca-certificates git ibverbs-providers libibverbs1 libnuma1 python3.12-dev python3.12-venv
    rm -rf /var/lib/apt/lists/*
}

install_wheels() {
    python3.12 -m venv "$venv"
    pip install -r "$here/requirements.lock"
}

# With what Transformer Engine's torch part and apex are compiled; check_sources.py compiles them with the same.
compile_environment() {
    export MAX_JOBS="${MAX_JOBS:-8}" CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}"
    # cuDNN and NCCL of torch's own wheels, so that what is compiled here and what torch loads are the same.
    local nvidia
    nvidia="$("$venv/bin/python" -c 'import nvidia.cudnn; print(list(nvidia.__path__)[0])')"
    export CUDNN_PATH="$nvidia/cudnn" CPATH="$nvidia/cudnn/include:$nvidia/nccl/include${CPATH:+:$CPATH}"
    # Each build reads the architectures from its own variable. Without FORCE_BUILD, Transformer Engine first looks
    # for a compiled wheel among its GitHub releases.
    export NVTE_CUDA_ARCHS="$architectures" NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE
    TORCH_CUDA_ARCH_LIST="$(sed -E 's/([0-9]+)([0-9])/\1.\2/g; s/;/ /g' <<<"$architectures")"
    export TORCH_CUDA_ARCH_LIST APEX_CPP_EXT=1 APEX_CUDA_EXT=1
}

install_compiled() {
    local name requirement
    compile_environment
    for name in transformer-engine-torch apex; do
        requirement="$(pin "$name" requirements-source.txt)"
        pip install --no-build-isolation --no-deps "$requirement"
    done
}

install_project() {
    pip install --no-deps --no-build-isolation -e "$here/../.."
    "$venv/bin/python" "$here/check_imports.py"
    "$venv/bin/dsrl" doctor
}

main() {
    case "${1:-}" in
        system | wheels | compiled | project) "install_$1" ;;
        *)
            echo "usage: bash tools/image/install.sh system|wheels|compiled|project" >&2
            exit 2
            ;;
    esac
}

if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then
    main "$@"
fi
