"""The images' recipes, which cannot be built here: their structure, their scripts, and their versions."""

import importlib.util
import json
import re
import shutil
import subprocess
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_dsrl.doctor.doctor import ESSENTIAL_PACKAGES
from megatron_dsrl.doctor.kernels import BUILT_FOR_SGLANG, exact_requirements
from tests.support.linters import complaints
from tests.support.tiny_run import REPOSITORY

IMAGE = REPOSITORY / "tools" / "image"
STEPS = ("system", "wheels", "compiled", "project")


def requirements(file: str) -> dict[str, Requirement]:
    """By normalised name."""
    lines = (IMAGE / file).read_text().splitlines()
    parsed = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


def exact(requirement: Requirement) -> str | None:
    """The version that it fixes."""
    specifiers = list(requirement.specifier)
    return specifiers[0].version if len(specifiers) == 1 and specifiers[0].operator == "==" else None


def test_both_recipes_start_from_one_pinned_image_and_take_the_same_steps() -> None:
    dockerfile, definition = (IMAGE / "Dockerfile").read_text(), (IMAGE / "apptainer.def").read_text()
    (base,) = re.findall(r"^FROM (\S+)$", dockerfile, re.MULTILINE)
    assert re.findall(r"^From: (\S+)$", definition, re.MULTILINE) == [base]
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-\S+", base), "a full version, never `latest`"
    assert tuple(re.findall(r"^RUN bash tools/image/install.sh (\w+)$", dockerfile, re.MULTILINE)) == STEPS
    assert f"for step in {' '.join(STEPS)}; do" in definition


