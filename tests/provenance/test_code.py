"""The commit of the code that runs: in a clean, a changed and no checkout, and without git."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dsrl.provenance.code import CodeState, code_of_checkout, code_of_package

IDENTITY = ("-c", "user.name=Someone", "-c", "user.email=someone@example.org")


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *IDENTITY, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """One commit with a package in it; `.cache` is ignored."""
    folder = tmp_path / "checkout"
    (folder / "package").mkdir(parents=True)
    (folder / "package" / "__init__.py").write_text("VALUE = 1\n")
    (folder / ".gitignore").write_text(".cache\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--message", "first")
    return folder


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    (checkout / ".cache").write_text("ignored")
    expected = CodeState(commit=git(checkout, "rev-parse", "HEAD"), dirty=False)
    assert code_of_package(checkout / "package", "package") == expected
    assert code_of_checkout(checkout / "package") == expected


def test_every_change_has_its_own_hash_under_any_git_settings(checkout: Path) -> None:
    """Changed, staged, new; the same change has the same hash again."""
    source = checkout / "package" / "__init__.py"
    source.write_text("VALUE = 2\n")
    changed = code_of_package(checkout / "package", "package")
    assert changed.dirty and changed.commit == git(checkout, "rev-parse", "HEAD")
    git(checkout, "add", ".")
    git(checkout, "config", "diff.noprefix", "true")
    git(checkout, "config", "diff.context", "0")
    git(checkout, "config", "color.diff", "always")
    assert code_of_checkout(checkout) == changed
    (checkout / "reward.py").write_text("def reward(): ...\n")
    with_new_file = code_of_checkout(checkout)
    (checkout / "reward.py").write_text("def reward(): return 1\n")
    with_other_content = code_of_checkout(checkout)
    assert len({changed.diff_sha256, with_new_file.diff_sha256, with_other_content.diff_sha256}) == 3


def test_a_package_inside_another_projects_checkout_does_not_get_its_commit(checkout: Path) -> None:
    installed = checkout / ".cache" / "site-packages" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").touch()
    state = code_of_package(installed, "package")
    assert state.commit is None and state.reason is not None and "did not match any file" in state.reason


def test_what_pip_installed_from_a_repository_has_the_commit_that_pip_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    information = tmp_path / "from_a_repository-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: from-a-repository\nVersion: 1.0\n")
    noted = {"url": "https://example.org/it.git", "vcs_info": {"vcs": "git", "commit_id": "0123abc"}}
    (information / "direct_url.json").write_text(json.dumps(noted))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert code_of_package(tmp_path, "from-a-repository") == CodeState(commit="0123abc", dirty=False)


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"PATH": "/nowhere"}, "git is not installed"),
        ({"GIT_TEST_ASSUME_DIFFERENT_OWNER": "1"}, "git: fatal: detected dubious ownership in repository"),
        ({"GIT_DIR": "/nowhere"}, "git: fatal: not a git repository: '/nowhere'"),
    ],
)
def test_without_a_commit_there_is_a_reason(checkout, monkeypatch, variables, reason) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for state in (code_of_package(checkout / "package", "package"), code_of_checkout(checkout)):
        assert state.commit is None and state.dirty is None and state.reason.startswith(reason)
