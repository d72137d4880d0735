"""Transformer Engine's layers against local ones and against Transformers, without a GPU.

What runs is Transformer Engine's own Python over PyTorch versions of its compiled kernels
(tests/support/transformer_engine_on_cpu): the same tables as for local layers, in float32. What cannot be seen here is
in the kernels themselves: their rounding, speed and memory.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM

from megatron_dsrl.actor.build import build_actor
from megatron_dsrl.config.model import ParallelConfig
from megatron_dsrl.conversion.convert import ConversionOptions, convert_megatron_to_hf
from megatron_dsrl.model.parallel import destroy_parallel, parallel_layout
from tests.actor import test_layouts, test_lora, test_offload, test_reference, test_router, test_saved_state
from tests.actor.test_actor import GRPO, NSR_PRERL, objective_of, reference, run_config
from tests.actor.test_layouts import Case, errors_of, same_on_every_rank
from tests.support.actors import main_gradients_of, weights_of
from tests.support.conversions import convert, tensors_of
from tests.support.distributed import run_distributed
from tests.support.transformer_engine_on_cpu import needs_transformer_engine

pytestmark = needs_transformer_engine

ENGINE = "tests.support.transformer_engine_on_cpu"
"""Prepares processes in which `auto` means Transformer Engine."""
REFERENCES = {name: case for name, case in test_layouts.ONE_PROCESS.items() if name.endswith("1 process")}
ONE_PROCESS = {
    "1 process": test_layouts.ONE_PROCESS["1 process"],
    "1 process, selective recomputation": Case(recompute="selective"),
    "1 process, full recomputation": Case(recompute="full"),
    "MoE: 1 process": test_layouts.ONE_PROCESS["MoE: 1 process"],
    "MoE, routing replay: 1 process": test_layouts.ONE_PROCESS["MoE, routing replay: 1 process"],
}
TWO_PROCESSES = {name: case for name, case in test_layouts.TWO_PROCESSES.items() if not name.endswith("again")}
HALF = {
    "local layers": Case(dtype="bfloat16", layer_spec="local", max_tokens=10_000),
    "Transformer Engine": Case(dtype="bfloat16", max_tokens=10_000),
}
CHECKPOINTS = {
    "one process": ParallelConfig(),
    "distributed optimizer": ParallelConfig(distributed_optimizer=True),
    "experts, in one process": ParallelConfig(),
}
ROUTER = {"an objective per micro-batch": test_router.Case(), "full recomputation": test_router.Case(recompute="full")}
ROUTER_IN_TWO_PROCESSES = {
    name: test_router.TWO_PROCESSES[name]
    for name in (
        "EP 2",
        "TP 2 with sequence parallelism",
        "over the step: EP 2",
        "over the step: TP 2 with sequence parallelism",
    )
}
GRADIENTS = {
    "1 process": Case(max_tokens=10_000),
    "1 process, full recomputation": Case(max_tokens=10_000, recompute="full"),
    "bfloat16: 1 process": Case(max_tokens=10_000, dtype="bfloat16"),
    "MoE: 1 process": Case("MoE", max_tokens=10_000),
}
GRADIENTS_IN_TWO_PROCESSES = {
    "TP 2 with sequence parallelism": Case(parallel=test_layouts.SEQUENCE_PARALLEL, max_tokens=10_000),
    "CP 2": Case(parallel={"context_parallel_size": 2}, max_tokens=10_000),
    "PP 2 x 2 virtual stages": Case(parallel=test_layouts.INTERLEAVED, max_tokens=10_000),
    "MoE: EP 2": Case("MoE", {"expert_parallel_size": 2}, max_tokens=10_000),
}


@pytest.fixture(scope="module")
def local(folder) -> dict[str, dict]:
    """Local layers and PyTorch's AdamW, in processes without Transformer Engine."""
    return run_distributed(test_layouts.run_cases, 1, folder, REFERENCES, timeout_seconds=300)[0]


def check(case: Case, result: dict, local: dict[str, dict]) -> None:
    alike = ("MoE, routing replay" if case.given_experts else "MoE") + ": 1 process"
    expected = local[alike if case.model == "MoE" else "1 process"]
    for name, weight in expected["weights"][0].items():
        assert np.array_equal(result["weights"][0][name], weight), f"{name}: loaded and streamed, it is the same"
    np.testing.assert_allclose(result["log_probs"], expected["log_probs"], rtol=0, atol=1e-5)
    errors = errors_of(result, expected)
    assert max(errors.loss, errors.grad_norm, errors.parameters) < 2e-5, errors
    assert errors.metrics < 1e-4, errors


@pytest.fixture(scope="module")
def one_process(folder) -> dict[str, dict]:
    cases = ONE_PROCESS | {f"bfloat16, {name}": case for name, case in HALF.items()}
    return run_distributed(test_layouts.run_cases, 1, folder, cases, timeout_seconds=300, prepare=ENGINE)[0]


