"""What the two GPU tools share: figures of a run, watchers, commands with limits, the record."""

import json
import os
import time
from pathlib import Path

import psutil
from rich.console import Console

from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.observability.tracker import Tracker
from megatron_dsrl.planning.compute import training_flops
from megatron_dsrl.planning.gpus import GPUS
from megatron_dsrl.rollout.engines.server_settings import write_settings
from megatron_dsrl.rollout.recording import rollout_file, write_groups
from megatron_dsrl.rollout.sample import Sample, SampleGroup
from tests.planning.test_parameters import qwen3_8b
from tools.gpu_record.attention_backend import attention_backends, is_log_line
from tools.gpu_record.device_memory import DeviceMemory
from tools.gpu_record.engine_settings import engine_settings
from tools.gpu_record.machine import describe_machine, known_gpu
from tools.gpu_record.processes import LIMIT_STATUS, run_python
from tools.gpu_record.record import Record, Result, print_tables
from tools.gpu_record.run_figures import speeds


def write_steps(folder, seconds_of_training) -> None:
    """Steps in which two responses of 30 tokens to a prompt of 10 are trained on."""
    sample = Sample(tuple(range(30)), (-1.0,) * 30, "text", "length", 1, 1.0)
    with Tracker(folder, tensorboard=False) as tracker:
        for step, seconds in enumerate(seconds_of_training, start=1):
            prompt = Prompt(0, "", tuple(range(10)), "")
            write_groups(rollout_file(folder, step), [SampleGroup(prompt, (sample, sample))])
            tracker.log_step({
                "step": step, "seconds/train": seconds, "seconds/step": 9.0,
                "memory/load_weights_seconds": 2.0, "memory/offload_seconds": 0.5, "memory/offload_moved_gib": 4.0,
                "memory/onload_seconds": 0.25, "memory/engine_sleep_seconds": 0.25,
                "throughput/tokens_per_second": 500.0, "memory/trainer_peak_gib": 1.5 + step,
                "mismatch/mean_log_prob_gap": 0.01,
            })  # fmt: skip


def test_figures_are_medians_without_the_first_step(tmp_path) -> None:
    write_steps(tmp_path, [100.0, 4.5, 2.5, 3.5])  # the actor waits half a second of it for the device
    figures = speeds(tmp_path, qwen3_8b(), weight_bytes=16 * 10**9, gpu=GPUS["h100"])
    assert figures["actor, tokens/s (of prompts and responses)"] == f"{80 / 3:,.0f}"
    flops = 2 * training_flops(qwen3_8b(), 10, 30, recompute="none") / 3
    assert figures["actor, MFU"] == f"{flops / 989e12:.1%} of 989 TFLOP/s"
    assert figures["weight push, GB/s"] == "8"
    assert figures["all switches between engine and trainer, s"] == "3" and figures["switch: offload, s"] == "0.5"
    assert figures["switch: offload, moved, GiB"] == "4"
    assert figures["engine, tokens/s"] == "500"
    assert figures["trainer, peak memory, GiB"] == "5.50"
    assert figures["log-prob gap, trainer - engine, mean"] == "1.00e-02"
    assert figures["part of the step: step, s"] == "9"
    assert speeds(tmp_path, qwen3_8b(), 1, gpu=None)["actor, MFU"] == "no peak known"
    on_two = speeds(tmp_path, qwen3_8b(), 1, gpu=GPUS["h100"], gpus=2)
    assert on_two["actor, MFU"] == f"{flops / 2 / 989e12:.1%} of 989 TFLOP/s"


def test_the_settings_that_sglang_chose_are_figures(tmp_path) -> None:
    answer = {
        "attention_backend": "fa3", "dtype": "bfloat16", "max_total_num_tokens": 12345,
        "cuda_graph_config": {"decode": {"backend": "full", "max_bs": 256}}, "api_key": "secret",
    }  # fmt: skip
    assert engine_settings(tmp_path) == {}
    (tmp_path / "engines").mkdir()
    write_settings(json.dumps(answer).encode(), tmp_path / "engines" / "engine_0.log")
    assert engine_settings(tmp_path) == {
        "engine, attention_backend": "fa3", "engine, dtype": "bfloat16", "engine, max_total_num_tokens": "12345",
        "engine, CUDA graphs, decode": "full, batches up to 256",
    }  # fmt: skip


def test_the_memory_of_a_device_is_the_most_that_was_in_use(tmp_path, monkeypatch) -> None:
    answers = tmp_path / "nvidia-smi"
    answers.write_text(f"#!/bin/sh\ntest -e {tmp_path}/later && echo 1024 || echo 2048\n: > {tmp_path}/later\n")
    answers.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with DeviceMemory() as device:
        time.sleep(1.5)
    assert device.figures == {"device, peak memory of all processes, GiB": "2.00"}
    monkeypatch.setenv("PATH", "/nowhere")
    with DeviceMemory() as none:
        pass
    assert none.figures == {}


