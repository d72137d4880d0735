"""What is made from the configuration's classes, and the JSON schemas with which editors check the files."""

import json
import os
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from megatron_dsrl.config.describe import sections_of
from megatron_dsrl.config.kinds import FILES, KINDS
from megatron_dsrl.config.run import RunConfig
from megatron_dsrl.config.yaml_text import parse_yaml
from tests.support.tiny_run import REPOSITORY
from tools.write_config_reference import generated

YAML_FILES = {
    "run": [*REPOSITORY.glob("configs/**/*.yaml"), *REPOSITORY.glob("examples/own_*/run.yaml")],
    "sweep": [*REPOSITORY.glob("examples/miniature/*.yaml")],
    "benchmark": [
        *REPOSITORY.glob("megatron_dsrl/evaluation/benchmarks/*.yaml"),
        REPOSITORY / "examples" / "own_data" / "benchmark.yaml",
        REPOSITORY / "examples" / "tiny_dsrl" / "held_out.yaml",
    ],
}
WARM_UP = "name: a, space: {name: pre_train}, advantage: group_mean"


@pytest.fixture(scope="module")
def schemas() -> dict[str, Draft202012Validator]:
    validators = {name: Draft202012Validator(kind.schema()) for name, kind in KINDS.items()}
    for validator in validators.values():
        Draft202012Validator.check_schema(validator.schema)
    return validators


def as_json(text: str) -> Any:
    """As editors see it: keys are strings."""
    data, _ = parse_yaml(text, "test")
    return json.loads(json.dumps(data))


@pytest.mark.parametrize("file", generated(), ids=lambda file: file.name)
def test_the_files_are_those_of_the_classes(file) -> None:
    message = f"{file} is out of date: run python tools/write_config_reference.py"
    assert file.read_text(encoding="utf-8") == generated()[file], message


@pytest.mark.parametrize("kind", FILES)
def test_every_configuration_fits_its_schema_and_names_it(kind, schemas) -> None:
    assert len(YAML_FILES[kind]) > 1
    for file in YAML_FILES[kind]:
        text = file.read_text(encoding="utf-8")
        schema = os.path.relpath(REPOSITORY / "configs" / "schemas" / f"{kind}.json", file.parent)
        assert text.startswith(f"# yaml-language-server: $schema={schema}\n"), file
        assert [error.message for error in schemas[kind].iter_errors(as_json(text))] == [], file


@pytest.mark.parametrize(
    "text",
    [
        "inherits: [sizes/tiny.yaml, methods/dsrl.yaml]\nphases: {0: {until_step: 5}, 1: {loss: {clip_high: 0.28}}}",
        f"phases: [{{{WARM_UP}, filter: negative}}]",
        f"phases: [{{{WARM_UP}, loss: 'my.module:Loss'}}]",
        f"phases: [{{{WARM_UP}, loss: {{name: 'my.module:Loss', any: 1}}}}]",
        f"phases: [{{{WARM_UP}, type: 'my.module:Phase', any: 1}}]",
        f"phases: [{{{WARM_UP}, importance_correction: null, kl: {{loss_coefficient: 0.1}}}}]",
        "reward: {function: 'my.module:reward', options: {any: 1}}",
        "optimizer: {learning_rate: 1e-6, betas: [0.9, 0.99]}",
        "evaluation: {sets: {0: {limit: 10}}}",
    ],
)
def test_what_a_run_file_may_say_is_accepted(text, schemas) -> None:
    assert [error.message for error in schemas["run"].iter_errors(as_json(text))] == []


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("run", "rollout: {temprature: 1.0}"),
        ("run", "rollout: {top_p: 1.5}"),
        ("run", "steps: many"),
        ("run", "inherits: 3"),
        ("run", "reward: {function: boxd}"),
        ("run", "phases: {0: {filtr: negative}}"),
        ("run", "phases: {first: {until_step: 1}}"),
        ("run", "phases: {0: {filter: negativ}}"),
        ("run", "phases: {0: {loss: {name: gspo, dual_clip: 3.0}}}"),
        ("run", "phases: [{name: a, space: {name: pre_train}}]"),
        ("run", "phases: [{name: a, space: {name: pre_trian}, advantage: group_mean}]"),
        ("run", "phases: [{name: a, space: {bos: none}, advantage: group_mean}]"),
        ("run", "phases: [{name: a, space: {name: pre_train}, advantage: {eps: 1.0}}]"),
        ("run", f"phases: [{{{WARM_UP}, type: my_phase}}]"),
        ("sweep", "inherits: a.yaml"),
        ("sweep", "{output_dir: a, seeds: [], baseline: A, runs: {A: {config: a.yaml}}}"),
        ("benchmark", "{title: A, reward: {function: boxed}}"),
        ("benchmark", "{title: A, reward: {function: boxed}, hub: {sorce: a}}"),
        ("eval", "rollout: {temprature: 1.0}"),
        ("gradients", "bos: im_strat"),
    ],
)
def test_a_wrong_key_or_choice_is_refused(kind, text, schemas) -> None:
    assert not schemas[kind].is_valid(as_json(text))


def test_the_schema_explains_fields_and_choices(schemas) -> None:
    schema = schemas["run"].schema
    loss = schema["$defs"]["PhaseConfig"]["properties"]["loss"]
    assert loss["description"] == "Policy loss of a token."
    assert loss["default"] == {"name": "dual_clip", "clip_low": 0.2, "clip_high": 0.2, "dual_clip": 10.0}
    assert {"$ref": "#/$defs/GSPO"} in loss["oneOf"]
    gspo = schema["$defs"]["GSPO"]
    assert "arXiv 2507.18071" in gspo["description"] and gspo["required"] == ["name"]
    assert gspo["properties"]["clip_high"]["description"] == "The ratio is clipped above at 1 + clip_high."


def test_every_section_of_a_run_has_its_own_heading() -> None:
    """Also one that a nested section uses too, as `data.mixed_with.reward` uses that of `reward`."""
    page = (REPOSITORY / "configs" / "README.md").read_text(encoding="utf-8")
    headings = page.partition("## A run\n")[2].partition("\n## ")[0].splitlines()
    sections = [name for name, field in RunConfig.model_fields.items() if sections_of(field)]
    assert len(sections) > 10
    assert [name for name in sections if f"### `{name}`" not in headings] == []


def test_every_choice_says_where_it_comes_from() -> None:
    """Or is plain: a name that says all."""
    page = (REPOSITORY / "configs" / "README.md").read_text(encoding="utf-8")
    choices = page.partition("### `phases.space`")[2].partition("### `phases.kl`")[0]
    rows = [row for row in choices.splitlines() if row.startswith("| `")]
    without = [row.split("`")[1] for row in rows if "arXiv" not in row and ", 20" not in row and ", 19" not in row]
    assert len(rows) > 20
    assert without == ["post_train", "all", "supervised"]
