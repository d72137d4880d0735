"""Every command in the documents is run: here, in a fresh copy of the repository with its own environment.

The commands of a document are run one after the other by bash, as written but for what makes them small (`SHORTER`),
for placeholder names (`STANDS_FOR`), and for models and data of the hub, which are replaced by folders. Those
that take a second (plans, dry runs) are run by test_guides.py, which compares their output. `NOT_HERE` has what is run
elsewhere, or cannot be run without a GPU, Docker or several machines.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from examples.gsm8k.make_random_model import ARCHITECTURE
from examples.tiny_dsrl.tokenizer import VOCAB_SIZE, build_tokenizer
from tests.configs.test_configs import MODELS
from tests.examples.test_guides import RUN_HERE as RUN_BY_TEST_GUIDES
from tests.support.documents import DOCUMENTS, Command, commands, name
from tests.support.families import FAMILIES
from tests.support.judge import judge
from tests.support.tiny_run import REPOSITORY

COMMAND_SECONDS = 1200

NOT_HERE = {
    r"^mlflow server|observability.trackers=|^dsrl upload": "tests/observability/trackers/test_real_trackers.py does",
    r"^bash tools/run_tests.sh(?! tests/actor)": "runs these tests",
    r"\bsbatch ": "tests/slurm/test_job_script.py runs the script that every such line submits",
    r"^bash tools/local_slurm.sh": "tests/slurm/test_jobs.py uses what it installs",
    r"^docker |^apptainer |^enroot |install.sh wheels": "the images; tests/tools/test_image.py lints them",
    r"NVIDIA/apex|^git -C apex|check_sources.py": "downloads sources; tests/tools/test_image.py has a small package",
    r"^python tools/image/check_pins.py": "tests/tools/test_image.py runs it, where uv is installed",
    r"^pytest -m gpu|tools.first_gpu_run(?! --(dry-run|list))|tools.gpu_probe(?! --dry-run)": "needs a GPU",
    r"smollm2": "downloads a model",
    r"examples[/.]laboratory": "hours; tests/examples/test_laboratory.py runs all of it at a small size",
    r"gpu_probe_packages": "tests/tools/test_gpu_probe.py runs it with these packages only",
    r"^torchfrtrace": "tests/platform/test_cuda.py runs it",
    r"^dsrl serve|train examples/asynchronous/run.yaml": "examples/asynchronous/run.sh does",
    r"launch_server|engine.urls": "of several machines; tests/rollout/engines/test_external_engines.py has one",
}
"""Commands that are not run here, and why."""

STANDS_FOR = {
    r"\bSOURCE\b": ".cache/tiny_dsrl/base",
    r"\bTARGET\b": "base.mcore",
    r"\bHF MEGATRON\b": "tiny_dsrl.hf runs/tiny_dsrl",
    r"\bCONFIG\b(?!\.yaml)": "configs/tiny_dsrl.yaml name=rollout_only steps=2",
    r"CONFIG.yaml --benchmarks NAME,NAME": "configs/dsrl_qwen3_8b.yaml --benchmarks math500",
    r"GRPO=RUN DSRL=RUN": "GRPO=runs/a DSRL=runs/c",
    r"\bRUN\b|<run folder>": "runs/tiny_dsrl",
    r"URL --judge NAME": "{judge} --judge default --responses 2",
    r"\boptions.url=URL": "options.url={judge} reward.options.max_tokens=8 steps=1 rollout.prompts_per_step=2",
    r"--gpus 8": "--gpus 2",
}
"""Replacements for placeholders and for numbers of GPUs."""

FEW_SAMPLES = "--limit 2 --max-tokens 16 engine.max_total_tokens=8192 model.dtype=float32"
SHORTER = {
    r"name=(cooler|sharded)": "steps=6",
    r"examples/distillation/run.yaml": "steps=1",
    r"train examples/lora/run.yaml": "steps=2",
    r"train examples/tool_use": "steps=5",
    r"train examples/verifiers": "steps=2",
    r"asynchronous/run.sh": "steps=3 evaluation.sets.0.limit=8",
    r"tiny_grpo.yaml$": "steps=2",
    r"tiny_experts_\w+.yaml$": "steps=6",
    r"actor.offload": "name=offloaded",
    r"eval (Qwen/Qwen3-4B|runs/dsrl_qwen3_8b)": "--data-folder {data} " + FEW_SAMPLES,
    r"--responses 400": "--responses 4",
    r"benchmark_conversion": "--gigabytes 0.02",
    r"benchmark_checkpoint": "--megabytes 10",
    r"benchmark_recording": "--prompts 4 --tokens 128",
    r"benchmark_weight_sync": "--megabytes 10 --rounds 1",
    r"benchmark_log_probs": "--tokens 64 --vocabulary 1024",
    r"benchmark_update": "--groups 2 --uniform-shares 0.5 --repetitions 1",
    r"benchmark_controller": "--batches 1 --tokens 16",
    r"tools.first_gpu_run --dry-run": "--only doctor,one_gpu_tiny",
    r"tools.gpu_probe --dry-run": "--only trainer_0.6b",
    r"tools.fault_soak": "--steps 3 --faults 1",
    r"tensorboard": "--inspect",
    r"test_layouts": "-k uneven",
}
"""Arguments added to a command to make it small, or to give it its own folder."""

COPIES = ("a", "b", "c", "d", "grpo_qwen3_8b", "dsrl_qwen3_8b") + tuple(
    f"{method}_qwen3_8b_seed{seed}" for method in ("grpo", "dsrl") for seed in (1, 2)
)
"""Runs that the documents compare: copies of the tiny one."""


def run_here(document: Path) -> list[Command]:
    return [
        command
        for command in commands(document)
        if command.line not in RUN_BY_TEST_GUIDES and not any(re.search(each, command.line) for each in NOT_HERE)
    ]


def test_no_exception_is_left_over() -> None:
    lines = [command.line for document in DOCUMENTS for command in commands(document)]
    assert [each for each in NOT_HERE if not any(re.search(each, line) for line in lines)] == []
    lines = [command.line for document in DOCUMENTS for command in run_here(document)]
    assert [each for each in (*SHORTER, *STANDS_FOR) if not any(re.search(each, line) for line in lines)] == []


@pytest.fixture(scope="module")
def checkout(tmp_path_factory, data_folder) -> Path:
    """A copy of the repository in which the first command of the README has been run, and what others find there."""
    folder = tmp_path_factory.mktemp("checkout") / "megatron-dsrl"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "evaluations")
    shutil.copytree(REPOSITORY, folder, ignore=left_out)
    run(folder, "bash examples/tiny_dsrl/run.sh")
    put_stand_ins_of_the_hub(folder, data_folder)
    benchmark = f"--benchmarks examples/tiny_dsrl/held_out.yaml --data-folder .cache/tiny_dsrl {FEW_SAMPLES}"
    run(folder, f"dsrl eval .cache/tiny_dsrl/base --output evaluations/base {benchmark}")
    for copy in ("evaluations/Qwen3-4B", "runs/base_8b/evaluation"):
        shutil.copytree(folder / "evaluations" / "base", folder / copy)
    run(folder, f"dsrl eval runs/tiny_dsrl --output evaluations/run {benchmark}")
    for copy in COPIES:
        shutil.copytree(folder / "runs" / "tiny_dsrl", folder / "runs" / copy)
        shutil.copytree(folder / "evaluations" / "run", folder / "runs" / copy / "evaluation" / "step_000050")
    of_the_hub = folder / "runs" / "dsrl_qwen3_8b" / "hf" / "step_000348"  # reads prompts that are longer than sums
    shutil.copytree(folder / "Qwen" / "Qwen3-8B", of_the_hub)
    for sweep in (folder / "examples" / "miniature").glob("*.yaml"):
        text = re.sub(r"seeds: \[.*\]", "seeds: [1]", sweep.read_text())
        sweep.write_text(re.sub(r"\bsteps=\d+", "steps=6", text))
    return folder


def put_stand_ins_of_the_hub(folder: Path, data: Path) -> None:
    """Replacements for names on the hub: small random models with Qwen3's tokenizer, GSM8K."""
    tokenizer = AutoTokenizer.from_pretrained(data / "qwen3-tokenizer")
    torch.manual_seed(0)
    for model in MODELS:
        tokenizer.save_pretrained(folder / model)
        config = Qwen3Config(**(ARCHITECTURE | {"max_position_embeddings": 40960}))
        Qwen3ForCausalLM(config).save_pretrained(folder / model)
    FAMILIES["Qwen3-MoE"](folder / "moe", vocab_size=VOCAB_SIZE)
    build_tokenizer().save_pretrained(folder / "moe")
    shutil.copy(data / "gsm8k" / "train.jsonl", folder)
    put_data_set(folder / "openai" / "gsm8k", "main", "train", data / "gsm8k" / "train.jsonl")
    math500 = data / "benchmarks" / "math500.jsonl"
    put_data_set(folder / "DigitalLearningGmbH" / "MATH-lighteval", "default", "train", math500)
    put_data_set(folder / "HuggingFaceH4" / "MATH-500", "default", "test", math500)
    put_data_set(folder / "HuggingFaceH4" / "aime_2024", "default", "train", data / "benchmarks" / "aime24.jsonl")


