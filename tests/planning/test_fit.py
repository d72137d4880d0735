"""What is on a GPU at the same time, with critic and reference policy."""

import pytest

from megatron_dsrl.cli import main
from megatron_dsrl.config.load import load_config
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.planning.fit import ENGINE_RELEASED_BYTES, ENGINE_WORK_BYTES, RESERVE_BYTES, RunMemory, run_memory
from megatron_dsrl.planning.gpus import find_gpu
from megatron_dsrl.planning.plan import make_plan
from megatron_dsrl.planning.planned_run import Assumptions, PlannedRun
from tests.planning.test_memory import paper_run
from tests.planning.test_parameters import published, qwen3_8b, qwen3_30b_a3b
from tests.support.tiny_run import REPOSITORY

GPU_BYTES = 80 * 10**9


def ppo(*overrides: str) -> RunConfig:
    """The paper's run with a critic, in the layout of the runs without one."""
    whole = ["parallel.tensor_parallel_size=4", "engine.memory_fraction=0.6", "actor.offload.gradients=false"]
    return load_config(REPOSITORY / "configs" / "ppo_qwen3_8b.yaml", [*whole, *overrides])


def test_models_beside_the_policy_are_counted_only_if_a_phase_of_the_run_needs_them() -> None:
    kl = "phases.1.kl={loss_coefficient: 0.1}"
    only_the_warm_up = paper_run(kl, "steps=20")
    for config, critic, reference in (
        (paper_run(), False, False),
        (ppo(), True, False),
        (paper_run(kl), False, True),
        (only_the_warm_up, False, False),
    ):
        memory = run_memory(config, qwen3_8b(), GPU_BYTES, world_size=8)
        assert (bool(memory.critic), any(memory.host.reference)) == (critic, reference)


def test_models_that_only_a_custom_phase_brings_in_are_counted() -> None:
    """The phase itself needs none of them: `at` adds an objective that does, at its first steps."""
    custom = [
        "phases.0.type=examples.own_algorithm.phase:FadingPhase",
        "phases.0.fading_steps=1",
        "phases.0.fading={name: fading, space: {name: post_train}, advantage: gae, kl: {loss_coefficient: 0.1}}",
    ]
    memory = run_memory(paper_run(*custom), qwen3_8b(), GPU_BYTES, world_size=8)
    assert memory.critic and any(memory.host.reference)
    plain, fading = (
        make_plan(PlannedRun(config, qwen3_8b(), find_gpu("h100"), 8, Assumptions(mean_response_tokens=1024)))
        for config in (paper_run(), paper_run(*custom))
    )
    assert fading.phases[0].flops > 2 * plain.phases[0].flops and fading.phases[1].flops == plain.phases[1].flops


QWEN3_4B = published("Qwen3ForCausalLM", 2560, 36, 32, 8, intermediate_size=9728, tie_word_embeddings=True)
SIZES = {"qwen3_4b": (QWEN3_4B, 8), "qwen3_8b": (qwen3_8b(), 8), "qwen3_30b_a3b": (qwen3_30b_a3b(), 16)}


@pytest.mark.parametrize("size", SIZES)
def test_every_run_of_a_size_fits_on_its_nodes_of_80_gb(size) -> None:
    architecture, gpus = SIZES[size]
    folder = REPOSITORY / "configs"
    singles = [[file] for file in folder.glob(f"*_{size}.yaml")]
    pairs = [[folder / "sizes" / f"{size}.yaml", method] for method in folder.glob("methods/*.yaml")]
    assert len(singles) >= 2 and len(pairs) > 20
    for files in [*singles, *(pair for pair in pairs if pair[1].stem != "ppo")]:
        memory = run_memory(load_config(files), architecture, find_gpu("h100").memory_bytes, gpus)
        assert memory.fits, (files, memory.problems)


