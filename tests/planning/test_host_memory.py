"""What is on the host beside the GPUs."""

from megatron_dsrl.config.load import load_config
from megatron_dsrl.planning.fit import run_memory
from tests.planning.test_fit import GPU_BYTES
from tests.planning.test_memory import paper_run
from tests.planning.test_parameters import qwen3_8b, qwen3_30b_a3b
from tests.support.tiny_run import REPOSITORY


def test_reference_and_checkpoint_lie_on_the_host() -> None:
    with_reference = paper_run("phases.1.kl={loss_coefficient: 0.1}")
    memory = run_memory(with_reference, qwen3_8b(), GPU_BYTES, world_size=8)
    (policy,) = memory.policy
    assert memory.host.reference == (policy.weights,)
    assert memory.host.checkpoint == (policy.weights + policy.optimizer,)
    parameters = policy.weights // 2
    whole, shard, received = 3 * 4 * parameters, 3 * 4 * parameters // 2, 2 * 4 * parameters  # DP 2
    assert memory.host.gathered == (whole + shard + received,)
    assert memory.host.total == policy.weights + sum(memory.host.checkpoint) + sum(memory.host.gathered)
    synchronous = run_memory(paper_run("checkpoint.asynchronous=false"), qwen3_8b(), GPU_BYTES, world_size=8)
    assert synchronous.host.reference == synchronous.host.checkpoint == (0,)


def test_replayed_experts_lie_on_the_host_of_every_process() -> None:
    """1,024 samples of 9,216 tokens, 48 layers with 8 choices of 4/3 bytes."""
    config = load_config(REPOSITORY / "configs" / "dsrl_qwen3_30b_a3b.yaml", ["rollout.routing_replay=true"])
    memory = run_memory(config, qwen3_30b_a3b(), GPU_BYTES, world_size=16)
    assert memory.host.routed_experts == 1024 * 9216 * 48 * 8 * 4 // 3
    checkpoint = memory.host.checkpoint[0] + memory.host.gathered[0]
    assert memory.host.total == memory.host.routed_experts + checkpoint
    without = load_config(REPOSITORY / "configs" / "dsrl_qwen3_30b_a3b.yaml", [])
    assert run_memory(without, qwen3_30b_a3b(), GPU_BYTES, world_size=16).host.routed_experts == 0
