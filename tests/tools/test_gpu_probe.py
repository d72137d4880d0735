"""The probe of one GPU: parts that do not depend on each other, and what it needs to be installed."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from megatron_dsrl.doctor.doctor import LOCK_FILES, read_pins
from megatron_dsrl.model.architecture import read_architecture
from megatron_dsrl.rollout.engines.flattened_bucket import BucketMemory, flatten, serialise
from tests.support.tiny_run import REPOSITORY
from tools.gpu_probe import bucket_code
from tools.gpu_probe.packages import import_problem
from tools.gpu_probe.parts import Part, parts
from tools.gpu_probe.receiver import copy_into
from tools.gpu_probe.reports import measure_each, read_reports
from tools.gpu_probe.runner import run_part, without_compiler
from tools.gpu_probe.trainer import fitting_config, parse_options
from tools.gpu_record.architectures import write_architecture
from tools.gpu_record.record import Record

REQUIREMENTS = REPOSITORY / "tools" / "gpu_probe" / "requirements.txt"
NAMED = [("a", torch.arange(6.0).view(2, 3)), ("b", torch.ones(5, dtype=torch.bfloat16)), ("c", torch.tensor(7))]


def empty_record(folder: Path, on_cpu: bool = True) -> Record:
    return Record("Probe", folder, {"commit": "c0ffee", "device": "CPU"}, on_cpu)


def part(program: str, **more: object) -> Part:
    return Part("part", "something", 1, ("-c", program), **more)  # type: ignore[arg-type]


def test_a_measurement_that_fails_does_not_stop_the_next(capsys) -> None:
    def fails() -> dict[str, str]:
        raise RuntimeError("out of memory\nand more")

    assert measure_each({"one": fails, "two": lambda: {"speed": "7"}}) == 1
    figures, problems = read_reports(capsys.readouterr().out.splitlines())
    assert figures == {"speed": "7"} and problems == ["one: RuntimeError: out of memory"]
    assert measure_each({"two": lambda: {"speed": "7"}}) == 0


def test_a_part_that_fails_keeps_the_figures_before_and_its_output(tmp_path) -> None:
    program = "print('@figures {\"speed\": \"7\"}'); print('@problem two: too slow'); raise SystemExit('the end')"
    result = run_part(part(program), empty_record(tmp_path))
    assert result.status == "failed" and result.figures == {"speed": "7"} and result.output[-1] == "the end"
    assert result.reason is not None and result.reason.startswith("two: too slow; exit status 1")
    assert run_part(part("print('fine')"), empty_record(tmp_path)).output == ["fine"]


def test_a_part_is_skipped_without_what_it_needs(tmp_path) -> None:
    result = run_part(part("raise SystemExit(1)", needs=("json", "no_such_module")), empty_record(tmp_path))
    assert result.status == "skipped" and result.reason is not None
    assert result.reason.startswith("no_such_module cannot be imported: ModuleNotFoundError")
    result = run_part(part("raise SystemExit(1)", only_on_gpu=True), empty_record(tmp_path))
    assert (result.status, result.reason) == ("skipped", "has no CPU kernels")


def test_without_a_c_compiler_nothing_is_compiled(monkeypatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    assert without_compiler() == {}
    monkeypatch.setenv("PATH", "/nowhere")
    assert without_compiler() == {"TORCH_COMPILE_DISABLE": "1"}


def test_a_module_that_crashes_is_reported(tmp_path, monkeypatch) -> None:
    (tmp_path / "crashes.py").write_text("import os; os.kill(os.getpid(), 11)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert import_problem("crashes") == ("", "exit status -11")
    assert import_problem("json") == ("2.0.9", None)


def test_parts_with_their_arguments_for_a_cpu_end_within_a_few_minutes_each() -> None:
    """15 minutes are what a borrowed machine may give, so the most valuable parts come first."""
    names = [each.name for each in parts("/out")]
    assert len(set(names)) == len(names) and names.index("trainer_0.6b") <= 2
    assert max(each.limit_minutes for each in parts("/out")) <= 10


@pytest.mark.parametrize(("model", "gib", "tokens"), [("0.6B", 79, 16_384), ("0.6B", 39, 8192), ("1.7B", 79, 8192)])
def test_micro_batches_become_smaller_until_they_fit_the_device(model, gib, tokens, tmp_path) -> None:
    write_architecture(tmp_path, f"Qwen/Qwen3-{model}")
    options = parse_options(["--model", f"Qwen/Qwen3-{model}"])
    config = fitting_config(tmp_path, options, read_architecture(tmp_path), gib * 2**30)
    assert config.actor.max_tokens_per_micro_batch == tokens


def test_a_bucket_is_opened_alike_by_all_code(tmp_path) -> None:
    flattened = flatten(NAMED, BucketMemory())
    opened = bucket_code._open(serialise(flattened))
    file = bucket_code._bucket_file()
    assert file is not None, "SGLang is installed here"
    sglang = bucket_code._with(bucket_code._load(file).FlattenedTensorBucket)
    for tensors in (sglang, bucket_code._tensors):
        held: dict[str, torch.Tensor] = {}
        size = copy_into(held, tensors(opened["flattened_tensor"], opened["metadata"]))
        assert size == sum(tensor.nbytes for _, tensor in NAMED)
        assert all(torch.equal(held[name], tensor) and held[name].shape == tensor.shape for name, tensor in NAMED)


def required() -> dict[str, Requirement]:
    lines = [line for line in REQUIREMENTS.read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def test_the_requirements_are_the_tested_versions() -> None:
    pins = read_pins(REPOSITORY / name for name in LOCK_FILES)
    assert {name: str(each.specifier) for name, each in required().items()} == {
        name: f"=={pins[name]}" for name in required()
    }


def is_always_needed(requirement: Requirement) -> bool:
    """Whether it belongs to this platform, and not to an extra."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def bare_machine(folder: Path) -> dict[str, str]:
    """Environment in which only PyTorch, what it requires, Triton and the probe's requirements can be imported."""
    allowed = {*required(), "torch", "triton"}
    for name in ("torch", "jinja2", "sympy"):
        needed = [each for each in map(Requirement, requires(name) or []) if is_always_needed(each)]
        allowed |= {canonicalize_name(each.name) for each in needed}
    missing = sorted(
        module
        for module, owners in packages_distributions().items()
        if not {canonicalize_name(owner) for owner in owners} & allowed and module != "megatron_dsrl"
    )
    (folder / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        f"MISSING = set({missing!r})\n"
        "class Finder(PathFinder):\n"
        "    @classmethod\n"
        "    def find_spec(cls, name, path=None, target=None):\n"
        "        spec = super().find_spec(name, path, target)\n"
        "        is_vendored = 'setuptools/_vendor' in str(spec)  # what setuptools brings along\n"
        "        return spec if is_vendored or name.partition('.')[0] not in MISSING else None\n"
        "sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]\n"
    )
    assert {"sglang", "transformers", "aiohttp", "pytest"} <= set(missing)
    return os.environ | {"PYTHONPATH": str(folder)}


