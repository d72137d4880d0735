"""A reference policy behind an SGLang server, of any size: scores sequences by token ids.

Rank 0 asks the server for the log-probs of all sequences and broadcasts them. A failed request is repeated until
`reference.timeout_seconds` have passed; then the run ends and can be resumed.
"""

import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from megatron_dsrl.algorithms.experience import Experience, PerToken
from megatron_dsrl.algorithms.spaces import ScoredSequence
from megatron_dsrl.common.collective import on_first
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.actor import ReferenceConfig
from megatron_dsrl.rollout.engines.address import EngineAddress, external_key

PAUSE_SECONDS = 1.0


class ServedReference:
    """The model at `reference.url`. Log-probs are at temperature 1."""

    is_initial = True
    """The server's weights never change, and checkpoints do not contain them."""

    def __init__(self, config: ReferenceConfig) -> None:
        assert config.url is not None
        self._url = config.url
        self._headers = EngineAddress(self._url, external_key()).headers | {"Content-Type": "application/json"}
        self._timeout_seconds = config.timeout_seconds
        self._concurrency = config.concurrency
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def try_out(self) -> None:
        """Score two tokens, so that a server that is missing is noticed before engines start. Collective. Raises
        UserError as `log_probs`."""
        on_first(lambda: self._score(ScoredSequence((0, 1), num_context=1)))

    def log_probs(self, experience: Experience) -> PerToken:
        """Log-probs of the scored tokens under the served model. Collective. Raises UserError if the server did not
        answer in time, or refused a sequence."""

        def ask() -> PerToken:
            with ThreadPoolExecutor(self._concurrency) as pool:
                return tuple(pool.map(self._score, experience.sequences))

        return on_first(ask)

    def refresh(self) -> None:
        """Not possible; the configuration refuses it."""
        raise AssertionError("a served reference keeps its weights")

    def start_save(self, folder: Path, copy: bool) -> NoReturn:
        """Not needed: `is_initial` is always true."""
        raise AssertionError("a served reference is not saved")

    def load(self, folder: Path) -> None:
        """Ignore the reference of a checkpoint that was written without a server."""

    def _score(self, sequence: ScoredSequence) -> Tensor:
        """[num_scored] float32."""
        body = {
            "input_ids": list(sequence.token_ids),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = self._post(body)
        try:
            entries = [(entry[0], entry[1]) for entry in answer["meta_info"]["input_token_logprobs"]]
            pairs = list(zip(sequence.token_ids, entries, strict=True))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise UserError(
                f"reference.url: {self._url} did not answer with a log-prob per token, but with {answer!r:.500}; is it "
                "an SGLang server?"
            ) from error
        for position, (sent, (_, scored)) in enumerate(pairs):
            if sent != scored:  # SGLang scores token 0 in place of the last row of its vocabulary
                raise UserError(
                    f"reference.url: {self._url} scored token {scored} instead of token {sent} at position "
                    f"{position}; is its vocabulary the policy's?"
                )
        chosen = [entries[position][0] for position in sequence.scored_positions.tolist()]
        return torch.tensor(chosen, dtype=torch.float32)

    def _post(self, body: dict[str, Any]) -> Any:
        """The decoded answer. Raises UserError without one in time, or after a refusal."""
        data, end = json.dumps(body).encode(), time.monotonic() + self._timeout_seconds
        while True:
            request = urllib.request.Request(f"{self._url}/generate", data, self._headers, method="POST")
            try:
                with self._opener.open(request, timeout=max(end - time.monotonic(), 0.001)) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                failure = f"status {error.code}: {error.read(500).decode(errors='replace')}"
                if 400 <= error.code < 500 and error.code != 429:
                    raise UserError(f"reference.url: {self._url} refused a sequence with {failure}") from error
            except (OSError, ValueError) as error:  # refused, unreachable, timed out, cut off
                failure = repr(error)
            if time.monotonic() + PAUSE_SECONDS > end:
                raise UserError(
                    f"reference.url: {self._url} did not score a sequence within reference.timeout_seconds = "
                    f"{self._timeout_seconds:g}; last failure: {failure}. Start the server again, then "
                    "the run, which continues from its newest checkpoint"
                )
            time.sleep(PAUSE_SECONDS)
