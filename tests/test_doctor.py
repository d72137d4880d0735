"""`dsrl doctor`: what it finds here, and what it says where something is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dsrl.doctor import ESSENTIAL_PACKAGES, LOCK_FILES, Examination, Finding, examine, read_pins

REPOSITORY = Path(__file__).parents[1]


def by_topic(examination: Examination) -> dict[str, Finding]:
    return {finding.topic: finding for finding in examination.findings}


def test_this_environment_can_run_and_has_the_pinned_versions():
    examination = examine()
    assert examination.can_run
    findings = by_topic(examination)
    pins = read_pins(REPOSITORY / name for name in LOCK_FILES)
    for package in ESSENTIAL_PACKAGES:
        assert findings[package].severity == "ok", findings[package]
        assert findings[package].found.partition("+")[0] == pins[package]
    assert findings["local ports"].severity == "ok"


def test_the_lock_pins_every_essential_package_once():
    lines = [
        line
        for name in LOCK_FILES
        for line in (REPOSITORY / name).read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert all(line.count("==") == 1 and "+" not in line for line in lines)  # exact, without local version
    names = [line.partition("==")[0].lower() for line in lines]
    assert len(names) == len(set(names))
    assert {package.lower() for package in ESSENTIAL_PACKAGES} <= set(names)


def run_doctor(*arguments: str, path: Path | None = None, isolated: bool = False) -> subprocess.CompletedProcess[str]:
    """The command in a process; `path` comes first on sys.path, `isolated` hides the installed packages' metadata."""
    hide = "import importlib.metadata as m\ndef gone(name): raise m.PackageNotFoundError(name)\nm.version = gone\n"
    program = f"import sys\nsys.path[:0] = {[str(path or REPOSITORY), str(REPOSITORY)]!r}\n{hide if isolated else ''}"
    program += f"from megatron_dsrl.cli import main\nsys.exit(main(['doctor', *{list(arguments)!r}]))"
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


def test_json_says_the_same():
    result = run_doctor("--json")
    report = json.loads(result.stdout)
    assert result.returncode == 0 and report["can_run"] is True
    assert {"topic", "severity", "found", "advice"} == set(report["findings"][0])


def test_without_the_packages_no_run_is_possible_and_the_remedy_is_named():
    result = run_doctor(isolated=True)
    assert result.returncode == 1
    assert "problem: sglang: run `bash tools/setup_cpu.sh`" in result.stdout
    assert "No run is possible" in result.stdout


@pytest.mark.parametrize(
    ("files", "found", "advice"),
    [
        (["apex/__init__.py"], "not NVIDIA's", "unrelated web toolkit"),
        (["apex.py"], "not NVIDIA's", "unrelated web toolkit"),
        (["apex/__init__.py", "apex/multi_tensor_apply/__init__.py"], "without its CUDA kernels", ""),
        (["apex/__init__.py", "apex/multi_tensor_apply/__init__.py", "amp_C.py"], "with its CUDA kernels", ""),
        ([], "not installed", ""),
    ],
)
def test_nvidia_apex_is_told_from_the_web_toolkit(tmp_path, monkeypatch, files, found, advice):
    for name in files:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("raise ImportError('the doctor must not import what it looks for')")
    monkeypatch.syspath_prepend(tmp_path)
    apex = by_topic(examine())["NVIDIA apex"]
    assert found in apex.found
    assert advice in apex.advice
