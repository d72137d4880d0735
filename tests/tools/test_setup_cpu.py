"""When an environment counts as up to date, and what the set-up refuses at once. Nothing is installed here."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = ["tools/setup_cpu.sh", "tools/installer.sh"]
DEV_LOCK = "tools/requirements-dev.lock"
DEV_LOCKS = [DEV_LOCK, "tools/requirements-transformer-engine.lock"]
INPUTS = ["tools/requirements-cpu.lock", "tools/requirements-cpu-no-deps.lock", "pyproject.toml"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the set-up reads, with a `.venv` that is marked as complete."""
    for name in [*SCRIPTS, *INPUTS, *DEV_LOCKS]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    dev = hashlib.sha256(b"".join((tmp_path / name).read_bytes() for name in DEV_LOCKS)).hexdigest()
    (tmp_path / ".venv" / "dsrl-setup-dev.sha256").write_text(dev + "\n")
    content = b"".join((tmp_path / name).read_bytes() for name in INPUTS) + f"{tmp_path}\n".encode()
    (tmp_path / ".venv" / "dsrl-setup.sha256").write_text(hashlib.sha256(content).hexdigest() + "\n")
    return tmp_path


def set_up(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", checkout / "tools" / "setup_cpu.sh", *arguments],
        env={"PATH": "/usr/bin:/bin"} | variables,
        capture_output=True,
        text=True,
        timeout=10,
    )


def test_a_repeated_set_up_does_nothing(checkout) -> None:
    before = sorted(checkout.rglob("*"))
    for arguments in ([], ["--dev"], ["--check"], ["--dev", "--check"]):
        result = set_up(checkout, *arguments)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == f"environment is up to date: {checkout}/.venv\n"
    assert sorted(checkout.rglob("*")) == before


@pytest.mark.parametrize("name", INPUTS)
def test_a_changed_input_asks_for_set_up(checkout, name) -> None:
    with (checkout / name).open("a") as file:
        file.write("# changed\n")
    assert set_up(checkout, "--check").returncode == 1


def test_a_changed_linter_concerns_only_those_who_test(checkout) -> None:
    (checkout / DEV_LOCK).write_text("pytest==1.0\n")
    assert set_up(checkout, "--check").returncode == 0
    assert set_up(checkout, "--check", "--dev").returncode == 1


@pytest.mark.parametrize("missing", ["dsrl-setup.sha256", "bin/python"])
def test_an_unfinished_environment_asks_for_set_up(checkout, missing) -> None:
    (checkout / ".venv" / missing).unlink()
    assert set_up(checkout, "--check").returncode == 1


def test_a_python_that_does_not_fit_is_refused(checkout) -> None:
    (checkout / ".venv" / "dsrl-setup.sha256").unlink()
    result = set_up(checkout, DSRL_PYTHON="/no/such/python")
    assert result.returncode == 1
    assert "no Python 3.11 or 3.12" in result.stderr


