"""`dsrl doctor`: what it finds here, and what it says if something is missing."""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

from megatron_dsrl.doctor import doctor
from megatron_dsrl.doctor.device import driver_version, examine_cuda_compiler, examine_device
from megatron_dsrl.doctor.doctor import (
    ESSENTIAL_PACKAGES,
    FEWEST_OPEN_FILES,
    IMAGE_LOCK_FILE,
    LOCK_FILES,
    OLDEST_GLIBC,
    Examination,
    examine,
    examine_c_library,
    examine_compiler,
    examine_open_files,
    examine_sandbox,
    examine_temporary_folder,
    pinned_environment,
    read_pins,
)
from megatron_dsrl.doctor.kernels import Finding, examine_kernels

REPOSITORY = Path(__file__).parents[2]


def by_topic(examination: Examination) -> dict[str, Finding]:
    return {finding.topic: finding for finding in examination.findings}


def test_this_environment_can_run_and_has_the_pinned_versions() -> None:
    examination = examine()
    assert examination.can_run
    findings = by_topic(examination)
    pins = read_pins(REPOSITORY / name for name in LOCK_FILES)
    for package in ESSENTIAL_PACKAGES:
        assert findings[package].severity == "ok", findings[package]
        assert findings[package].found.partition("+")[0] == pins[canonicalize_name(package)]
    assert findings["local ports"].severity == "ok"


def test_the_lock_pins_every_essential_package_once() -> None:
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


@pytest.mark.parametrize(
    ("torch", "torch_cuda", "files"),
    [
        ("{cpu}+cpu", None, LOCK_FILES),
        ("{cpu}+cu130", "13.0", LOCK_FILES),  # the set-up takes the build for CUDA where it finds no other
        ("{image}", "13.0", (IMAGE_LOCK_FILE,)),
        ("2.99.0+cpu", None, LOCK_FILES),
        ("2.99.0", "13.0", (IMAGE_LOCK_FILE,)),
        (None, None, LOCK_FILES),
    ],
)
def test_the_environment_is_identified_by_its_torch(torch, torch_cuda, files) -> None:
    pins = {
        name: read_pins(REPOSITORY / file for file in files)["torch"]
        for name, files in (("cpu", LOCK_FILES), ("image", (IMAGE_LOCK_FILE,)))
    }
    words, chosen = pinned_environment(torch and torch.format(**pins), torch_cuda)
    assert chosen == files and words.startswith("CPU" if files == LOCK_FILES else "GPU")


def test_json_says_the_same() -> None:
    result = run_doctor("--json")
    report = json.loads(result.stdout)
    assert result.returncode == 0 and report["can_run"] is True
    assert {"topic", "severity", "found", "advice"} == set(report["findings"][0])


def test_without_the_packages_no_run_is_possible_and_the_remedy_is_named() -> None:
    result = run_doctor(isolated=True)
    assert result.returncode == 1
    assert "problem: sglang: run `bash tools/setup_cpu.sh`" in result.stdout
    assert "Fix the problems above before you run." in result.stdout


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
def test_nvidia_apex_is_distinguished_from_the_web_toolkit(tmp_path, monkeypatch, files, found, advice) -> None:
    for name in files:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("raise ImportError('the doctor must not import what it looks for')")
    monkeypatch.syspath_prepend(tmp_path)
    apex = by_topic(examine())["NVIDIA apex"]
    assert found in apex.found
    assert advice in apex.advice


GPU_IMAGE = {
    "transformer-engine": "2.20.2", "transformer-engine-torch": "2.20.2", "transformer-engine-cu13": "2.20.2",
    "sglang": "0.5.23", "sglang-kernel": "0.4.10", "torch": "2.14.1+cu130",
    "transformers": "5.19.0", "flashinfer-python": "0.7.2",
}  # fmt: skip


def on_a_gpu(**changed: str | None) -> dict[str, Finding]:
    """Findings about the image's packages on a CUDA machine, with some of them changed (underscores for dashes)."""
    packages = GPU_IMAGE | {name.replace("_", "-"): version for name, version in changed.items()}
    findings = examine_kernels(True, "13.0", packages.get, import_problem=lambda module: None)
    return {finding.topic: finding for finding in findings}


def test_the_images_packages_are_compatible() -> None:
    findings = on_a_gpu()
    assert findings.pop("NVIDIA apex").severity == "note", "not installed on this machine"
    assert {finding.severity for finding in findings.values()} == {"ok"}, findings


