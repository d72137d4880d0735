"""A reward given by a language model: a judge behind an OpenAI-compatible endpoint reads the response.

The judge is asked at temperature 0, so equal questions get equal verdicts and can be kept in a folder (`cache`), which
several runs may share. If the judge cannot be reached or gives no verdict, another verifier decides (`fallback`);
without one the sample counts as an error.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.rewards.http_request import Attempts, ask_chat_model, require_http_address
from megatron_dsrl.rewards.registry import Fields, check_options, reward_function
from megatron_dsrl.rewards.score import FallbackReward

QUESTION = """Judge whether a response solves a problem. Its final answer must agree with the reference answer, in any \
form. A response without a final answer is wrong.

Problem:
{prompt}

Reference answer: {answer}

Response:
{response}

Explain briefly, then end with the line "Verdict: right" or "Verdict: wrong"."""
VERDICT = r"(?i)verdict:\W*(right|wrong|\d+(?:\.\d+)?)\b"
WORDS = {"right": 1.0, "wrong": 0.0}

_SPECIAL_TOKEN = re.compile(r"<\|[^|<>]*\|>")
_PLACEHOLDER = re.compile(r"\{(prompt|answer|response)\}")


def judge(
    response: str,
    answer: str,
    url: str,
    model: str,
    prompt: str = "",
    question: str = QUESTION,
    verdict_pattern: str = VERDICT,
    max_score: float = 1.0,
    max_response_characters: int = 20_000,
    max_tokens: int = 1024,
    try_timeout_seconds: float = 30.0,
    retries: int = 2,
    total_seconds: float = 60.0,
    api_key_variable: str = "",
    cache: str = "",
    fallback: str = "",
    fallback_options: Mapping[str, Any] | None = None,
) -> float:
    """The judge's verdict on a response, from 0 to 1.

    Args:
        url: the judge's address, up to and including `/v1`.
        model: the judge's name at the endpoint.
        prompt: the rendered prompt; its special tokens are removed before the judge sees it.
        question: what to ask, with the placeholders `{prompt}`, `{answer}` and `{response}`.
        verdict_pattern: regular expression whose first group is `right`, `wrong` or a number. The last match counts.
        max_score: the judge's highest score; numbers are divided by it and clipped to [0, 1].
        max_response_characters: longer responses are truncated on the left.
        max_tokens: length limit of the judge's answer.
        try_timeout_seconds: limit of one attempt.
        retries: number of retries after the first attempt.
        total_seconds: limit of all attempts together; `reward.timeout_seconds` must be longer.
        api_key_variable: environment variable with the endpoint's key; empty for none.
        cache: folder in which verdicts are kept; empty for none.
        fallback: verifier that decides if the judge does not; empty for none.
        fallback_options: its options.

    Raises:
        RuntimeError: the judge gave no verdict and no fallback is set.
    """
    text = _fill(question, prompt=prompt, answer=answer, response=response[-max_response_characters:])
    message = {"role": "user", "content": text}
    request = {"model": model, "messages": [message], "temperature": 0.0, "max_tokens": max_tokens}
    headers = {"Authorization": f"Bearer {os.environ[api_key_variable]}"} if api_key_variable else {}
    attempts = Attempts(try_timeout_seconds, retries, total_seconds, headers)

    def ask() -> float:
        return _score(ask_chat_model(url, request, attempts), verdict_pattern, max_score)

    try:
        return _cached(Path(cache), [request, verdict_pattern, max_score], ask) if cache else ask()
    except (RuntimeError, ValueError) as failure:
        if not fallback:
            raise RuntimeError(f"the judge gave no verdict: {failure}") from failure
        reward = reward_function(fallback)(response, answer, **(fallback_options or {}))
        return FallbackReward(reward, f"the judge gave no verdict: {failure}")


def check_judge(options: Mapping[str, Any], fields: Fields) -> None:
    """Raise UserError if an address, a pattern, a placeholder, the environment variable or the fallback is invalid."""
    place = fields.options
    require_http_address(f"{place}.url", options["url"])
    if "{response}" not in options.get("question", QUESTION):
        raise UserError(f"{place}.question: the placeholder {{response}} is missing")
    try:
        groups = re.compile(options.get("verdict_pattern", VERDICT)).groups
    except re.error as error:
        raise UserError(f"{place}.verdict_pattern is not a regular expression: {error}") from error
    if groups == 0:
        raise UserError(f"{place}.verdict_pattern has no group; put the verdict in parentheses")
    if options.get("max_score", 1.0) <= 0:
        raise UserError(f"{place}.max_score must be positive")
    variable = options.get("api_key_variable", "")
    if variable and variable not in os.environ:
        raise UserError(f"{place}.api_key_variable: the environment variable {variable} is not set")
    if options.get("fallback"):
        fallback = Fields(f"{place}.fallback", f"{place}.fallback_options")
        check_options(options["fallback"], options.get("fallback_options") or {}, fallback)


def describe_judge(options: Mapping[str, Any]) -> str:
    """The judge, and the fallback."""
    fallback = f", otherwise {options['fallback']}" if options.get("fallback") else ""
    return f"judge: {options['model']} at {options['url']}{fallback}"


def judge_seconds(options: Mapping[str, Any]) -> float:
    """Longest time that one response may take, in seconds."""
    return float(options.get("total_seconds", 60.0))


def _fill(question: str, **parts: str) -> str:
    """The question with its placeholders filled in one pass, so that braces in the parts have no meaning."""
    parts["prompt"] = _SPECIAL_TOKEN.sub("\n", parts["prompt"]).strip()
    return _PLACEHOLDER.sub(lambda match: parts[match.group(1)], question)


def _score(text: str, pattern: str, max_score: float) -> float:
    """Raises ValueError if the answer has no verdict."""
    matches = list(re.finditer(pattern, text))
    if not matches:
        raise ValueError(f"its answer ends in {text[-80:]!r}, which does not match verdict_pattern")
    found = matches[-1].group(1)
    if found.lower() in WORDS:
        return WORDS[found.lower()]
    return min(max(float(found) / max_score, 0.0), 1.0)


def _cached(folder: Path, key: object, ask: Callable[[], float]) -> float:
    """The verdict for this key from the folder, or a new one, which is then kept. A full disk only costs the cache."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    file = folder / digest[:2] / f"{digest}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return float(json.loads(file.read_text(encoding="utf-8"))["reward"])
    reward = ask()
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"reward": reward}), encoding="utf-8")
        partial.replace(file)
    return reward
