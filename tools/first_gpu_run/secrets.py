"""Remove secrets from what a bug report contains."""

import re
from collections.abc import Mapping

REMOVED = "[removed]"
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE|AUTH|COOKIE|(^|_)KEY($|_)", re.I)
HARMLESS_NAME = re.compile(r"TOKENIZERS_PARALLELISM|XAUTHORITY")
SHORTEST_SECRET = 6
"""Shorter values, such as `1`, are not looked for in texts: they occur everywhere."""
SECRETS_BY_FORM = re.compile(
    r"(?<![A-Za-z0-9_])(?:hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|sk-[\w-]{16,}|AKIA[A-Z0-9]{16}|xox[abprs]-[\w-]{10,})"
)
"""Tokens of Hugging Face, GitHub, GitLab, OpenAI and others, AWS and Slack."""
USER_IN_URL = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
NAMED_SECRET = re.compile(
    r"((?:api_key|apikey|access_key|secret|password|passwd|token|authorization)['\"]?\s*[=:]\s*(?:Bearer\s+)?['\"]?)"
    r"(?!None\b|null\b|True\b|False\b)[A-Za-z0-9+/_.~-]{8,}",
    re.I,
)
"""Such as `api_key='...'` in an engine's log."""
SHOWN_VARIABLES = re.compile(
    r"(CUDA|NVIDIA|NCCL|TORCH|PYTORCH|NVTE|SGLANG|FLASHINFER|TRITON|SLURM|OMP|MKL|GLOO|UCX|FI|LD|PYTHON|HF|DSRL|CONDA"
    r"|MASTER|LOCAL|GROUP|ROLE|XDG_CACHE|APPTAINER|SINGULARITY|ENROOT)_"
    r"|(PATH|PYTHONPATH|PYTHONWARNINGS|TMPDIR|HOSTNAME|VIRTUAL_ENV|RANK|WORLD_SIZE|SHELL|LANG|LC_ALL)$"
)
"""Variables that help to understand a failure. Only the names of the others are shown."""


def environment_lines(environment: Mapping[str, str]) -> list[str]:
    """The environment as sorted lines `NAME=value`, values only of `SHOWN_VARIABLES` that are not secrets."""
    return [f"{name}={_shown_value(name, environment)}" for name in sorted(environment)]


def without_secrets(text: str, environment: Mapping[str, str]) -> str:
    """The text without the values of secret variables, and without what has the form of a token or password."""
    secrets = {value for name, value in environment.items() if _is_secret(name) and len(value) >= SHORTEST_SECRET}
    for secret in sorted(secrets, key=len, reverse=True):  # one may be part of another
        text = text.replace(secret, REMOVED)
    text = SECRETS_BY_FORM.sub(REMOVED, USER_IN_URL.sub(REMOVED, text))
    return NAMED_SECRET.sub(rf"\g<1>{REMOVED}", text)


def _shown_value(name: str, environment: Mapping[str, str]) -> str:
    if _is_secret(name):
        return REMOVED
    return without_secrets(environment[name], environment) if SHOWN_VARIABLES.match(name) else "[not shown]"


def _is_secret(name: str) -> bool:
    return bool(SECRET_NAME.search(name)) and not HARMLESS_NAME.match(name)
