"""Prints recorded samples: in colour on a terminal, as plain text to a file or a pipe.

Responses are untrusted text. Control characters, which could manipulate the terminal, are shown as escapes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_dsrl.common.text import visible
from megatron_dsrl.rollout.sample import Sample, SampleGroup

GAP_STYLES = ((1.0, "bold green"), (0.1, "green"), (-0.1, "dim"), (-1.0, "red"))
"""(lowest gap in nats, style); gaps below the last one are bold red."""


@dataclass(frozen=True)
class ResponseLogProbs:
    """Log-probs of one response's tokens. Unit: nats."""

    with_prompt: list[float | None]
    """One per token; None for those that are not the policy's."""
    without_prompt: list[float | None]
    """The same; None also for the first if it has no context (`bos: none`)."""


def print_group(
    group: SampleGroup,
    log_probs: Sequence[ResponseLogProbs | None],
    token_text: Callable[[int], str] | None,
    console: Console,
) -> None:
    """Print a prompt and its samples.

    Args:
        log_probs: log-probs of each sample in both spaces; None if they were not computed.
        token_text: text of a token id; None omits the token tables.
    """
    rewards = ", ".join(f"{sample.reward:g}" for sample in group.samples)
    title = f"prompt {group.prompt.index} | answer {visible(group.prompt.answer)} | rewards {rewards}"
    console.print(Text(title, style="bold cyan"), soft_wrap=True)
    console.print(Text(visible(group.prompt.text.rstrip()), style="dim"), soft_wrap=True)
    for number, (sample, scores) in enumerate(zip(group.samples, log_probs, strict=True)):
        console.print()
        colour = "green" if sample.reward >= 1 else "red" if sample.reward <= 0 else "yellow"
        console.print(Text(header(number, sample, scores), style=f"bold {colour}"), soft_wrap=True)
        console.print(Text(visible(sample.text)), soft_wrap=True)
        if token_text is not None and sample.response_ids:
            console.print(token_table(sample, scores, token_text))
    console.print()


def header(number: int, sample: Sample, scores: ResponseLogProbs | None) -> str:
    """One line about a sample."""
    turns = " + ".join(f"{value:g}" for _, value in sample.turn_rewards)
    parts = [
        f"sample {number}",
        f"reward {sample.reward:g}"
        + (f" (recorded: {turns})" if turns else "")
        + ("" if sample.verdict == "ok" else f" (verifier: {sample.verdict})"),
        f"{len(sample.response_ids)} tokens, {'stopped' if sample.finish_reason == 'stop' else 'truncated'}",
        f"weight version {sample.weight_version}",
    ]
    if sample.response_ids:
        parts.append(f"engine log P(y|x) {fmean(sample.policy_log_probs):.3f} per token")
    if scores is not None:
        for name, values in (("trainer log P(y|x)", scores.with_prompt), ("log P(y)", scores.without_prompt)):
            scored = [value for value in values if value is not None]
            parts += [f"{name} {fmean(scored):.3f}"] if scored else []
    return " | ".join(parts)


def token_table(sample: Sample, scores: ResponseLogProbs | None, token_text: Callable[[int], str]) -> Table:
    """One row per token; green if the prompt makes the token likelier, red if it makes it less likely."""
    table = Table(box=None, pad_edge=False)
    table.add_column("token")
    headings = ["engine log P(y|x)"] + ([] if scores is None else ["log P(y|x)", "log P(y)", "gap"])
    for heading in headings:
        table.add_column(heading, justify="right")
    for position, (token, engine) in enumerate(zip(sample.response_ids, sample.log_probs, strict=True)):
        is_scored = sample.scored is None or sample.scored[position]
        cells, style = [f"{engine:.3f}" if is_scored else ""], ""
        if scores is not None:
            given, alone = scores.with_prompt[position], scores.without_prompt[position]
            gap = None if given is None or alone is None else given - alone
            cells += ["" if value is None else f"{value:.3f}" for value in (given, alone, gap)]
            style = "" if gap is None else _gap_style(gap)
        table.add_row(Text(visible(token_text(token), keep_lines=False)), *cells, style=style)
    return table


def _gap_style(gap: float) -> str:
    return next((style for least, style in GAP_STYLES if gap >= least), "bold red")
