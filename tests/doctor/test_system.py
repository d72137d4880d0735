"""What `dsrl doctor` says of the C library and the compiler."""

import resource
import tempfile
from pathlib import Path

import pytest

from megatron_dsrl.doctor import system
from megatron_dsrl.doctor.system import (
    FEWEST_OPEN_FILES,
    OLDEST_GLIBC,
    examine_c_library,
    examine_compiler,
    examine_open_files,
    examine_sandbox,
    examine_temporary_folder,
)

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("library", "severity"),
    [(("glibc", "2.34"), "ok"), (("glibc", "2.41"), "ok"), (("glibc", "2.28"), "problem"), (("", ""), "problem")],
)
def test_sglangs_wheels_need_a_recent_glibc(library, severity) -> None:
    finding = examine_c_library(library)
    assert finding.severity == severity
    assert finding.found == " ".join(library).strip() or finding.found == "not glibc"
    assert ("2.34 or newer" in finding.advice) == (severity == "problem")


def test_the_set_up_refuses_what_the_doctor_calls_a_problem() -> None:
    script = (REPOSITORY / "tools" / "setup_cpu.sh").read_text()
    assert f"needs glibc {OLDEST_GLIBC} or newer" in script


@pytest.mark.parametrize(("cuda", "severity"), [(False, "ok"), (True, "problem")])
def test_a_compiler_is_needed_on_a_gpu_only(tmp_path, cuda, severity) -> None:
    finding = examine_compiler(cuda, {"PATH": str(tmp_path)})
    assert (finding.severity, finding.found.partition(";")[0]) == (severity, "none found")
    assert ("install gcc" in finding.advice) == cuda


@pytest.mark.parametrize(("name", "variables"), [("gcc", {}), ("cc", {}), ("clang", {"CC": "clang"})])
def test_the_compiler_is_named(tmp_path, name, variables) -> None:
    (tmp_path / name).write_text("")
    (tmp_path / name).chmod(0o755)
    finding = examine_compiler(True, {"PATH": str(tmp_path)} | variables)
    assert (finding.severity, finding.found) == ("ok", str(tmp_path / name))


@pytest.mark.parametrize("problem", [None, "user namespace: Operation not permitted"])
def test_whether_programs_can_be_isolated(problem: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "missing_isolation", lambda: problem)
    finding = examine_sandbox()
    assert finding.severity == ("note" if problem else "ok")
    assert (problem or "can be isolated") in finding.found


@pytest.mark.parametrize(("length", "severity"), [(73, "ok"), (74, "problem")])
def test_sockets_need_a_short_temporary_folder(monkeypatch, length, severity) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/" + "x" * (length - 1))
    assert examine_temporary_folder().severity == severity


@pytest.mark.parametrize(
    ("hard", "severity"), [(FEWEST_OPEN_FILES, "ok"), (resource.RLIM_INFINITY, "ok"), (1024, "note")]
)
def test_few_open_files_are_worth_knowing(monkeypatch, hard, severity) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, hard))
    assert examine_open_files().severity == severity
