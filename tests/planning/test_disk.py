"""What a run leaves on disk, by hand."""

from megatron_dsrl.config.load import load_config
from megatron_dsrl.planning.disk import RunFiles, run_files
from tests.planning.test_memory import paper_run
from tests.planning.test_parameters import qwen3_8b
from tests.support.tiny_run import REPOSITORY

PARAMETERS = 8_190_735_360
"""Parameters of Qwen3-8B."""


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
    critic = PARAMETERS - 151_936 * 4096 + 4096 + 1  # a value head in place of the output layer
    ppo = load_config(REPOSITORY / "configs" / "ppo_qwen3_8b.yaml")
    assert run_files(ppo, qwen3_8b()).checkpoint_bytes == 14 * (PARAMETERS + critic)
