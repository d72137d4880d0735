"""When an environment counts as up to date. Nothing is installed here."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
INPUTS = ["tools/requirements-cpu.lock", "tools/requirements-cpu-no-deps.lock", "pyproject.toml"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what the set-up reads, with a `.venv` that is marked as complete."""
    for name in ["tools/setup_cpu.sh", *INPUTS]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    content = b"".join((tmp_path / name).read_bytes() for name in INPUTS) + f"{tmp_path}\n".encode()
    (tmp_path / ".venv" / "dsrl-setup.sha256").write_text(hashlib.sha256(content).hexdigest() + "\n")
    return tmp_path


def set_up(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", checkout / "tools" / "setup_cpu.sh", *arguments],
        env={"PATH": "/usr/bin:/bin", **variables},
        capture_output=True,
        text=True,
        timeout=10,
    )


def test_a_repeated_set_up_does_nothing(checkout):
    before = sorted(checkout.rglob("*"))
    for arguments in ([], ["--check"]):
        result = set_up(checkout, *arguments)
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout == f"environment is up to date: {checkout}/.venv\n"
    assert sorted(checkout.rglob("*")) == before


@pytest.mark.parametrize("name", INPUTS)
def test_a_changed_input_asks_for_set_up(checkout, name):
    with (checkout / name).open("a") as file:
        file.write("# changed\n")
    assert set_up(checkout, "--check").returncode == 1


@pytest.mark.parametrize("missing", ["dsrl-setup.sha256", "bin/python"])
def test_an_unfinished_environment_asks_for_set_up(checkout, missing):
    (checkout / ".venv" / missing).unlink()
    assert set_up(checkout, "--check").returncode == 1


def test_a_python_that_does_not_fit_is_refused(checkout):
    (checkout / ".venv" / "dsrl-setup.sha256").unlink()
    result = set_up(checkout, DSRL_PYTHON="/no/such/python")
    assert result.returncode == 1
    assert "no Python 3.11 or 3.12" in result.stderr