@pytest.mark.parametrize("name", ONE_PROCESS)
def test_updates_are_those_of_local_layers(local, one_process, name) -> None:
    check(ONE_PROCESS[name], one_process[name], local)


def test_log_probs_loss_and_gradients_are_those_of_transformers(folder, one_process) -> None:
    """Before and in the first update of the dense model; experts are below, with the losses of their router."""
    model = Qwen3ForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
    with torch.no_grad():
        expected = test_reference.log_probs(model, objective_of(GRPO).experience)
    for name in ("1 process", "1 process, full recomputation"):
        np.testing.assert_allclose(one_process[name]["log_probs"], expected.numpy(), rtol=0, atol=1e-5)
    loss, grad_norm = reference(model, NSR_PRERL)
    update = one_process["1 process"]["updates"][0]
    assert update["loss"] == pytest.approx(loss, rel=1e-5)
    assert update["grad_norm"] == pytest.approx(grad_norm, rel=1e-5)


def test_bfloat16_stays_close_to_local_layers(one_process) -> None:
    """Within 2 %: they round at other places."""
    ours, theirs = (one_process[f"bfloat16, {name}"]["updates"] for name in HALF)
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=0.02)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.02)


def test_checkpoints_are_interchangeable_with_those_of_local_layers(folder, tmp_path) -> None:
    """Each resumes bit for bit from its own checkpoint, and the other continues from it within rounding."""
    stop, go_on = test_saved_state.without_and_with_a_stop, test_saved_state.continue_in_another_layout
    for number, (writer, reader) in enumerate(((None, ENGINE), (ENGINE, None))):
        models = tmp_path / str(number)
        models.mkdir()
        (models / "dense").symlink_to(folder / "dense")
        (models / "experts").symlink_to(folder / "MoE")
        (written,) = run_distributed(stop, 1, models, CHECKPOINTS, prepare=writer)
        (continued,) = run_distributed(go_on, 1, models, CHECKPOINTS, prepare=reader)
        for name, result in written.items():
            assert result["resumed steps"] == result["steps"]
            resumed = result["resumed weights"]
            assert all(np.array_equal(resumed[key], weight) for key, weight in result["weights"].items())
            for one, other in zip(result["steps"], continued[name]["steps"], strict=True):
                assert other == pytest.approx(one, rel=1e-5, abs=1e-9)
            for key, weight in result["weights"].items():
                np.testing.assert_allclose(continued[name]["weights"][key], weight, rtol=0, atol=2.5e-7, err_msg=key)


def load_train_and_save(converted: Path) -> dict[str, list[dict[str, np.ndarray]]]:
    """Per folder: the weights as loaded from its `megatron`, and after the step that `saved` holds."""
    results, parallel = {}, ParallelConfig()
    for name in ("dense", "MoE"):
        model, saved = converted / name / "megatron", converted / name / "saved"
        saved.mkdir()
        with parallel_layout(parallel, seed=1):
            actor = build_actor(run_config(model, parallel, test_saved_state.ACTOR), model)
            weights = [weights_of(actor)]
            test_saved_state.take_steps(actor, [GRPO])
            save = actor.model.start_save(saved, copy=False)
            save.write()
            save.finish()
            results[name] = [*weights, weights_of(actor)]
    destroy_parallel()
    return results


def test_conversion_knows_no_difference(folder, tmp_path) -> None:
    """What `dsrl convert` writes is loaded, and what is trained from it is converted back, bit for bit."""
    for name in ("dense", "MoE"):
        assert convert("hf-to-megatron", folder / name, tmp_path / name / "megatron") == 0
    (results,) = run_distributed(load_train_and_save, 1, tmp_path, prepare=ENGINE)
    for name, (loaded, trained) in results.items():
        saved, back = tmp_path / name / "saved", tmp_path / name / "back"
        convert_megatron_to_hf(saved, back, 10**9, ConversionOptions(), companions=folder / name)
        assert any(not np.array_equal(weight, trained[key]) for key, weight in loaded.items())
        for weights, hf_folder in ((loaded, folder / name), (trained, back)):
            tensors = tensors_of(hf_folder)
            assert tensors.keys() == weights.keys()
            assert all(np.array_equal(tensors[key].numpy(), weight) for key, weight in weights.items())


def test_offloading_changes_nothing(folder) -> None:
    distributed = Case(parallel=test_offload.DISTRIBUTED)
    cases = {"bfloat16": Case(dtype="bfloat16"), "float32, distributed optimizer": distributed}
    (results,) = run_distributed(test_offload.run_cases, 1, folder, cases, timeout_seconds=200, prepare=ENGINE)
    assert results.keys() == {*cases, "critic"}
    for without, with_offloads in results.values():
        test_offload.check(without, with_offloads)


