"""Step and evaluation records as text that fits one line of a terminal.

What the words mean is explained in examples/run_folder/README.md ("The console").
"""

from collections.abc import Sequence

from megatron_dsrl.observability.records import Record

Part = tuple[str, int]
"""Words, and their rank: where a line is too long, the parts of the highest rank are left out first."""


def step_parts(record: Record, time_left: str) -> list[Part]:
    """The figures that say whether a run learns, in the order in which they are read."""
    seconds = _short_seconds(record, "seconds/step")
    parts = [
        (_formatted(record, "reward {:.3f}", "reward/mean"), 1),
        # comparable from step to step only where the responses come from a data set
        (_formatted(record, "loss {:.4f}", "policy/loss") if "data/epoch" in record else "", 1),
        (_formatted(record, "epoch {:.2f}", "data/epoch"), 4),
        (_mixed(record), 4),
        (_formatted(record, "len {:,.0f}", "response/mean_tokens"), 2),
        (_truncated(record, "response/truncated_fraction"), 3),
        (_gap(record), 5),
        (_formatted(record, "prompt gap {:.2f}", "pre_train/mean_log_prob_gap"), 5),
        (", ".join(part for part in (seconds, time_left) if part), 0),
    ]
    return [part for part in parts if part[0]]


def details(record: Record, everything: bool) -> list[str]:
    """Lines below a step's: failures of the verifier, if any, and all other figures on request."""
    lines = [_fallbacks(record), *(_failures(record, kind) for kind in ("timeouts", "errors"))]
    if everything:
        groups = _formatted(
            record,
            "groups: {} solved, {} mixed, {} unsolved",
            "reward/solved_groups",
            "reward/mixed_groups",
            "reward/unsolved_groups",
        )
        figures = [
            _formatted(record, "{:.1%} truncated", "response/truncated_fraction"),
            _formatted(record, "entropy {:.3f}", "response/conditional_entropy"),
            _formatted(record, "gradient norm {:.3g}", "policy/grad_norm"),
            _formatted(record, "learning rate {:.3g}", "policy/learning_rate"),
            _formatted(record, "{:,.0f} tokens/s", "throughput/tokens_per_second"),
        ]
        lines += [groups, ", ".join(figure for figure in figures if figure), _seconds(record)]
    return [line for line in lines if line]


def evaluation_parts(record: Record) -> list[Part]:
    """Parts of an evaluation's line, the set and its result first."""
    result = _formatted(record, "{:.1%} ± {:.1%}", "accuracy", "standard_error") or "accuracy unknown"
    if "loss" in record:
        result = _formatted(record, "loss {:.4f} ± {:.4f}", "loss", "loss_standard_error") or f"loss {record['loss']}"
    parts = [
        (f"evaluation after step {record['step']}: {record['set']} {result}", 0),
        (_formatted(record, "len {:,.0f}", "mean_tokens"), 1),
        (_truncated(record, "truncated_fraction"), 2),
        (_short_seconds(record, "seconds"), 3),
    ]
    return [part for part in parts if part[0]]


def evaluation_details(record: Record) -> str:
    """What accuracy or loss is averaged over."""
    if "loss" in record:
        return _formatted(record, "{:,} responses, {:,} tokens", "responses", "tokens")
    return _formatted(record, "{} problems x {} samples", "problems", "samples_per_prompt")


def fitting(parts: Sequence[Part], width: int) -> list[str]:
    """The words of as many parts as fit, two spaces apart and before them; at least those of the lowest rank."""
    kept = list(parts)
    while len(kept) > 1 and sum(len(words) + 2 for words, _ in kept) > width:
        kept.remove(max(kept, key=lambda part: part[1]))
    return [words for words, _ in kept]


def duration(seconds: float) -> str:
    """A duration in at most two units: `42 s`, `3 min 20 s`, `5 h 12 min`, `2 d 3 h`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    if seconds < 86400:
        return f"{seconds // 3600} h {seconds % 3600 // 60} min"
    return f"{seconds // 86400} d {seconds % 86400 // 3600} h"


def left(seconds: float) -> str:
    """The remaining time in one unit, which it has at least two of: `90 s left`, `37 min left`, `18 h left`."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} left"
    return f"{seconds:.0f} s left"


def _formatted(record: Record, template: str, *keys: str) -> str:
    values = [record.get(key) for key in keys]
    return "" if None in values else template.format(*values)


def _short_seconds(record: Record, key: str) -> str:
    seconds = record.get(key)
    return "" if seconds is None else f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:,.0f} s"


def _mixed(record: Record) -> str:
    """Groups that teach something, of all."""
    keys = [f"reward/{kind}_groups" for kind in ("solved", "mixed", "unsolved")]
    if any(record.get(key) is None for key in keys):
        return ""
    return f"mixed {record[keys[1]]}/{sum(record[key] for key in keys)}"


def _truncated(record: Record, key: str) -> str:
    return f"cut {record[key]:.0%}" if record.get(key) else ""


def _gap(record: Record) -> str:
    """One digit is enough to see whether it is rounding."""
    gap = record.get("mismatch/mean_log_prob_gap")
    if gap is None:
        return ""
    digit, _, exponent = f"{gap:.0e}".partition("e")
    return f"gap {digit}e{int(exponent)}" if gap else "gap 0"


def _seconds(record: Record) -> str:
    parts = [
        f"{key.removeprefix('seconds/').replace('_', ' ')} {value:.1f}"
        for key, value in record.items()
        if key.startswith("seconds/") and key != "seconds/step" and value is not None
    ]
    return f"seconds: {', '.join(parts)}" if parts else ""


def _fallbacks(record: Record) -> str:
    count = record.get("reward/verifier_fallbacks")
    return f"{count} rewards by the fallback of the verifier, which gave none" if count else ""


def _failures(record: Record, kind: str) -> str:
    count = record.get(f"reward/verifier_{kind}")
    return f"{count} verifier {kind}, which scored 0; see examples/troubleshooting: rewards" if count else ""
