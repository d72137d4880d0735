# shellcheck shell=bash
# Sourced by setup_cpu.sh: the Python and the installer (uv or pip) of the CPU environment in $venv.
#
# uv is used if it is installed and finds Python 3.12, which it downloads if no suitable Python exists. pip is used if
# DSRL_PYTHON or the existing environment is Python 3.11 (megatron-core declares 3.12, and uv enforces that), or if pip is
# configured with a package index, because uv does not read pip's configuration.

fits() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null
}

is_python_311() { [[ "$("$1" -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null)" == "3 11" ]]; }

# The global and user configuration files of pip; PIP_CONFIG_FILE=/dev/null means none.
pip_configuration_files() {
    if [[ "${PIP_CONFIG_FILE:-}" == /dev/null ]]; then
        return
    fi
    printf '%s\n' "${PIP_CONFIG_FILE:-/etc/pip.conf}" /etc/pip.conf /etc/xdg/pip/pip.conf "${HOME:-}/.pip/pip.conf" \
        "${XDG_CONFIG_HOME:-${HOME:-}/.config}/pip/pip.conf"
}

pip_names_an_index() {
    local file
    if [[ -n "${PIP_INDEX_URL:-}${PIP_EXTRA_INDEX_URL:-}${PIP_FIND_LINKS:-}${PIP_NO_INDEX:-}" ]]; then
        return 0
    fi
    while read -r file; do
        if grep -Eqs '^[[:space:]]*(index-url|extra-index-url|find-links|no-index)' "$file"; then
            return 0
        fi
    done < <(pip_configuration_files)
    return 1
}

prefers_uv() {
    command -v uv >/dev/null && ! pip_names_an_index && ! is_python_311 "${DSRL_PYTHON:-$venv/bin/python}" &&
        { uv_finds "${DSRL_PYTHON:-3.12}" || ! find_python >/dev/null; }
}

uv_finds() { UV_PYTHON_DOWNLOADS=never uv python find "$1" >/dev/null 2>&1; }

# The first Python on PATH that pip can make the environment with.
find_python() {
    local candidate
    for candidate in ${DSRL_PYTHON:-python3.11 python3.12 python3}; do
        if fits "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# Sets `installer` and `python`.
choose_installer() {
    installer="${DSRL_INSTALLER:-}"
    if [[ -z "$installer" ]]; then
        if prefers_uv; then installer=uv; else installer=pip; fi
    fi
    if [[ "$installer" == uv ]]; then
        if is_python_311 "${DSRL_PYTHON:-}"; then
            echo "uv cannot install megatron-core on Python 3.11: use 3.12, or DSRL_INSTALLER=pip" >&2
            return 1
        fi
        python="${DSRL_PYTHON:-3.12}"
        return
    elif [[ "$installer" != pip ]]; then
        echo "DSRL_INSTALLER=$installer: must be uv or pip" >&2
        return 1
    fi
    if ! python="$(find_python)"; then
        echo "no Python 3.11 or 3.12 with the venv module found; install one, set" \
            "DSRL_PYTHON=/path/to/python, or install uv, which downloads one" >&2
        return 1
    fi
}

make_venv() {
    if [[ "$installer" == uv ]]; then
        "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null ||
            uv venv --quiet --seed --clear --python "$python" "$venv"
    elif ! { fits "$venv/bin/python" && "$venv/bin/python" -m pip --version; }; then
        "$python" -m venv --clear "$venv"
    fi
}

# Takes arguments that both installers understand. They do not compile the packages: that would take a minute, and Python
# compiles what it imports.
install() {
    if [[ "$installer" == uv ]]; then
        uv pip install --python "$venv/bin/python" "$@"
    else
        "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --no-compile "$@"
    fi
}

# For an environment that its users cannot write to. Some packages contain templates that are not Python; they are skipped.
compile_packages() { "$venv/bin/python" -m compileall -q -j 0 "$venv/lib" || true; }

# The option for an index that takes precedence over the installer's settings.
index_option() {
    if [[ "$installer" == uv ]]; then echo --index; else echo --index-url; fi
}

# offers NAME VERSION [INDEX]: whether an index has exactly this version for this Python and machine; downloads nothing.
# Without INDEX the installer's settings apply. An INDEX that does not answer quickly counts as one that lacks it.
offers() {
    local name="$1" version="$2" index=() quickly=()
    if [[ -n "${3:-}" ]]; then
        index=("$(index_option)" "$3")
        quickly=(timeout 60 env UV_HTTP_RETRIES=0 PIP_RETRIES=0 PIP_DEFAULT_TIMEOUT=5)
    fi
    if [[ "$installer" == uv ]]; then
        "${quickly[@]}" uv pip install --python "$venv/bin/python" --dry-run --no-deps "${index[@]}" "$name==$version"
    else
        "${quickly[@]}" "$venv/bin/python" -m pip index versions "$name" "${index[@]}" |
            sed -n 's/^Available versions: //p' | tr -d ' ' | tr ',' '\n' | grep -Fx "$version"
    fi >/dev/null 2>&1
}