def probe(folder: Path, environment: dict[str, str], *arguments: str) -> dict[str, dict]:
    command = [sys.executable, "-m", "tools.gpu_probe", "--dry-run", "--output", str(folder), *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr
    return {result["name"]: result for result in json.loads((folder / "record.json").read_text())["results"]}


def test_every_part_can_be_imported_with_the_listed_packages(tmp_path) -> None:
    imports = "import tools.gpu_probe.__main__, tools.gpu_probe.device, tools.gpu_probe.trainer"
    subprocess.run([sys.executable, "-c", imports], cwd=REPOSITORY, env=bare_machine(tmp_path), check=True, timeout=120)


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_a_dry_run_needs_only_the_listed_packages(tmp_path) -> None:
    results = probe(tmp_path / "probe", bare_machine(tmp_path))
    assert {name: result["status"] for name, result in results.items()} == {
        "packages": "passed", "device": "passed", "trainer_0.6b": "passed", "trainer_1.7b": "passed",
        "trainer_0.6b_transformer_engine": "skipped", "actor_tests": "skipped", "engine": "skipped",
    }  # fmt: skip
    figures = results["trainer_0.6b"]["figures"]
    assert figures["weight stream, opened by"].startswith("the project's own; SGLang cannot be imported: ")
    assert re.match(r"all \d+ tensors equal", figures["weight stream, digests"])
    assert results["engine"]["reason"].startswith("sglang cannot be imported: ModuleNotFoundError")


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_with_sglang_its_own_code_opens_the_buckets_and_an_engine_runs(tmp_path) -> None:
    results = probe(tmp_path, dict(os.environ), "--only", "trainer_0.6b,actor_tests,engine")
    assert {result["status"] for result in results.values()} == {"passed"}
    assert results["trainer_0.6b"]["figures"]["weight stream, opened by"] == (
        "SGLang's unpickler and FlattenedTensorBucket"
    )