def test_peaks_by_hand() -> None:
    """A critic's weights stay on the GPU in every phase; its activations are there while it is updated, not beside the
    policy's."""
    memory = run_memory(ppo(), qwen3_8b(), GPU_BYTES, world_size=8)
    (policy,), (critic,) = memory.policy, memory.critic
    assert critic.weights == policy.weights - 2 * (151_936 // 4 * 4096 - 4096 - 1)
    both = policy.resident + critic.resident
    assert memory.peak_update == both + policy.activations + policy.logits + ENGINE_RELEASED_BYTES + RESERVE_BYTES
    embedding = 2 * 151_936 * 4096  # travels whole, more than a bucket of 512 MiB; four times where it is gathered
    engine = memory.engine.weights + ENGINE_RELEASED_BYTES
    assert memory.peak_switch == both + engine + 4 * embedding + RESERVE_BYTES
    assert memory.peak_generation == both + int(0.6 * GPU_BYTES) + ENGINE_WORK_BYTES + RESERVE_BYTES
    gathered = 4 * policy.weights // 2 * 2 + 4 * policy.weights // 2 // 2  # of the larger model; DP 2
    assert memory.peak_checkpoint == both - policy.gradients - critic.gradients + engine + gathered + RESERVE_BYTES
    assert not memory.fits
    largest = memory.largest_memory_fraction
    for fraction, fits in ((largest, True), (largest + 0.01, False)):
        peak = run_memory(ppo(f"engine.memory_fraction={fraction}"), qwen3_8b(), GPU_BYTES, 8).peak_generation
        assert (peak <= GPU_BYTES) == fits


def test_experts_fit_only_if_their_optimizer_state_is_gathered_on_the_host() -> None:
    def planned(*overrides: str) -> RunMemory:
        config = load_config(REPOSITORY / "configs" / "dsrl_qwen3_30b_a3b.yaml", overrides)
        return run_memory(config, qwen3_30b_a3b(), GPU_BYTES, world_size=16)

    assert planned().fits and planned().gathered_on_device == (0,)
    (problem,) = planned("checkpoint.gather_optimizer_on=device").problems
    assert "a checkpoint takes 83.7 GiB of the 74.5 GiB of a GPU; set checkpoint.gather_optimizer_on=host" in problem


def test_what_is_offloaded_is_on_the_host_while_the_engine_samples() -> None:
    """During the update, and the switch of a step with a checkpoint, all of it is on the GPU."""
    everything = [f"actor.offload.{part}=true" for part in ("gradients", "optimizer", "parameters")]
    stays = run_memory(ppo(), qwen3_8b(), GPU_BYTES, world_size=8)
    moves = run_memory(ppo(*everything), qwen3_8b(), GPU_BYTES, world_size=8)
    (policy,), (critic,) = moves.policy, moves.critic
    weights, optimizer = policy.weights + critic.weights, policy.optimizer + critic.optimizer
    assert moves.peak_update == stays.peak_update
    assert moves.peak_switch == stays.peak_switch
    assert moves.peak_generation == int(0.6 * GPU_BYTES) + ENGINE_WORK_BYTES + RESERVE_BYTES
    assert moves.host.offloaded == (weights + optimizer,) and stays.host.offloaded == (0,)


def test_engines_elsewhere_take_no_memory_here(model, capsys) -> None:
    """Only the update counts, and whether their cache holds a sequence is not known."""
    elsewhere = ["engine.urls=[http://other:30000]", "engine.memory_fraction=0.9"]
    memory = run_memory(paper_run(*elsewhere), qwen3_8b(), GPU_BYTES, world_size=8)
    assert memory.peaks == {"an update": memory.peak_update, "a checkpoint": memory.peak_checkpoint} and memory.fits
    assert not run_memory(paper_run(elsewhere[1]), qwen3_8b(), GPU_BYTES, world_size=8).fits, "nor do they fit here"
    run = str(REPOSITORY / "configs" / "dsrl_qwen3_8b.yaml")
    assert main(["plan", run, model, "--gpu", "h100", *elsewhere]) == 0
    shown = capsys.readouterr().out
    assert "The engines are on other devices (engine.urls): their memory is not counted." in shown
    assert "engine cache" not in shown and "peak of generation" not in shown