def test_the_base_is_the_cuda_release_that_torch_brings() -> None:
    (base,) = re.findall(r"^FROM nvidia/cuda:([\d.]+)-", (IMAGE / "Dockerfile").read_text(), re.MULTILINE)
    toolkit = exact(requirements("requirements.lock")["cuda-toolkit"])
    assert toolkit.startswith(base)


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="not a checkout")
def test_all_recipes_copy_all_that_is_tracked() -> None:
    """But for dotfiles, and what a copy of a folder brings along."""
    tracked = subprocess.run(["git", "ls-files"], cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    names = {line.partition("/")[0] for line in tracked.splitlines() if not line.startswith(".")}
    for recipe in ("Dockerfile", "cpu.Dockerfile"):
        copied = re.findall(r"^COPY (.*) \S+$", (IMAGE / recipe).read_text(), re.MULTILINE)
        assert {name for line in copied for name in line.split()} - {"tools/image"} == names, recipe
    assert set(re.findall(r"^    (\S+) /opt/megatron-dsrl/", (IMAGE / "apptainer.def").read_text(), re.M)) == names


def test_every_pin_is_locked_or_compiled_and_nothing_is_left_open() -> None:
    lock, listed = requirements("requirements.lock"), requirements("requirements.in")
    assert all(exact(requirement) for requirement in lock.values())
    for name, requirement in listed.items():
        assert exact(lock[name]) and exact(requirement) in (None, exact(lock[name])), name
    sources = requirements("requirements-source.txt")
    script = (IMAGE / "install.sh").read_text()
    assert f"for name in {' '.join(sources)}; do" in script
    for requirement in sources.values():
        assert exact(requirement) or re.search(r"@[0-9a-f]{40}$", requirement.url), "a version or a whole commit"
    assert {canonicalize_name(name) for name in ESSENTIAL_PACKAGES} <= lock.keys()


def test_the_versions_are_those_that_sglang_and_transformer_engine_ask_for() -> None:
    lock, sources = requirements("requirements.lock"), requirements("requirements-source.txt")
    fixed = exact_requirements("sglang", BUILT_FOR_SGLANG)
    assert set(fixed) >= {"torch", "sglang-kernel", "transformers"}
    for name, version in fixed.items():
        assert exact(lock[name]) == version, name
    engine = exact(sources["transformer-engine-torch"])
    assert exact(lock["transformer-engine"]) == exact(lock["transformer-engine-cu13"]) == engine


def test_hadolint_has_nothing_to_say() -> None:
    assert complaints("hadolint", "tools/image/Dockerfile", "tools/image/cpu.Dockerfile") == ""
    assert "DL3008" in complaints("hadolint", "-", text="FROM debian:13\nRUN apt-get install gcc\n")


def test_the_cpu_image_is_what_the_set_up_makes_on_a_python_and_a_glibc_that_it_takes() -> None:
    recipe = (IMAGE / "cpu.Dockerfile").read_text()
    assert re.findall(r"^FROM (\S+)$", recipe, re.MULTILINE) == ["python:3.12.13-slim-bookworm"]  # glibc 2.36
    steps = re.findall(r"^RUN bash (\S+)(.*)$", recipe, re.MULTILINE)
    assert steps == [("tools/setup_cpu.sh", " --packages"), ("tools/setup_cpu.sh", "")]
    before_the_packages = recipe.partition("RUN bash")[0]
    for needed in ("pyproject.toml", "tools"):
        assert re.search(rf"^COPY .*\b{needed}\b", before_the_packages, re.MULTILINE), needed


def test_the_dev_container_is_the_cpu_image_with_what_the_tests_need() -> None:
    file = REPOSITORY / ".devcontainer" / "devcontainer.json"
    container = json.loads(file.read_text())
    assert (file.parent / container["build"]["dockerfile"]).resolve() == IMAGE / "cpu.Dockerfile"
    assert (file.parent / container["build"]["context"]).resolve() == REPOSITORY
    assert container["postCreateCommand"] == "bash tools/setup_cpu.sh --dev"
    venv = re.search(r"DSRL_VENV=(\S+)", (IMAGE / "cpu.Dockerfile").read_text())[1]
    assert container["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"] == f"{venv}/bin/python"


APPTAINER_SECTIONS = {
    "help", "setup", "files", "labels", "environment", "pre", "post", "runscript", "test", "startscript", "arguments",
}  # fmt: skip
"""All that its parser knows except those of SCIF apps (pkg/build/types/parser/deffile.go); it refuses any other."""


def apptainer_definition() -> tuple[dict[str, str], dict[str, list[str]]]:
    """Header and sections (their lines) of apptainer.def, split as Apptainer's parser does."""
    header, sections = {}, {}
    for line in (IMAGE / "apptainer.def").read_text().splitlines():
        if line.lstrip().startswith("%"):
            lines = sections.setdefault(line.strip().removeprefix("%").lower(), [])
        elif sections:
            lines.append(line)
        elif line and not line.startswith("#"):
            key, _, value = line.partition(":")
            header[key.strip().lower()] = value.strip()
    return header, sections


def test_apptainer_knows_every_part_of_the_definition() -> None:
    header, sections = apptainer_definition()
    assert header.keys() == {"bootstrap", "from"} and header["bootstrap"] == "docker"
    assert {"files", "post"} <= sections.keys() <= APPTAINER_SECTIONS
    for line in filter(None, sections["files"]):
        source, target = line.split()
        assert (REPOSITORY / source).exists() and target == f"/opt/megatron-dsrl/{source}"


@pytest.mark.parametrize("section", ["post", "environment", "test", "runscript"])
def test_the_definitions_scripts_are_clean(section) -> None:
    """Apptainer runs %post by `/bin/sh -ex`, and writes the others behind the line `#!/bin/sh`."""
    first = "#!/bin/sh -ex" if section == "post" else "#!/bin/sh"
    script = "\n".join([first, *apptainer_definition()[1][section]])
    assert complaints("shellcheck", "-", text=f"{script}\n") == ""


def image_script(name: str) -> ModuleType:
    """A Python script of the image's folder, which is not a package."""
    specification = importlib.util.spec_from_file_location(name, IMAGE / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_what_a_package_without_dependencies_declares_must_be_locked() -> None:
    declared = ["onnx", "torch>=2.1", "nvidia_cudnn_frontend>=2", "tomli; python_version<'3.11'", "jax; extra=='jax'"]
    locked = {"torch": "2.14.1", "nvidia-cudnn-frontend": "1.32.0"}
    missing = image_script("check_pins").missing_requirements(map(Requirement, declared), locked)
    assert missing == ["onnx", "nvidia_cudnn_frontend>=2"]


def test_the_image_ends_with_an_import_of_all_that_computes(tmp_path, capsys, monkeypatch) -> None:
    check_imports = image_script("check_imports")
    assert {"megatron.core", "sglang", "sgl_kernel", "amp_C"} <= {
        check.module for check in check_imports.CHECKS
    } and "check_imports.py" in (IMAGE / "install.sh").read_text()
    (tmp_path / "whole.py").write_text("USABLE = True")
    (tmp_path / "broken.py").write_text("import a_package_that_is_missing")
    (tmp_path / "left_out.py").write_text("USABLE = False")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    checks = [check_imports.Check(name, "assert module.USABLE") for name in ("whole", "broken", "left_out")]
    assert check_imports.main(checks) == 1
    shown = capsys.readouterr().out
    assert "ok      whole" in shown
    assert "failed  broken" in shown and "No module named 'a_package_that_is_missing'" in shown
    assert "failed  left_out" in shown and "AssertionError" in shown
    assert check_imports.main(checks[:1]) == 0


SETUP_SCRIPT = """
import shutil

from setuptools import Extension, setup

sources = ["csrc/fits.cpp", "csrc/fails.cpp"]
flags = ["-DWANTED=1", "-Iheaders"]
setup(name="package", version="1", ext_modules=[Extension("compiled", sources, extra_compile_args=flags)])
shutil.rmtree("headers", ignore_errors=True)  # as Transformer Engine does
"""
NEEDS_THE_FLAG = """
#include "header.h"
#ifndef WANTED
#error the flags of the build are missing
#endif
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_every_source_is_compiled_as_the_packages_build_does_and_what_does_not_fit_is_named(
    tmp_path, capsys, monkeypatch
) -> None:
    package = tmp_path / "package"
    (package / "csrc").mkdir(parents=True)
    (package / "setup.py").write_text(SETUP_SCRIPT)
    (package / "headers").mkdir()
    (package / "headers" / "header.h").touch()
    (package / "csrc" / "fits.cpp").write_text(NEEDS_THE_FLAG)
    (package / "csrc" / "fails.cpp").write_text(f"{NEEDS_THE_FLAG}no_such_type value;\n")
    (package / "csrc" / "not_built.cpp").write_text("#error nobody compiles this\n")
    (tmp_path / "packages" / "nvidia" / "cudnn").mkdir(parents=True)  # the image's environment has it from torch
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    check_sources = image_script("check_sources")
    monkeypatch.setattr("sys.argv", ["check_sources.py", str(package)])
    assert check_sources.main() == 1
    shown = capsys.readouterr().out
    assert "ok      csrc/fits.cpp" in shown and "failed  csrc/fails.cpp" in shown and "no_such_type" in shown
    assert "package: 1 refused, 0 left out" in shown and "not_built" not in shown
    assert sorted(file.name for file in package.iterdir()) == ["csrc", "headers", "setup.py"], "a copy is built"
    monkeypatch.setattr("sys.argv", ["check_sources.py", str(package), "--only", "fits"])
    assert check_sources.main() == 0
    assert "package: 0 refused, 1 left out" in capsys.readouterr().out


def test_a_package_that_cannot_be_built_ends_the_check_with_what_its_build_said(tmp_path, capsys, monkeypatch) -> None:
    check_sources = image_script("check_sources")
    monkeypatch.setattr("sys.argv", ["check_sources.py", str(tmp_path)])
    assert check_sources.main() == 2
    assert "is not an unpacked source package: it has no setup.py" in capsys.readouterr().err
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "setup.py").write_text("raise RuntimeError('CUDA 12 or newer, please')")
    (tmp_path / "packages" / "nvidia" / "cudnn").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setattr("sys.argv", ["check_sources.py", str(tmp_path / "package")])
    with pytest.raises(SystemExit, match="(?s)package cannot be built:.*CUDA 12 or newer, please"):
        check_sources.main()


def test_apex_has_a_commit_whose_sources_were_checked() -> None:
    """The one that the guide names."""
    (commit,) = re.findall(r"@([0-9a-f]{40})$", requirements("requirements-source.txt")["apex"].url)
    assert commit[:8] in (REPOSITORY / "examples" / "cluster" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="needs uv and a package registry")
def test_the_versions_are_on_the_registry_and_fit_together() -> None:
    assert image_script("check_pins").problems() == []