def put_data_set(folder: Path, subset: str, split: str, rows: Path) -> None:
    """As on the hub: rows, and a card that says what they are."""
    folder.mkdir(parents=True)
    shutil.copy(rows, folder)
    card = f"---\nconfigs:\n- config_name: {subset}\n  data_files: [{{split: {split}, path: {rows.name}}}]\n---\n"
    (folder / "README.md").write_text(card)


@pytest.fixture(scope="module")
def data(tmp_path_factory, data_folder) -> Path:
    """The benchmarks' files, with made-up questions where the real ones may not be downloaded."""
    folder = tmp_path_factory.mktemp("data")
    for part in data_folder.iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "gpqa").mkdir()
    shutil.copy(REPOSITORY / "tests" / "evaluation" / "made_up_gpqa.csv", folder / "gpqa" / "gpqa_diamond.csv")
    return folder


@pytest.fixture
def judge_url(request, tmp_path) -> Iterator[str]:
    """URL of a judge's server, started only for a document that needs one."""
    if not any("{judge}" in as_run(command) for command in run_here(request.getfixturevalue("document"))):
        yield ""
        return
    with judge(tmp_path) as url:
        yield url


def as_run(command: Command) -> str:
    """The script of a command, with `{data}` and `{judge}` for what is known only at run time."""
    line = command.line
    more = next((words for pattern, words in SHORTER.items() if re.search(pattern, line)), "")
    line = re.sub(r"( \| |$)", lambda pipe: f" {more}{pipe[0]}", line, count=1)
    for pattern, value in STANDS_FOR.items():
        line = re.sub(pattern, value, line)
    return "\n".join([*command.setting, line])


