"""What a run reads before anything expensive starts."""

import pytest
from safetensors.torch import load_file, save_file

from megatron_dsrl.checkpoint.compatibility import check_same_model
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.load import load_config
from megatron_dsrl.run.inputs import load_inputs
from tests.support.tiny_run import write_tiny_run


def test_adapters_are_not_continued_on_other_weights(tmp_path) -> None:
    """Checkpoints with LoRA do not contain the weights of `model.path`; all others do, and do not look at them."""
    file, weights = write_tiny_run(tmp_path), tmp_path / "model" / "model.safetensors"
    runs = {name: load_config(file, overrides) for name, overrides in (("all", []), ("lora", ["actor.lora.rank=4"]))}
    before = {name: load_inputs(config).model for name, config in runs.items()}
    check_same_model(before["lora"], load_inputs(runs["lora"]).model, "the checkpoint")
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    check_same_model(before["all"], load_inputs(runs["all"]).model, "the checkpoint")
    with pytest.raises(UserError, match="the checkpoint belongs to a different model than model.path: weights is"):
        check_same_model(before["lora"], load_inputs(runs["lora"]).model, "the checkpoint")
