"""The record of a GPU: its figures from a run folder, and the whole script on the CPU."""

import json
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.observability.tracker import Tracker
from megatron_dsrl.planning.compute import training_flops
from megatron_dsrl.planning.fit import ENGINE_RELEASED_BYTES, RESERVE_BYTES
from megatron_dsrl.planning.gpus import GPUS
from megatron_dsrl.rollout.recording import rollout_file, write_groups
from megatron_dsrl.rollout.sample import Sample, SampleGroup
from tests.planning.test_parameters import qwen3_8b
from tests.support.tiny_run import REPOSITORY
from tools.gpu_record import (
    SIZES,
    DeviceMemory,
    EngineSettings,
    free_port,
    known_gpu,
    part_lines,
    planned_memory,
    run_part,
    speeds,
    write_run,
)


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


def test_an_engines_own_settings_are_asked_for_while_it_runs() -> None:
    answer = {
        "attention_backend": "fa3", "disable_cuda_graph": False, "dtype": "bfloat16", "max_total_num_tokens": 12345,
        "cuda_graph_config": {"decode": {"backend": "full", "max_bs": 256}}, "api_key": "secret",
    }  # fmt: skip

    class Engine(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/server_info" else 404)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

    port = free_port()
    with EngineSettings(port) as settings, HTTPServer(("127.0.0.1", port), Engine) as server:
        server.timeout = 20
        server.handle_request()
    assert settings.shown == {
        "engine, attention_backend": "fa3", "engine, disable_cuda_graph": "False", "engine, dtype": "bfloat16",
        "engine, max_total_num_tokens": "12345", "engine, CUDA graphs, decode": "full, batches up to 256",
    }  # fmt: skip


@pytest.mark.parametrize("size", [name for name in SIZES if name != "tiny"])
def test_every_size_fits_the_gpu_that_it_is_for_and_the_plan_is_in_the_record(size, tmp_path) -> None:
    run = write_run(tmp_path, SIZES[size], on_gpu=True, port=3000)
    planned = planned_memory(run, tmp_path / "model", GPUS["h100"])
    peaks = {name: float(value) for name, value in planned.items() if name.startswith("device, ")}
    assert len(peaks) == 3 and max(peaks.values()) < 70
    others = (RESERVE_BYTES + ENGINE_RELEASED_BYTES) / 2**30
    assert float(planned["trainer, planned peak, GiB"]) == pytest.approx(
        peaks["device, planned peak of an update, GiB"] - others, abs=0.01
    )
    assert planned_memory(run, tmp_path / "model", None) == {}


def test_the_memory_of_a_device_is_the_most_that_was_in_use(tmp_path, monkeypatch) -> None:
    answers = tmp_path / "nvidia-smi"
    answers.write_text(f"#!/bin/sh\ntest -e {tmp_path}/later && echo 1024 || echo 2048\n: > {tmp_path}/later\n")
    answers.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with DeviceMemory() as device:
        time.sleep(1.5)
    assert device.shown == {"device, peak memory of all processes, GiB": "2.00"}
    monkeypatch.setenv("PATH", "/nowhere")
    with DeviceMemory() as none:
        pass
    assert none.shown == {}


def test_devices_are_known_by_the_names_that_cuda_gives_them() -> None:
    assert known_gpu(["NVIDIA H100 80GB HBM3"]) is GPUS["h100"]
    assert known_gpu(["NVIDIA A100-SXM4-80GB"]) is GPUS["a100"]
    assert known_gpu(["NVIDIA H200"]) is GPUS["h200"]
    assert known_gpu([]) is None and known_gpu(["NVIDIA GeForce RTX 4090"]) is None


def test_a_part_that_fails_or_hangs_is_in_the_record_with_what_it_said() -> None:
    failed = run_part(["-c", "import sys; print('so far'); sys.exit('no such kernel')"], limit_seconds=30)
    assert failed.status == 1
    shown = "\n".join(part_lines("A check", failed, last_lines=5))
    assert "FAILED with status 1" in shown and "so far" in shown and "no such kernel" in shown
    hung = run_part(["-u", "-c", "print('begun'); import time; time.sleep(60)"], limit_seconds=2)
    assert hung.status == 124 and "begun" in hung.output and "stopped after 2 s" in hung.output


@pytest.mark.slow
def test_the_whole_script_runs_on_a_cpu_and_says_so(tmp_path) -> None:
    record = tmp_path / "record.md"
    command = [sys.executable, "-m", "tools.gpu_record", "--size", "tiny", "--output", str(record)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, record.read_text() if record.exists() else done.stderr
    text = record.read_text()
    assert "says nothing about GPUs" in text and "| actor, MFU | no peak known |" in text
    assert text.count(": passed, ") == 6, text
    assert "optimizer torch.AdamW" in text and "| engine, attention_backend | torch_native |" in text
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert commit.stdout.strip() in text
