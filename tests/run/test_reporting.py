"""What a step record says about an update."""

from megatron_dsrl.actor.statistics import ObjectiveMetrics, UpdateMetrics
from megatron_dsrl.algorithms.importance import MISMATCH_MAXIMA, MISMATCH_MEANS
from megatron_dsrl.config.phase import PhaseConfig
from megatron_dsrl.run.reporting import log_prob_gap_warning, scored_spaces, update_metrics

NSR_PRERL = {"name": "nsr_prerl", "space": {"name": "pre_train"}, "advantage": "group_mean", "filter": "negative"}
PHASE = PhaseConfig.model_validate(
    {
        "name": "both",
        "space": {"name": "post_train"},
        "advantage": "group_mean",
        "filter": "positive",
        "additional_objectives": [NSR_PRERL],
    }
)


def kept(loss: float) -> ObjectiveMetrics:
    means = {**dict.fromkeys(MISMATCH_MEANS, 0.5), "entropy": 0.75}
    maxima = dict.fromkeys(MISMATCH_MAXIMA, 2.0)
    counts = {"kept_samples": 3, "kept_tokens": 30, "skipped_samples": 1, "computed_tokens": 20}
    return ObjectiveMetrics(loss, **counts, means=means, maxima=maxima)


def test_an_objective_that_keeps_no_sample_says_so_beside_one_that_does() -> None:
    update = UpdateMetrics(1.0, 1e-3, {"nsr_prerl": kept(0.25)}, router={"load_balancing_loss": 1.5})
    record = update_metrics(update, PHASE)
    assert record["router/load_balancing_loss"] == 1.5
    assert (record["policy/kept_samples"], record["policy/kept_tokens"]) == (0, 0)
    assert (record["nsr_prerl/kept_samples"], record["nsr_prerl/loss"], record["policy/total_loss"]) == (3, 0.25, 0.25)
    assert record["nsr_prerl/pre_train/mean_log_prob_gap"] == 0.5


def test_without_an_update_no_objective_has_kept_anything() -> None:
    record = update_metrics(None, PHASE)
    assert record == {f"{name}/kept_{what}": 0 for name in ("policy", "nsr_prerl") for what in ("samples", "tokens")}


def test_the_mismatch_with_the_engine_is_that_of_the_post_train_space() -> None:
    record = update_metrics(UpdateMetrics(1.0, 1e-3, {"policy": kept(0.5), "nsr_prerl": kept(0.25)}), PHASE)
    assert record["policy/total_loss"] == 0.75 and record["policy/grad_norm"] == 1.0
    assert {name for name in record if name.startswith("mismatch/")} == {
        f"mismatch/{name}" for name in (*MISMATCH_MEANS, *MISMATCH_MAXIMA)
    }
    assert [name for name in record if "nsr_prerl/mismatch" in name or "policy/kl" in name] == []


def test_figures_of_tokens_are_named_after_the_distribution_they_describe() -> None:
    pre_train = PhaseConfig.model_validate(NSR_PRERL)
    record = update_metrics(UpdateMetrics(1.0, 1e-3, {"policy": kept(0.5)}), pre_train)
    assert record["pre_train/entropy"] == 0.75 and record["pre_train/mean_log_prob_gap"] == 0.5
    assert {name for name in record if name.startswith("policy/")} == {
        "policy/loss", "policy/grad_norm", "policy/learning_rate",
        "policy/kept_samples", "policy/kept_tokens", "policy/skipped_fraction",
    }  # fmt: skip
    assert scored_spaces(pre_train) == "pre_train"

    record = update_metrics(UpdateMetrics(1.0, 1e-3, {"policy": kept(0.5), "nsr_prerl": kept(0.25)}), PHASE)
    assert record["policy/entropy"] == record["nsr_prerl/pre_train/entropy"] == 0.75
    assert "nsr_prerl/entropy" not in record and "pre_train/entropy" not in record
    assert scored_spaces(PHASE) == "post_train+pre_train"


def test_what_was_not_computed_has_no_metrics_of_tokens() -> None:
    nothing = ObjectiveMetrics(
        0.0, 4, 30, skipped_samples=4, computed_tokens=0, means={"entropy": 0.0}, maxima={"max_ratio": 0.0}
    )
    record = update_metrics(UpdateMetrics(1.0, 1e-3, {"policy": nothing}), PHASE)
    assert record["policy/skipped_fraction"] == 1 and record["policy/kept_tokens"] == 30
    assert not {"policy/entropy", "mismatch/max_ratio"} & record.keys()

    both = ObjectiveMetrics.merge([nothing, kept(0.5)])
    assert both.totals() == {"loss": 0.25, "kept_samples": 7, "kept_tokens": 60, "skipped_fraction": 5 / 7}
    assert both.means["entropy"] == 0.75, "that of the tokens that were computed"


def test_a_large_gap_between_trainer_and_engine_warns() -> None:
    gap = {"mismatch/mean_log_prob_gap": 0.2}
    assert "differ by 0.2 nats on average, above observability.max_log_prob_gap=0.1" in log_prob_gap_warning(gap, 0.1)
    assert log_prob_gap_warning(gap, 0.3) is None
    assert log_prob_gap_warning({"pre_train/mean_log_prob_gap": 0.2}, 0.1) is None, "no engine computes P(y)"
    assert log_prob_gap_warning(gap | {"response/older_token_fraction": 0.5}, 0.1) is None, "weights differed"
