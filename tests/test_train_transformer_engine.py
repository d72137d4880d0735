"""DSRL on the tiny task with Transformer Engine's layers: it learns as with local layers.

The real `dsrl train` with a real engine; what Transformer Engine's Python calls is PyTorch
(tests/support/transformer_engine_on_cpu).
"""

import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from tests.support.compare_runs import records
from tests.support.tiny_run import REPOSITORY, dsrl
from tests.support.transformer_engine_on_cpu import needs_transformer_engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400), needs_transformer_engine]

STEPS = 20
"""The warm-up and fifteen steps of GRPO."""
SAME = ("reward/mean", "response/mean_tokens", "response/conditional_entropy", "policy/kept_samples")
"""Equal weights sample equal responses from a deterministic engine."""
CLOSE = ("policy/loss", "policy/grad_norm", "pre_train/entropy", "pre_train/mean_log_prob_gap")
LOCAL = "matrix products megatron.ColumnParallelLinear, norm megatron_dsrl.RMSNorm, optimizer torch.AdamW"
ENGINE = "matrix products megatron.TELayerNormColumnParallelLinear"


@pytest.fixture(scope="module")
def base() -> None:
    """The base model of the tiny task in `.cache`, made once per checkout."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launch, "-m", "examples.tiny_dsrl.make_base"], cwd=REPOSITORY, check=True, timeout=1200)


def trained(folder: Path, name: str, layers: str, prepare: str | None = None) -> Path:
    """The folder of a run whose layers are these."""
    options = (f"output_dir={folder}", f"name={name}", f"steps={STEPS}", "rollout.deterministic=true")
    result = dsrl("train", "configs/tiny_dsrl.yaml", *options, timeout_seconds=1000, prepare=prepare)
    assert result.returncode == 0, result.stderr
    assert layers in result.stdout, result.stdout
    return folder / name


def test_the_tiny_task_is_learnt_as_with_local_layers(base: None, tmp_path: Path) -> None:
    local = trained(tmp_path, "local", LOCAL)
    engine = trained(tmp_path, "transformer_engine", ENGINE, prepare="tests.support.transformer_engine_on_cpu")
    theirs, ours = records(local), records(engine)
    assert len(ours) == len(theirs) == STEPS
    for name in SAME:
        assert ours[0][name] == theirs[0][name], name
    for name in CLOSE:
        assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-5), name
    rewards = [fmean(record["reward/mean"] for record in steps[-5:]) for steps in (ours, theirs)]
    assert rewards[0] == pytest.approx(rewards[1], abs=0.05), "its standard error is 0.013"
    for run in (engine, local):
        before, *_, after = [record["accuracy"] for record in records(run, "evaluation.jsonl")]
        assert after > before + 0.2, run
