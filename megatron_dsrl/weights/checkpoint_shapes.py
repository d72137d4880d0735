"""Compare the names and shapes of the tensors in a checkpoint with those of a model."""

from pathlib import Path

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.weights.hf_checkpoint import HfCheckpoint, NoWeights
from megatron_dsrl.weights.layouts import Shape, Vocabulary
from megatron_dsrl.weights.megatron_checkpoint import MegatronCheckpoint, is_megatron_checkpoint
from megatron_dsrl.weights.table import TensorRule, WeightTable

LARGEST_PADDING = 1024
"""Limit on padding rows of a vocabulary; Megatron-LM pads to a multiple of 128 x tensor-parallel size."""
FUSED_EXPERTS = (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
"""Ends of the names that Transformers 5 gives experts in memory."""


def checkpoint_shape(rule: TensorRule, table: WeightTable) -> Shape:
    """Shape of a rule's tensor in a checkpoint, without vocabulary padding."""
    stacked = ((table.num_layers,) if rule.per_layer else ()) + ((table.num_experts,) if rule.per_expert else ())
    return stacked + whole_shape(rule)


def whole_shape(rule: TensorRule) -> Shape:
    """Shape of one unsharded Megatron parameter: in every layout it has the rows of all its HF tensors."""
    # Asking the layout with tensors on the meta device would import torch._dynamo, which takes seconds.
    return (sum(tensor.shape[0] for tensor in rule.hf), *rule.hf[0].shape[1:])


def check_weights(folder: Path, table: WeightTable) -> None:
    """Check what needs no tensor data: that all tensors are there, in whole files, with the table's shapes. Raises
    UserError if not; see the checks of either format."""
    if is_megatron_checkpoint(folder):
        check_megatron_checkpoint(MegatronCheckpoint(folder), table)
    else:
        open_hf_weights(folder, table)


def open_hf_weights(folder: Path, table: WeightTable) -> HfCheckpoint:
    """The weights of an HF folder that a run starts from, checked. Raises UserError if there are none, and like
    `check_hf_checkpoint`."""
    try:
        checkpoint = HfCheckpoint(folder)
    except NoWeights as error:
        raise UserError(f"{error}. A run can also start from random weights: model.random_init=true") from error
    check_hf_checkpoint(checkpoint, table)
    return checkpoint


def check_megatron_checkpoint(checkpoint: MegatronCheckpoint, table: WeightTable) -> None:
    """Compare names and shapes with the table. A padded vocabulary is accepted. Raises UserError, which names the first
    few differences."""
    shapes = checkpoint.shapes()
    expected = {rule.checkpoint_name: checkpoint_shape(rule, table) for rule in table.rules}
    padded = {rule.checkpoint_name for rule in table.rules if isinstance(rule.layout, Vocabulary)}
    refuse([name for name in expected if name not in shapes], "missing tensors", checkpoint.folder)
    refuse(
        [name for name in shapes if name not in expected and "_extra_state" not in name],
        "tensors that the model of config.json does not have",
        checkpoint.folder,
    )
    wrong = [
        f"{name} is {list(shapes[name])}, config.json asks for {list(shape)}"
        for name, shape in expected.items()
        if not _fits(shapes[name], shape, name in padded)
    ]
    refuse(wrong, "tensors of the wrong shape", checkpoint.folder)


def check_hf_checkpoint(checkpoint: HfCheckpoint, table: WeightTable) -> None:
    """Compare names and shapes with the table, and copies with their originals. Raises UserError, which names the first
    few differences."""
    expected, names = table.hf_shapes(), checkpoint.names()
    fused = next((name for name in sorted(names) if name.endswith(FUSED_EXPERTS)), None)
    if fused is not None and fused not in expected:
        raise UserError(
            f"{checkpoint.folder}: {fused} holds all experts of a layer in one tensor; only the hub's form, with one "
            "tensor per expert, is read. Transformers writes that: AutoModelForCausalLM.from_pretrained(folder)"
            ".save_pretrained(another folder)"
        )
    refuse([name for name in expected if name not in names], "missing tensors", checkpoint.folder)
    surplus = [name for name in sorted(names) if name not in expected and name not in table.copies]
    refuse(
        [f"{name} (in {checkpoint.file_of(name).name})" for name in surplus],
        "tensors that the model of config.json does not have",
        checkpoint.folder,
    )
    shapes = checkpoint.shapes()
    wrong = [
        f"{name} (in {checkpoint.file_of(name).name}) is {list(shapes[name])}, config.json asks for {list(shape)}"
        for name, shape in expected.items()
        if shapes[name] != shape
    ]
    refuse(wrong, "tensors of the wrong shape", checkpoint.folder)
    for copy, original in table.copies.items():
        if copy in names and not checkpoint.are_equal(copy, original):
            raise UserError(
                f"{checkpoint.folder}: tie_word_embeddings in config.json makes {copy} (in "
                f"{checkpoint.file_of(copy).name}) the same as {original}, but their values differ. Set "
                "tie_word_embeddings=false if the model was trained with a separate head; otherwise remove the tensor"
            )


def _fits(shape: Shape, expected: Shape, may_be_padded: bool) -> bool:
    if not may_be_padded:
        return shape == expected
    return shape[1:] == expected[1:] and expected[0] <= shape[0] < expected[0] + LARGEST_PADDING


def refuse(problems: list[str], kind: str, folder: Path) -> None:
    """Raise UserError for any problems; the message names the first few."""
    if problems:
        shown = "; ".join(problems[:4]) + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
        raise UserError(f"{folder}: {kind}: {shown}")
