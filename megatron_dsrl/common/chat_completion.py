"""Answers of OpenAI-compatible chat endpoints, such as SGLang's."""

from typing import Any


def completion_text(answer: Any) -> str:
    """The text of the first choice; may be empty.

    Args:
        answer: the decoded JSON of `/v1/chat/completions`.

    Raises:
        ValueError: it is not a chat completion.
    """
    try:
        return answer["choices"][0]["message"]["content"] or ""
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"the endpoint's answer is not a chat completion: {str(answer)[:200]}") from error
