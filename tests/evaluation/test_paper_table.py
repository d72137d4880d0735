"""The paper's results table from evaluations as `dsrl eval` leaves them."""

from pathlib import Path

import pytest

from megatron_dsrl.cli import main
from megatron_dsrl.evaluation.metrics import summarise_benchmark
from megatron_dsrl.evaluation.published import SIX_BENCHMARKS
from megatron_dsrl.evaluation.results import write_results
from megatron_dsrl.evaluation.sample_file import ProblemResult, SampleFile, SampleResult


def evaluation(folder: Path, right: dict[str, list[int]], samples: int = 32, **settings) -> Path:
    """An evaluation with the given number of right samples for each problem, by benchmark."""
    summaries = {}
    for name, counts in right.items():
        problems = [
            ProblemResult(
                index, "?", "1", tuple(SampleResult("", 9, False, float(i < count), "ok") for i in range(samples))
            )
            for index, count in enumerate(counts)
        ]
        with SampleFile(folder / "samples" / f"{name}.jsonl", {}) as file:
            for problem in problems:
                file.add(problem)
        title = SIX_BENCHMARKS.get(name, name.upper())
        summaries[name] = {"title": title, "temperature": 1.0, **settings, **summarise_benchmark(problems, None)}
    write_results(folder, "model", summaries)
    return folder


def tables(text: str) -> dict[str, dict[str, dict[str, str]]]:
    """Cells by heading, row and column."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    heading, header = "", None
    for line in text.splitlines():
        if line.startswith("#"):
            heading, header = line.lstrip("# "), None
        elif line.startswith("|"):
            cells = [cell.strip() for cell in line.split("|")[1:-1]]
            if header is None:
                header = cells
            elif cells[0] != "---":
                found.setdefault(heading, {})[cells[0]] = dict(zip(header, cells, strict=True))
    return found


def printed(capsys, *arguments: str) -> dict[str, dict[str, dict[str, str]]]:
    assert main(["table", *arguments]) == 0
    return tables(capsys.readouterr().out)


def test_without_evaluations_only_the_published_figures_are_shown(capsys) -> None:
    found = printed(capsys, "--size", "Qwen3-8B")
    results = found["Results beside the paper's (arXiv 2604.14142), Qwen3-8B"]
    assert list(results) == [
        "base", "GRPO", "PPO", "REINFORCE++", "RLOO", "Dr.GRPO", "DAPO", "NSR-RL warm-up", "DSRL"
    ]  # fmt: skip
    assert results["DSRL"].pop("average, paper") == "58.47" and results["PPO"]["average, paper"] == ""
    assert set(results["DSRL"].values()) == {"DSRL", ""}
    differences = found["DSRL over GRPO, in points"]
    assert set(differences["measured"].values()) == {"measured", ""}
    assert (differences["paper"]["HumanEval"], differences["paper"]["average of six"]) == ("+2.44", "+1.47")


def test_measured_cells_are_filled_and_the_average_waits_for_all_six(tmp_path, capsys) -> None:
    five = {name: [16, 16] for name in SIX_BENCHMARKS if name != "minerva"}
    base = evaluation(tmp_path / "base", five | {"bbh": [8, 8]})
    dsrl = evaluation(tmp_path / "dsrl", five | {"minerva": [32, 0], "math500": [32, 24]})
    found = printed(capsys, f"base={base}", f"dsrl={dsrl}", "--output", str(tmp_path / "table.md"))
    results = found["Results beside the paper's (arXiv 2604.14142), Qwen3-4B"]
    assert (results["base"]["MATH500"], results["base"]["Minerva"], results["base"]["average"]) == ("50.0", "", "")
    # (87.5 + 5 x 50) / 6
    assert (results["DSRL"]["MATH500"], results["DSRL"]["average"]) == ("87.5", "56.2")
    assert (results["DSRL"]["average, paper"], results["base"]["average, paper"]) == ("57.54", "41.26")
    assert found["Out of distribution"]["base"]["BBH"] == "25.0"
    assert "Different from the paper" not in (tmp_path / "table.md").read_text()


def test_several_runs_and_the_paired_difference(tmp_path, capsys) -> None:
    # GRPO 50 and 62.5 %: mean 56.25, deviation 8.839, t(0.975, 1) = 12.706: 12.706 * 8.839 / sqrt(2) = 79.4
    grpo = [evaluation(tmp_path / f"grpo{i}", {"amc23": right}) for i, right in enumerate([[32, 0], [32, 8]])]
    dsrl = evaluation(tmp_path / "run" / "evaluation" / "step_000002", {"amc23": [32, 12]})
    found = printed(capsys, f"GRPO={grpo[0]},{grpo[1]}", f"DSRL={tmp_path / 'run'}")
    assert found["Results beside the paper's (arXiv 2604.14142), Qwen3-4B"]["GRPO"]["AMC23"] == "56.2 ± 79.4"
    # By problem 0 and (12 - 4) / 32 = 25 points: draws of two problems give 0, 12.5 or 25.
    assert found["DSRL over GRPO, in points"]["measured"]["AMC23"] == "+12.5 (+0.0 to +25.0)"

    (dsrl / "samples" / "amc23.jsonl").unlink()
    found = printed(capsys, f"GRPO={grpo[0]},{grpo[1]}", f"DSRL={tmp_path / 'run'}")
    assert found["DSRL over GRPO, in points"]["measured"]["AMC23"] == "+12.5"


def test_departures_from_the_paper_are_listed_and_other_benchmarks_are_not_lost(tmp_path, capsys) -> None:
    mine = evaluation(tmp_path / "mine", {"amc23": [4], "sums": [8]}, samples=8, temperature=0.6, limit=1)
    assert main(["table", f"mine={mine}"]) == 0
    text = capsys.readouterr().out
    assert f"- mine, AMC23 ({mine}): 8 samples per problem, temperature 0.6, only the first 1 problems" in text
    assert tables(text)["Other benchmarks"]["mine"]["SUMS"] == "100.0"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "Qwen3-1B"], "the paper reports Qwen3-4B and Qwen3-8B, not Qwen3-1B"),
        (["{folder}"], "expected METHOD=DIR,DIR"),
        (["base={folder}"], "has no results.json: give an output folder of `dsrl eval`"),
        (["base={folder}/typo"], "typo does not exist: give an output folder of `dsrl eval`"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, message) -> None:
    assert main(["table", *(argument.format(folder=tmp_path) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err