def test_devices_are_known_by_the_names_that_cuda_gives_them() -> None:
    assert known_gpu(["NVIDIA H100 80GB HBM3"]) is GPUS["h100"]
    assert known_gpu(["NVIDIA H100 PCIe"]) is GPUS["h100-pcie"]
    assert known_gpu(["NVIDIA A100-SXM4-80GB"]) is GPUS["a100"]
    assert known_gpu(["NVIDIA A100-SXM4-40GB"]) is GPUS["a100-40"]
    assert known_gpu(["NVIDIA H200"]) is GPUS["h200"]
    assert known_gpu(["NVIDIA GeForce RTX 4090"]) is GPUS["rtx-4090"]
    assert known_gpu([]) is None and known_gpu(["NVIDIA TITAN V"]) is None
    assert known_gpu(["NVIDIA H200 MIG 1g.18gb"]) is None


def test_the_attention_that_transformer_engine_chose_is_a_figure() -> None:
    logged = "[INFO     | DotProductAttention]: Running with FusedAttention backend (sub-backend 1)"
    lines = [logged, "step 1: Running with care", logged]
    assert attention_backends(lines) == {
        "trainer, attention of Transformer Engine": "FusedAttention backend (sub-backend 1)"
    }
    assert [is_log_line(line) for line in lines] == [True, False, True]
    assert attention_backends(lines[1:2]) == {}


def test_a_commit_from_the_command_line_is_used_without_a_checkout(monkeypatch) -> None:
    assert len(describe_machine("abc")["commit"].split()[0]) == 40
    monkeypatch.setattr("tools.gpu_record.machine.ROOT", Path("/nowhere"))
    assert describe_machine("abc")["commit"] == "abc, as given on the command line"
    assert describe_machine()["commit"].startswith("unknown: ")


def test_output_and_exit_status_of_a_command_are_kept(tmp_path) -> None:
    shown: list[str] = []
    program = "import sys; print('so far'); sys.exit('no such kernel')"
    failed = run_python(["-c", program], tmp_path / "a" / "log", limit_seconds=30, show=shown.append)
    assert failed.last_lines(5) == shown == ["so far", "no such kernel"]
    assert failed.status == 1 and failed.problem is not None and failed.problem.startswith("exit status 1 after")
    assert run_python(["-c", "pass"], tmp_path / "log", limit_seconds=30).problem is None
    killed = run_python(["-c", "import os; os.kill(os.getpid(), 9)"], tmp_path / "log", limit_seconds=30)
    assert killed.problem is not None and killed.problem.startswith("ended by SIGKILL")


def test_a_command_that_hangs_is_ended_with_all_that_it_started_and_says_where_it_hung(tmp_path) -> None:
    program = "\n".join(
        (
            "import os, time",
            "def waits_in_vain(): time.sleep(600)",
            "child = os.fork()",
            "print(child) if child else waits_in_vain()",
            "os.waitpid(child, 0)",
        )
    )
    hung = run_python(["-c", program], tmp_path / "log", limit_seconds=4)
    output = hung.last_lines(1000)
    assert hung.status == LIMIT_STATUS and hung.problem is not None and "time limit" in hung.problem
    assert any("in waits_in_vain" in line for line in output)
    assert not psutil.pid_exists(int(output[0])) or psutil.Process(int(output[0])).status() == psutil.STATUS_ZOMBIE


WITH_FIGURES = Result("one", "proves one", "passed", 3.0, figures={"speed": "7"}, output=["done"], command="python one")


def record_of(folder: Path, **machine: str) -> Record:
    return Record("A record", folder, {"commit": "c0ffee", "device": "CPU", **machine}, on_cpu=True)


def test_a_record_is_saved_after_every_result(tmp_path) -> None:
    record = record_of(tmp_path)
    record.add(WITH_FIGURES)
    record.add(Result("two", "proves two", "failed", reason="exit status 1"))
    record.add(Result("one", "proves one", "skipped", reason="needs 2 GPUs"))
    text = record.markdown_file.read_text()
    assert "says nothing about GPUs" in text and "- commit: c0ffee" in text
    assert [line for line in text.splitlines() if line.startswith(("| one", "| two"))] == [
        "| one | skipped | 0 | needs 2 GPUs |", "| two | failed | 0 | exit status 1 |",
    ]  # fmt: skip
    saved = json.loads((tmp_path / "record.json").read_text())
    assert [result["status"] for result in saved["results"]] == ["skipped", "failed"]
    assert [result.name for result in record.failed] == ["two"]


def test_figures_and_output_are_in_the_record_and_in_the_tables(tmp_path) -> None:
    record = record_of(tmp_path)
    record.add(WITH_FIGURES)
    text = record.markdown_file.read_text()
    assert "| speed | 7 |" in text and "\ndone\n" in text and "`python one`" in text
    console = Console(width=100, file=open(os.devnull, "w"), record=True)
    print_tables(record, console)
    printed = console.export_text()
    assert "passed" in printed and "speed" in printed


def test_earlier_results_are_taken_only_from_the_same_commit_and_device(tmp_path) -> None:
    record_of(tmp_path).add(Result("one", "proves one", "passed"))
    same, other = record_of(tmp_path, time="later"), record_of(tmp_path, commit="another")
    same.take_earlier_results()
    other.take_earlier_results()
    assert [result.name for result in same.results] == ["one"] and other.results == []
