"""Which source code runs: the git commit of a package, and what has been changed since.

A run may start outside a checkout, without git, or in a checkout that git refuses to read (another owner). The commit
is then null, and `reason` says why.
"""

import hashlib
import json
import os
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

GIT_SECONDS = 20
"""Limit for one git command: the checkout may be on a slow file server."""
UNTRACKED_BYTES = 2**20
"""Untracked files up to this size are hashed by their content, larger ones by their size."""


@dataclass(frozen=True)
class CodeState:
    """A commit, and whether the files are still those of the commit."""

    commit: str | None = None
    dirty: bool | None = None
    """Whether tracked files differ from the commit, or there are untracked files that git does not ignore."""
    diff_sha256: str | None = None
    """Over `git diff HEAD` and the untracked files; None if nothing differs. Equal diffs have equal hashes."""
    reason: str | None = None
    """Why the commit is unknown."""


class _GitFailed(Exception):
    """The message says why."""


def code_of_package(folder: Path, name: str) -> CodeState:
    """The state of the checkout that a package is imported from, or the commit that it was installed from.

    Args:
        folder: folder of the package, such as `<checkout>/megatron_dsrl`.
        name: name of its distribution, such as `megatron-dsrl`.
    """
    try:
        # An installed package may be inside another project's checkout, which does not track it.
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
    except _GitFailed as failure:
        commit = _installed_commit(name)
        return CodeState(commit=commit, dirty=False) if commit else CodeState(reason=str(failure))
    return code_of_checkout(folder)


def code_of_checkout(folder: Path) -> CodeState:
    """The state of the checkout that contains a folder."""
    try:
        top = Path(os.fsdecode(_git(folder, "rev-parse", "--show-toplevel").rstrip(b"\n")))
        commit = _git(top, "rev-parse", "HEAD").decode().strip()
        diff = _difference(top)
    except _GitFailed as failure:
        return CodeState(reason=str(failure))
    return CodeState(commit, dirty=diff is not None, diff_sha256=diff)


def _difference(top: Path) -> str | None:
    """SHA-256 of everything by which the files differ from the commit; None if nothing does."""
    # The user's settings must not change the text of the diff.
    settings = ("--no-ext-diff", "--no-textconv", "--no-color", "--no-renames", "--binary", "--full-index", "-U3")
    diff = _git(top, "diff", *settings, "--src-prefix=a/", "--dst-prefix=b/", "--diff-algorithm=myers", "HEAD")
    untracked = _git(top, "ls-files", "--others", "--exclude-standard", "-z").split(b"\0")[:-1]
    if not diff and not untracked:
        return None
    digest = hashlib.sha256(diff)
    for name in sorted(untracked):
        digest.update(b"\0" + name + b"\0" + _content(top / os.fsdecode(name)))
    return digest.hexdigest()


def _content(path: Path) -> bytes:
    try:
        if path.is_symlink():
            return os.fsencode(os.readlink(path))
        size = path.stat().st_size
        return path.read_bytes() if path.is_file() and size <= UNTRACKED_BYTES else f"{size} bytes".encode()
    except OSError as error:  # it may have disappeared
        return str(error.strerror).encode()


def _git(folder: Path, *arguments: str) -> bytes:
    """Output of a git command. Raises _GitFailed if git is not installed, refuses the folder, or takes too long."""
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=GIT_SECONDS,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise _GitFailed("git is not installed") from error
    except subprocess.TimeoutExpired as error:
        raise _GitFailed(f"git {arguments[0]} took more than {GIT_SECONDS} s") from error
    except OSError as error:
        raise _GitFailed(f"git cannot be run: {error}") from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit status {done.returncode}"]
        raise _GitFailed(f"git: {said[0]}")
    return done.stdout


def _installed_commit(name: str) -> str | None:
    """The commit that pip recorded (PEP 610) when it installed from a repository."""
    try:
        noted = distribution(name).read_text("direct_url.json")
    except PackageNotFoundError:
        return None
    return json.loads(noted).get("vcs_info", {}).get("commit_id") if noted else None
