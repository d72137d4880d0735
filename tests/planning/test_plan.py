"""Plans of the paper's run: what fits, what does not, what is suggested then, and what the run leaves on disk."""

import re

import pytest

from megatron_dsrl.cli import main
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.load import load_config
from megatron_dsrl.model.architecture import Architecture
from megatron_dsrl.planning.compute import training_flops
from megatron_dsrl.planning.gpus import find_gpu
from megatron_dsrl.planning.layouts import fewest_gpus, layout_problems, overrides_of, suggest
from megatron_dsrl.planning.plan import Plan, RunFiles, largest_length, make_plan, run_files
from megatron_dsrl.planning.planned_run import Assumptions, PlannedRun
from megatron_dsrl.planning.scale import Costs, estimate_step
from tests.planning.test_memory import paper_run
from tests.planning.test_parameters import published, qwen3_8b, qwen3_30b_a3b
from tests.support.tiny_run import REPOSITORY

ASSUMED = Assumptions(mean_response_tokens=4096)
PARAMETERS = 8_190_735_360
"""Parameters of Qwen3-8B."""


def planned(*overrides: str, model: Architecture | None = None, gpu: str = "h100", world_size: int = 8) -> PlannedRun:
    """The paper's run, or that of another model."""
    return PlannedRun(paper_run(*overrides), model or qwen3_8b(), find_gpu(gpu), world_size, ASSUMED)


def plan_of(*overrides: str, gpu: str = "h100") -> Plan:
    return make_plan(planned(*overrides, gpu=gpu))


def test_operations_of_a_sequence_by_hand() -> None:
    """6 per parameter of the layers and token, the head for scored tokens only, and causal attention."""
    layers, head, attention = 36 * (80 * 128 * 4096 + 3 * 4096 * 12288), 4096 * 151_936, 36 * 32 * 128
    tokens, scored = 5120, 4096
    expected = 6 * layers * tokens + 6 * head * scored + 6 * attention * tokens**2
    counted = training_flops(qwen3_8b(), tokens - scored, scored, recompute="none")
    assert counted == pytest.approx(expected, rel=1e-9)


def test_the_papers_run_fits_on_one_node_of_h100_but_not_of_40_gib() -> None:
    assert plan_of().fits
    assert not plan_of(gpu="a100-40").fits


@pytest.mark.parametrize("field", ["actor.max_tokens_per_micro_batch", "rollout.max_response_tokens"])
def test_the_largest_length_fits_and_the_next_one_does_not(field) -> None:
    unlimited = "engine.max_context_tokens=null"
    largest = largest_length(planned(unlimited), *field.split("."))
    assert plan_of(unlimited, f"{field}={largest}").fits
    assert not plan_of(unlimited, f"{field}={largest + 1024}").fits


def test_suggestions_are_valid_fit_and_come_fastest_first() -> None:
    plans = suggest(planned("model.path=unused", model=qwen3_30b_a3b(), gpu="h200", world_size=16), count=5)
    assert len(plans) == 5
    for plan in plans:
        assert plan.fits and not layout_problems(plan.run)
    assert plans[0].step_seconds <= min(plan.step_seconds for plan in plans) * 1.06, "equal but for rounding"


def test_layers_that_do_not_divide_go_to_uneven_stages() -> None:
    """Qwen3-235B-A22B has 94: four stages of 23, 24, 24 and 23."""
    large = published(
        "Qwen3MoeForCausalLM", 4096, 94, 64, 4,
        intermediate_size=12288, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536,
    )  # fmt: skip
    settings = ["engine.tensor_parallel_size=8", "checkpoint.gather_optimizer_on=host"]
    offload = [f"actor.offload.{part}=true" for part in ("gradients", "optimizer", "parameters")]
    plans = suggest(planned(*settings, *offload, model=large, gpu="h200", world_size=64), count=200)
    layouts = [plan.run.config.parallel for plan in plans]
    stages = {layout.pipeline_parallel_size: layout.layers_of_stages(94) for layout in layouts}
    assert stages[4] == [23, 24, 24, 23] and stages[16] == [5, *[6] * 14, 5]
    assert not any(layout_problems(plan.run) for plan in plans)


def test_a_step_that_samples_ahead_takes_as_long_as_the_longer_of_its_parts() -> None:
    servers = "engine.urls=[" + ", ".join(f"'http://host:{port}'" for port in range(3000, 3008)) + "]"
    in_turns, ahead = plan_of(servers), plan_of(servers, "rollout.max_staleness=1")
    assert in_turns.step_seconds == in_turns.generation_seconds + in_turns.training_seconds
    assert ahead.step_seconds == max(in_turns.generation_seconds, in_turns.training_seconds)
    assert ahead.run_seconds < in_turns.run_seconds
    step = estimate_step(ahead.run, Costs())
    alone = estimate_step(in_turns.run, Costs())
    assert step.step == pytest.approx(alone.step - min(alone.generation, alone.update + alone.gradients))


def test_no_layout_is_suggested_where_none_fits() -> None:
    assert suggest(planned(model=qwen3_30b_a3b(), gpu="a100-40", world_size=2), count=5) == []


