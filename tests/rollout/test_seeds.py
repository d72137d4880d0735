"""Seeds of samples."""

from megatron_dsrl.data.prompt import Prompt
from megatron_dsrl.rollout.seeds import sample_seed, seeds_of_batch

PROMPTS = [Prompt(index, text="", token_ids=(1,), answer="") for index in (7, 3, 7)]


def test_a_seed_is_a_fixed_function_of_what_the_sample_is_for() -> None:
    # written down, so that a change of the function, which would change every continued run, is noticed
    assert sample_seed(1, "step 12", 7, 0) == 5451411872710227879


def test_every_sample_has_a_seed_of_its_own() -> None:
    batches = [
        seeds_of_batch(run_seed, stream, PROMPTS, 4)
        for run_seed in (1, 2)
        for stream in ("step 1", "step 2", "evaluation held_out")
    ]
    seeds = [seed for batch in batches for group in batch for seed in group]
    assert len(set(seeds)) == len(seeds) == 72
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_does_not_depend_on_the_rest_of_the_batch() -> None:
    assert seeds_of_batch(1, "step 1", PROMPTS[1:2], 2)[0] == seeds_of_batch(1, "step 1", PROMPTS, 4)[1][:2]