def test_it_says_what_a_run_computes_with(tmp_path, monkeypatch) -> None:
    layers, optimizer = "layers by model.layer_spec=auto", "optimizer by Megatron's choice"
    here, image, bare = by_topic(examine()), on_a_gpu(), on_a_gpu(transformer_engine_torch=None)
    assert here[layers].found.startswith("local: PyTorch's") and here[optimizer].found == "PyTorch's AdamW"
    assert "Transformer Engine's" in image[layers].found and "Transformer Engine's" in image[optimizer].found
    assert bare[layers].found.startswith("local: PyTorch's") and bare[optimizer].found == "PyTorch's AdamW"
    (tmp_path / "apex" / "multi_tensor_apply").mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").touch()
    (tmp_path / "amp_C.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert on_a_gpu(transformer_engine_torch=None)[optimizer].found == "apex's FusedAdam"


@pytest.mark.parametrize(
    ("changed", "topic", "severity", "found", "advice"),
    [
        (
            {"transformer_engine_cu13": None, "transformer_engine_cu12": "2.20.2"},
            "Transformer Engine", "problem", "its core is for CUDA 12 and torch for CUDA 13.0",
            "pip install transformer-engine-cu13==2.20.2",
        ),
        (
            {"transformer_engine_cu13": "2.19.0"},
            "Transformer Engine", "problem", "core 2.19.0, torch part 2.20.2", "both must be from one release",
        ),
        (
            {"flash_attn": "2.8.3.post2"},
            "flash attention 2", "note", "newer than the 2.8.3 that Transformer Engine", "only matters on an A100",
        ),
        ({"sglang_kernel": None}, "SGLang's kernels (sgl_kernel)", "problem", "not installed", "pip install"),
        (
            {"torch": "2.13.0+cu130"},
            "torch for sglang", "problem", "2.13.0+cu130, but sglang 0.5.23 requires 2.14.1",
            "pip install torch==2.14.1",
        ),
        ({"flash_attn_4": "4.0.0b36"}, "flash attention 4 (SGLang's)", "note", "not its own", "--force-reinstall"),
    ],
)  # fmt: skip
def test_packages_that_are_incompatible_on_a_gpu_are_explained(changed, topic, severity, found, advice) -> None:
    finding = on_a_gpu(**changed)[topic]
    assert finding.severity == severity
    assert found in finding.found and advice in finding.advice


BROKEN = {
    "raise ImportError('libtransformer_engine.so: undefined symbol: cublasLt')": "undefined symbol: cublasLt",
    "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)": "SIGSEGV",
}


@pytest.mark.parametrize("code", BROKEN)
@pytest.mark.parametrize("torch_part", ["2.20.2", None])
def test_a_transformer_engine_that_cannot_be_imported_is_a_line_and_not_a_crash(
    tmp_path, monkeypatch, code, torch_part
) -> None:
    package = tmp_path / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").write_text(code)
    (tmp_path / "torch.py").touch()  # its import takes seconds
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    packages = GPU_IMAGE | {"transformer-engine-torch": torch_part}
    finding = next(examine_kernels(True, "13.0", packages.get))
    assert (finding.topic, finding.severity) == ("Transformer Engine", "problem")
    assert f"cannot be imported: {'its import was killed by ' if 'SIG' in BROKEN[code] else ''}" in finding.found
    assert BROKEN[code] in finding.found and ("without its torch part" in finding.found) == (torch_part is None)
    assert "Megatron imports it and fails with it" in finding.advice


def test_the_driver_is_read_from_the_kernel(tmp_path) -> None:
    file = tmp_path / "version"
    assert driver_version(file) is None
    for module in ("NVIDIA UNIX x86_64 Kernel Module", "NVIDIA UNIX Open Kernel Module for x86_64"):
        file.write_text(f"NVRM version: {module}  580.95.05  Release Build\nGCC version:  gcc version 11.4.0\n")
        assert driver_version(file) == "580.95.05"


@pytest.mark.parametrize(
    ("torch_cuda", "driver", "variables", "severity", "found", "advice"),
    [
        (None, None, {}, "ok", "CPU", ""),
        (None, "580.95.05", {}, "note", "CPU build, on a machine with an NVIDIA driver", "use the image"),
        ("13.0", None, {}, "note", "no NVIDIA driver is loaded", "580 or newer"),
        ("13.0", "575.57.08", {}, "note", "driver 575.57.08 is too old", "CUDA 13.0 needs 580 or newer"),
        ("12.9", "575.57.08", {}, "note", "driver 575.57.08 is loaded", "--nv"),
        ("13.0", "580.95.05", {"CUDA_VISIBLE_DEVICES": ""}, "note", "CUDA_VISIBLE_DEVICES= hides all", "unset it"),
        ("13.0", "580.95.05", {"SLURM_GPUS_ON_NODE": "8"}, "problem", "but sees no device", "docker run --gpus all"),
    ],
)
def test_it_says_why_torch_sees_no_gpu(torch_cuda, driver, variables, severity, found, advice) -> None:
    finding = examine_device((), torch_cuda, driver, variables)
    assert finding.severity == severity
    assert found in finding.found and advice in finding.advice


def test_the_gpus_are_named() -> None:
    finding = examine_device(("NVIDIA H100", "NVIDIA H100"), "13.0", "580.95.05", {"SLURM_GPUS_ON_NODE": "2"})
    assert (finding.severity, finding.advice) == ("ok", "")
    assert finding.found == "2 CUDA devices: NVIDIA H100; CUDA 13.0, driver 580.95.05"


def test_a_cuda_compiler_that_is_missing_or_of_another_cuda_is_named(tmp_path) -> None:
    toolkit = {"CUDA_HOME": str(tmp_path)}
    assert "CUDA_HOME" in examine_cuda_compiler("13.0", toolkit).advice
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.2, V13.2.78'\n")
    nvcc.chmod(0o755)
    same = examine_cuda_compiler("13.0", {"PATH": str(nvcc.parent)})
    assert (same.severity, same.found) == ("ok", f"13.2 ({nvcc})")
    assert "torch is built for CUDA 12.9" in examine_cuda_compiler("12.9", toolkit).found
    nvcc.write_text("not a program")
    assert "does not report its version" in examine_cuda_compiler("13.0", toolkit).found


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
    monkeypatch.setattr(doctor, "missing_isolation", lambda: problem)
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
