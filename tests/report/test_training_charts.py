"""The learning curve as a picture: one SVG file that names its curves, axes and phases, and cuts nothing off."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from megatron_dsrl.cli import main
from megatron_dsrl.common.errors import UserError
from megatron_dsrl.report.training_charts import write_learning_curve
from tests.observability.synthetic_run import write_run

SVG = "{http://www.w3.org/2000/svg}"


def texts(path: Path) -> list[str]:
    """All texts of a picture, in the drawing's order."""
    return [text.text or "" for text in ElementTree.parse(path).getroot().iter(f"{SVG}text")]


def test_the_command_writes_one_picture_with_curves_axes_and_phases_named(tmp_path: Path, capsys) -> None:
    write_run(tmp_path / "tiny", steps=48, warmup=5)
    picture = tmp_path / "pictures" / "curve.svg"
    assert main(["report", str(tmp_path / "tiny"), "--figure", str(picture)]) == 0
    assert capsys.readouterr().out == f"{picture}\n"
    assert not (tmp_path / "tiny" / "report.html").exists()
    words = texts(picture)
    assert words[0] == "tiny" and {"step", "accuracy", "nsr-prerl", "grpo", "0", "48"} < set(words)
    assert {"step 48:", "accuracy on held-out: 0.6 ± 0.031"} < set(words)
    assert any(text.startswith("reward of the samples: 0.") for text in words)
    bands = [rect for rect in ElementTree.parse(picture).getroot().iter(f"{SVG}rect") if "band" in rect.get("class")]
    assert len(bands) == len({band.get("class") for band in bands}) == 2
    source = picture.read_text()
    assert "prefers-color-scheme: dark" in source and "url(" not in source and "href" not in source


def test_a_run_between_two_evaluations_shows_the_last_one(tmp_path: Path) -> None:
    write_run(tmp_path / "going", steps=6, planned=40)
    words = texts(write_learning_curve(tmp_path / "going", tmp_path / "curve.svg"))
    assert {"step 6:", "accuracy on held-out: 0.483 ± 0.031 at step 4"} < set(words)


def test_rewards_beyond_an_accuracy_do_not_share_its_axis(tmp_path: Path) -> None:
    records = write_run(tmp_path / "run", steps=4)
    lines = [json.dumps(record | {"reward/mean": -3.0}) + "\n" for record in records]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines))
    assert not any("reward" in text for text in texts(write_learning_curve(tmp_path / "run", tmp_path / "a.svg")))
    (tmp_path / "run" / "evaluation.jsonl").unlink()
    alone = texts(write_learning_curve(tmp_path / "run", tmp_path / "b.svg"))
    assert {"reward", "-3", "reward of the samples: -3"} < set(alone)


def test_a_run_without_a_curve_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("name: fresh\n")
    with pytest.raises(UserError, match="no evaluation and no reward yet"):
        write_learning_curve(tmp_path, tmp_path / "curve.svg")
    assert main(["report", str(tmp_path), str(tmp_path), "--figure", str(tmp_path / "curve.svg")]) == 2
