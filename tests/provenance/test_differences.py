"""What has changed between the starts of a run."""

from megatron_dsrl.provenance.differences import changed_inputs
from tests.observability.synthetic_run import start_record, write_starts


def with_prompts(digest: str) -> dict:
    return start_record()["data"] | {"prompts_sha256": digest * 64}


def test_other_data_under_the_same_path_are_a_changed_input(tmp_path) -> None:
    begun, other = start_record(after_step=0), start_record(after_step=4, data=with_prompts("0"), python="3.13")
    write_starts(tmp_path, begun, start_record(after_step=4))
    assert changed_inputs(tmp_path, 4) == []
    write_starts(tmp_path, begun, other)
    (change,) = changed_inputs(tmp_path, 4)
    assert (change.name, change.from_step) == ("Training data", 5)
    assert change.before.endswith("SHA-256 aaaaaaaaaaaa") and change.after.endswith("SHA-256 000000000000")


def test_a_start_that_made_no_step_does_not_count(tmp_path) -> None:
    failed = start_record(after_step=4, data=with_prompts("0"))
    write_starts(tmp_path, start_record(after_step=0), failed, start_record(after_step=4))
    assert changed_inputs(tmp_path, 4) == []