def test_router_losses_are_those_of_transformers(folder, tmp_path) -> None:
    (outcomes,) = run_distributed(test_router.run_cases, 1, folder / "MoE", ROUTER, prepare=ENGINE)
    model = Qwen3MoeForCausalLM.from_pretrained(folder / "MoE", dtype=torch.float32)
    expected = test_router.reference(model, test_router.Case(), tmp_path)
    for outcome in outcomes.values():
        test_router.check(outcome, expected)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_router_losses_in_two_processes_are_those_of_local_layers(folder) -> None:
    """The losses within 1e-6, and every gradient within 5e-6 of its norm."""
    local, ours = (
        run_distributed(
            test_router.run_cases, 2, folder / "MoE", ROUTER_IN_TWO_PROCESSES, timeout_seconds=250, prepare=it
        )
        for it in (None, ENGINE)
    )
    for outcomes, expected in zip(ours, local, strict=True):
        for name, outcome in outcomes.items():
            test_router.check(outcome, expected[name])


def main_gradients(folder: Path, cases: Mapping[str, Case]) -> dict[str, dict[str, np.ndarray]]:
    """Per case: after an update over two micro-batches, one of each phase."""
    results = {}
    for name, case in cases.items():
        config = test_layouts.configuration(case, folder).model_copy(update={"optimizer": test_router.OPTIMIZER})
        with parallel_layout(config.parallel, seed=1):
            actor = build_actor(config, folder / case.model)
            actor.update([objective_of(GRPO), replace(objective_of(NSR_PRERL), name="nsr")])
            results[name] = main_gradients_of(actor)
    destroy_parallel()
    return results


@pytest.fixture(scope="module")
def local_gradients(folder) -> dict[str, dict[str, np.ndarray]]:
    return run_distributed(main_gradients, 1, folder, GRADIENTS)[0]


def check_gradients(name: str, gradients: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Every tensor within 5e-6 of its norm; in bfloat16, where the two round at other places, within 3 %."""
    assert gradients.keys() == expected.keys()
    errors = {key: test_router.relative_error(gradients[key], gradient) for key, gradient in expected.items()}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < (0.03 if name.startswith("bfloat16") else 5e-6), worst


def test_main_gradients_are_those_of_local_layers(folder, local_gradients) -> None:
    (ours,) = run_distributed(main_gradients, 1, folder, GRADIENTS, prepare=ENGINE)
    for name, expected in local_gradients.items():
        check_gradients(name, ours[name], expected)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_main_gradients_in_two_processes(folder, local_gradients) -> None:
    ranks = run_distributed(main_gradients, 2, folder, GRADIENTS_IN_TWO_PROCESSES, timeout_seconds=350, prepare=ENGINE)
    for ours in ranks:
        for name, case in GRADIENTS_IN_TWO_PROCESSES.items():
            check_gradients(name, ours[name], local_gradients["MoE: 1 process" if case.model == "MoE" else "1 process"])


def check_lora(result: dict, local: dict) -> None:
    np.testing.assert_allclose(result["log_probs"], local["log_probs"], rtol=0, atol=1e-5)
    errors = errors_of(result, local)
    assert max(errors.loss, errors.grad_norm, errors.parameters) < 2e-5, errors


@pytest.fixture(scope="module")
def local_lora(folder, tmp_path_factory) -> dict[str, dict]:
    checkpoints = tmp_path_factory.mktemp("local")
    return run_distributed(test_lora.run_cases, 1, folder, checkpoints, test_lora.ONE_PROCESS)[0]


def test_adapters_are_those_of_local_layers(folder, local_lora, tmp_path) -> None:
    """Though Transformer Engine has the norm within the layer."""
    (results,) = run_distributed(test_lora.run_cases, 1, folder, tmp_path, test_lora.ONE_PROCESS, prepare=ENGINE)
    for name, result in results.items():
        check_lora(result, local_lora[name])
        test_lora.assert_bitwise(result["resumed"], result["continued"])


@pytest.mark.slow
def test_adapters_in_two_processes(folder, local_lora, tmp_path) -> None:
    name = "TP 2 with sequence parallelism, full recomputation"
    cases = {name: test_lora.TWO_PROCESSES[name]}
    results = run_distributed(test_lora.run_cases, 2, folder, tmp_path, cases, prepare=ENGINE)
    check_lora(results[0][name], local_lora["1 process"])


@pytest.fixture(scope="module")
def two_processes(folder) -> dict[str, dict]:
    ranks = run_distributed(test_layouts.run_cases, 2, folder, TWO_PROCESSES, timeout_seconds=800, prepare=ENGINE)
    return same_on_every_rank(ranks)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", TWO_PROCESSES)
def test_two_processes(local, two_processes, name) -> None:
    check(TWO_PROCESSES[name], two_processes[name], local)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_processes(folder, local) -> None:
    name = "CP 2 x TP 2 with sequence parallelism"
    cases = {name: replace(test_layouts.FOUR_PROCESSES[name])}
    ranks = run_distributed(test_layouts.run_cases, 4, folder, cases, timeout_seconds=800, prepare=ENGINE)
    check(cases[name], same_on_every_rank(ranks)[name], local)