@pytest.fixture
def environment(document, checkout) -> str:
    """Name of the environment for a document's commands: the copy's own. What `pip install` in a guide brings must not
    reach the documents after it, so such a guide has one on top of it."""
    if not any(command.line.startswith("pip install") for command in run_here(document)):
        return ".venv"
    on_top = f".venv_{document.parent.name}"
    run(checkout, f"python -m venv {on_top}")
    packages = next((checkout / on_top).glob("lib/python*/site-packages"))
    base = next((checkout / ".venv").glob("lib/python*/site-packages"))
    (packages / "base.pth").write_text(f"{base}\n")
    run(checkout, f"{on_top}/bin/pip install --no-deps --ignore-requires-python --editable .")
    return on_top


def run(folder: Path, script: str, environment: str = ".venv") -> str:
    """What the script printed in an environment of the copy. Fails with that if the script does."""
    path = f"{folder}/{environment}/bin:{folder}/.venv/bin:{os.environ['PATH']}"
    variables = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "112", "PATH": path}
    for inherited in ("PYTHONPATH", "DSRL_VENV", "VIRTUAL_ENV"):
        variables.pop(inherited, None)
    try:
        finished = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=folder, env=variables, capture_output=True, text=True, timeout=COMMAND_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        pytest.fail(f"{script}\nhas not ended in {COMMAND_SECONDS} s\n{late.stdout}\n{late.stderr}")
    assert finished.returncode == 0, f"{script}\n{finished.stdout[-5000:]}\n{finished.stderr[-5000:]}"
    return finished.stdout + finished.stderr


def constant_words(line: str) -> list[str]:
    """Words of an output line if it has no numbers, which differ between runs, as do frames and spaces around them."""
    return [] if re.search(r"\d", line) or line == "..." else re.findall(r"[^\s|─-╿]+", line)


@pytest.mark.slow
@pytest.mark.needs_data
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("document", [document for document in DOCUMENTS if run_here(document)], ids=name)
def test_commands_run_and_print_the_lines_that_are_shown(document, checkout, environment, data, judge_url) -> None:
    for command in run_here(document):
        script = as_run(command).replace("{data}", str(data)).replace("{judge}", judge_url)
        printed = run(checkout, script, environment)
        lines = [constant_words(line) for line in printed.splitlines()]
        assert [line for line in command.shown if constant_words(line) not in ([], *lines)] == [], command.line


@pytest.mark.slow
@pytest.mark.needs_data
@pytest.mark.timeout(3600)
def test_the_first_command_of_the_readme_teaches_the_tiny_model(checkout) -> None:
    lines = (checkout / "runs" / "tiny_dsrl" / "evaluation.jsonl").read_text().splitlines()
    accuracy = {record["step"]: record["accuracy"] for record in map(json.loads, lines)}
    assert accuracy[50] > accuracy[0] + 0.3
    assert (checkout / "runs" / "tiny_dsrl" / "report.html").exists()