def program(folder: Path, name: str, script: str) -> None:
    """An executable `folder/name`."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("name", "script", "complaint"),
    [
        ("getconf", "echo glibc 2.28", "needs glibc 2.34 or newer"),
        ("getconf", "exit 1", "another C library (musl?)"),  # as musl's does
        ("uname", "test $1 = -s && echo Darwin || echo arm64", "this is Darwin arm64"),
        ("uname", "test $1 = -s && echo Linux || echo ppc64le", "this is Linux ppc64le"),
    ],
)
def test_a_system_without_wheels_is_refused_before_anything_is_installed(
    checkout: Path, tmp_path: Path, name: str, script: str, complaint: str
) -> None:
    shutil.rmtree(checkout / ".venv")
    program(tmp_path / "bin", name, script)
    result = set_up(checkout, PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert result.returncode == 1 and complaint in result.stderr and "CPU image" in result.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("library", ["glibc 2.34", "glibc 2.41", "glibc 3.0"])
def test_newer_systems_are_accepted(checkout, tmp_path, library) -> None:
    program(tmp_path / "bin", "getconf", f"echo {library}")
    program(tmp_path / "bin", "uname", "test $1 = -s && echo Linux || echo aarch64")
    assert sourced(checkout, "check_system", PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin").returncode == 0


def sourced(checkout: Path, commands: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run functions of the script."""
    return subprocess.run(
        ["bash", "-c", f"source tools/setup_cpu.sh; {commands}"],
        cwd=checkout, env={"PATH": "/usr/bin:/bin"} | variables, capture_output=True, text=True, timeout=30,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("variables", "chosen"),
    [
        ({}, "uv 3.12"),
        ({"DSRL_PYTHON": "{bin}/python3.12"}, "uv {bin}/python3.12"),
        ({"DSRL_PYTHON": "{bin}/python3.11"}, "pip {bin}/python3.11"),
        ({"PIP_INDEX_URL": "https://mirror.example/simple"}, "pip python3.11"),
        ({"PIP_FIND_LINKS": "/wheels"}, "pip python3.11"),
        ({"PIP_CONFIG_FILE": "{bin}/pip.conf"}, "pip python3.11"),
        ({"HOME": "{bin}"}, "pip python3.11"),  # .config/pip/pip.conf
        ({"HOME": "{bin}", "PIP_CONFIG_FILE": "/dev/null"}, "uv 3.12"),
        ({"HOME": "{bin}", "DSRL_INSTALLER": "uv"}, "uv 3.12"),
        ({"DSRL_INSTALLER": "pip"}, "pip python3.11"),
    ],
)
def test_uv_is_used_unless_it_cannot_do_the_work(checkout, tmp_path, variables, chosen, uv="exit 0") -> None:
    folder = tmp_path / "bin"
    program(folder, "uv", uv)
    for minor in (11, 12):
        program(folder, f"python3.{minor}", f"case $2 in *print*) echo 3 {minor} ;; esac")
    (folder / ".config" / "pip").mkdir(parents=True)
    for file in ("pip.conf", ".config/pip/pip.conf"):
        (folder / file).write_text("[global]\nextra-index-url = https://mirror.example/simple\n")
    shutil.rmtree(checkout / ".venv")
    variables = {name: value.format(bin=folder) for name, value in variables.items()}
    if "HOME" not in variables:  # leave out the files of this machine
        variables = {"PIP_CONFIG_FILE": "/dev/null"} | variables
    variables["PATH"] = f"{folder}:/usr/bin:/bin"
    result = sourced(checkout, 'choose_installer; echo "$installer" "$python"', **variables)
    assert result.stdout == chosen.format(bin=folder) + "\n", result.stderr


def test_uv_does_not_fetch_a_python_if_one_is_there(checkout, tmp_path) -> None:
    """Not every cluster's network lets it."""
    test_uv_is_used_unless_it_cannot_do_the_work(checkout, tmp_path, {}, "pip python3.11", uv="exit 1")


def test_uv_fetches_a_python_where_none_fits(checkout, tmp_path) -> None:
    wrong = {"DSRL_PYTHON": "{bin}/none"}
    test_uv_is_used_unless_it_cannot_do_the_work(checkout, tmp_path, wrong, "uv {bin}/none", uv="exit 1")


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"DSRL_INSTALLER": "conda"}, "DSRL_INSTALLER=conda: must be uv or pip"),
        ({"DSRL_INSTALLER": "uv", "DSRL_PYTHON": "python3.11"}, "use 3.12, or DSRL_INSTALLER=pip"),
    ],
)
def test_an_installer_that_does_not_fit_is_refused(checkout, tmp_path, variables, complaint) -> None:
    program(tmp_path / "bin", "python3.11", "case $2 in *print*) echo 3 11 ;; esac")
    result = sourced(checkout, "choose_installer", PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin", **variables)
    assert result.returncode == 1 and complaint in result.stderr


def test_an_option_that_does_not_exist_is_refused(checkout) -> None:
    result = set_up(checkout, "--devel")
    assert result.returncode == 2 and "unknown option --devel" in result.stderr