def test_the_command_says_what_fits_and_what_would(model, capsys) -> None:
    ppo = str(REPOSITORY / "configs" / "ppo_qwen3_8b.yaml")
    too_large = ["parallel.tensor_parallel_size=4", "engine.memory_fraction=0.6"]
    assert main(["plan", ppo, model, "--gpu", "h100", "--gpus", "8", *too_large]) == 1
    shown = capsys.readouterr().out
    assert "critic: optimizer" in shown and "This run does not fit." in shown
    assert "largest engine.memory_fraction that fits: 0.51" in shown
    assert main(["plan", ppo, model, "--gpu", "h100", "--gpus", "8"]) == 0


def test_the_command_scales_a_run_and_refuses_numbers_that_do_not_fit(model, capsys) -> None:
    run = str(REPOSITORY / "configs" / "dsrl_qwen3_8b.yaml")
    assert main(["plan", run, model, "--scale", "8,4096"]) == 0
    assert "Breaks first as the batch grows: rank 0 reading the engines' answers, at 4,096 GPUs." in " ".join(
        capsys.readouterr().out.split()
    )
    assert main(["plan", run, model, "--scale", "8,12"]) == 2
    assert "--scale: 12 GPUs cannot be divided" in capsys.readouterr().err


def test_what_is_suggested_can_be_pasted(capsys) -> None:
    """The overrides make the configuration that the plan is for, including engines, and it then fits."""
    file, engines = REPOSITORY / "configs" / "dsrl_qwen3_8b.yaml", "engine.tensor_parallel_size=4"
    config = load_config(file, [engines])
    (best,) = suggest(PlannedRun(config, qwen3_8b(), find_gpu("b200"), 2, ASSUMED), count=1)
    pasted = load_config(file, [engines, *overrides_of(best, config)])
    for section in ("parallel", "model", "engine"):
        assert getattr(pasted, section) == getattr(best.run.config, section)
    assert pasted.engine.tensor_parallel_size == 1, "4, as configured, is more than there are"
    assert overrides_of(best, pasted) == []
    arguments = ["plan", str(file), engines, "--gpu", "b200", "--gpus", "2"]
    assert main(arguments) == 1
    shown = capsys.readouterr().out
    assert "The configured layout is not possible on 2 GPUs:" in shown and "layouts that fit 2 GPUs" in shown
    words = re.search(r"overrides, to paste .*:\n((?: {4}.*\n)+)", shown)[1].replace("\\\n", " ").split()
    assert words == overrides_of(best, config)
    assert main([*arguments, *words]) == 0


def test_how_many_gpus_would_do() -> None:
    assert suggest(planned(world_size=2), count=1) == []
    assert fewest_gpus(planned(world_size=2)) == 4
    assert suggest(planned(world_size=4), count=1) != []


def test_a_gpu_of_the_table_and_one_described_by_its_figures() -> None:
    assert find_gpu("H20").flops == 148e12
    assert find_gpu("mine", gib=96, tflops=500, terabytes_per_second=3.2).memory_bytes == 96 * 2**30
    assert find_gpu("h100", gib=60).flops == find_gpu("h100").flops
    with pytest.raises(UserError, match="--gpu: mine is not known; choose one of .*rtx-4090.*--gpu-bandwidth"):
        find_gpu("mine", gib=96)


@pytest.mark.parametrize(
    "arguments",
    [
        "configs/dsrl_qwen3_30b_a3b.yaml --gpus 16",
        "configs/ppo_qwen3_8b.yaml parallel.pipeline_parallel_size=8 parallel.layers_in_first_stage=3 "
        "parallel.layers_in_last_stage=3 --gpus 32",
        "configs/dsrl_qwen3_8b.yaml --scale 8,64,512,4096",
    ],
)
def test_no_table_is_cut_in_80_columns(arguments, monkeypatch, capsys) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setenv("COLUMNS", "80")
    main(["plan", *arguments.split()])
    shown = capsys.readouterr().out
    assert "GPUs" in shown and "…" not in shown


def test_checkpoints_and_exports_by_hand() -> None:
    """In bfloat16 a checkpoint has 14 bytes per parameter: weights, master copy and two moments. 348 steps, every 50th
    of them and the last one."""
    assert run_files(paper_run(), qwen3_8b()) == RunFiles(3, 14 * PARAMETERS, 7, 2 * PARAMETERS)
    kept = run_files(paper_run("checkpoint={keep_every_steps: 100, save_every_steps: 50}"), qwen3_8b())
    assert (kept.checkpoints, kept.exports) == (2 + 3 + 1, 1), "those of steps 100, 200 and 300 are never removed"
    assert run_files(paper_run("checkpoint={save_every_steps: null}"), qwen3_8b()).checkpoints == 1


def test_adapters_are_saved_alone_but_exported_merged() -> None:
    files = run_files(paper_run("actor.lora.rank=32"), qwen3_8b())
    assert files.checkpoint_bytes < 0.02 * 14 * PARAMETERS and files.export_bytes == 2 * PARAMETERS


def test_a_critic_is_saved_too() -> None:
    critic = PARAMETERS - 151_936 * 4096 + 4096 + 1  # a value head instead of the output layer
    ppo = load_config(REPOSITORY / "configs" / "ppo_qwen3_8b.yaml")
    assert run_files(ppo, qwen3_8b()).checkpoint_bytes == 14 * (PARAMETERS + critic)
