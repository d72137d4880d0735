"""Pages in headless Chromium: run a script in one, and print one. Nothing is fetched from anywhere."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=5000"
).split()
TIMEOUT_SECONDS = 120


def evaluate(page: Path, script: str, folder: Path, width: int = 1200, dark: bool = False) -> Any:
    """Run the body of an async function in a page; its result as JSON, with everything that went wrong under `errors`.

    Args:
        page: HTML file. A copy with the script at its end is shown in a frame.
        script: JavaScript that ends in `return {...}`; `errors` is a list of what the console would show.
        folder: for the copies and the browser's profile.
        width: of the frame, in pixels; a real window cannot be narrow.
        dark: whether the reader prefers dark colours.
    """
    watch = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message || "a resource did not load"), true);
addEventListener("securitypolicyviolation", (event) => errors.push(`refused: ${event.violatedDirective}`));
</script>"""
    run = f"""<script>
(async () => {{ {script} }})().then((result) => parent.postMessage(JSON.stringify({{ ...result, errors }}), "*"),
  (error) => parent.postMessage(JSON.stringify({{ errors: [String(error)] }}), "*"));
</script>"""
    source = page.read_text(encoding="utf-8")
    (folder / "page.html").write_text(source.replace("<title>", f"{watch}<title>").replace("</body>", f"{run}</body>"))
    (folder / "frame.html").write_text(
        '<!doctype html><meta charset="utf-8"><title>nothing came back</title><script>'
        "addEventListener('message', (event) => { document.title = event.data; })</script>"
        f'<iframe src="page.html" width="{width}" height="900" style="border: 0"></iframe>'
    )
    colours = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    shown = _chromium([*colours, "--dump-dom"], folder / "frame.html", folder)
    title = html.unescape(re.search("<title>(.*?)</title>", shown, re.DOTALL)[1])
    return json.loads(title)


def print_page(page: Path, folder: Path) -> Path:
    """The page on paper, as a PDF file in the folder."""
    _chromium([f"--print-to-pdf={folder / 'page.pdf'}", "--no-pdf-header-footer"], page, folder)
    return folder / "page.pdf"


def _chromium(arguments: list[str], page: Path, folder: Path) -> str:
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [str(CHROMIUM), *FLAGS, profile, *arguments, page.resolve().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_SECONDS).stdout
