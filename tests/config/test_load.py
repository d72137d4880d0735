"""Loading: inheritance, overrides, and messages for what does not validate."""

import re

import pytest

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.load import dump_config, load_config
from megatron_dsrl.config.phase import PhaseConfig


def test_defaults_and_types(small, write) -> None:
    config = load_config(write("run.yaml", small))
    assert config.seed == 1 and config.output_dir == "runs"
    assert config.optimizer.betas == (0.9, 0.999)
    assert config.phases[0].space.bos == "im_start"
    assert config.phases[1].until_step is None


def test_nearer_file_wins_key_by_key_and_lists_replace(small, write) -> None:
    write("common/base.yaml", small | {"optimizer": {"learning_rate": 1e-4, "betas": [0.8, 0.9]}})
    write("middle.yaml", {"inherits": "common/base.yaml", "optimizer": {"learning_rate": 1e-5}})
    last = write("run.yaml", {"inherits": "middle.yaml", "name": "mine", "phases": small["phases"][1:]})
    config = load_config(last)
    assert config.name == "mine"
    assert config.optimizer.learning_rate == 1e-5  # middle over base
    assert config.optimizer.betas == (0.8, 0.9)  # base, untouched by its section being named again
    assert [phase.name for phase in config.phases] == ["grpo"]
    assert config.rollout.prompts_per_step == 8


def test_of_several_parents_the_later_wins(small, write) -> None:
    write("size.yaml", small | {"optimizer": {"learning_rate": 1e-4, "eps": 1e-6}})
    write("method.yaml", {"optimizer": {"learning_rate": 1e-5}, "phases": small["phases"][1:]})
    config = load_config(write("run.yaml", {"inherits": ["size.yaml", "method.yaml"], "name": "both"}))
    assert (config.name, config.optimizer.learning_rate, config.optimizer.eps) == ("both", 1e-5, 1e-6)
    assert [phase.name for phase in config.phases] == ["grpo"]
    reversed_order = load_config(write("other.yaml", {"inherits": ["method.yaml", "size.yaml"]}))
    assert reversed_order.optimizer.learning_rate == 1e-4 and len(reversed_order.phases) == 2


def test_of_several_files_the_later_wins_and_messages_name_the_right_one(small, write) -> None:
    unnamed = {key: value for key, value in small.items() if key != "name"}
    size = write("size.yaml", unnamed | {"optimizer": {"learning_rate": 1e-4, "eps": 1e-6}})
    method = write("method.yaml", {"optimizer": {"learning_rate": 1e-5}, "phases": small["phases"][1:]})
    config = load_config([size, method], ["optimizer.eps=1e-7"])
    assert (config.name, config.optimizer.learning_rate, config.optimizer.eps) == ("size_method", 1e-5, 1e-7)
    assert load_config([size, method], ["name=mine"]).name == "mine"
    wrong = write("wrong.yaml", "seed: -1\nrollout:\n  temprature: 1\n")
    with pytest.raises(UserError) as problem:
        load_config([size, wrong])
    lines = str(problem.value).splitlines()
    assert lines[0] == f"{size}, {wrong}: 2 problems in the configuration"
    assert any(f"temprature: unknown key; did you mean temperature? ({wrong}:3)" in line for line in lines)
    long = write("a" * 150 + ".yaml", {})
    with pytest.raises(UserError, match=r"name: .*\(made of the files' names\)"):
        load_config([size, long, long])


def test_a_parent_that_several_files_share_does_not_undo_the_earlier_ones(small, write) -> None:
    small["rollout"]["temperature"] = 1.0
    base = write("base.yaml", small | {"optimizer": {"learning_rate": 1e-6}})
    size = write("size.yaml", "inherits: base.yaml\noptimizer: {learning_rate: 1.0e-4}\n")
    rate = write("rate.yaml", "optimizer: {learning_rate: 1.0e-4}\n")
    method = write("method.yaml", "inherits: base.yaml\nrollout: {temperature: 0.5}\n")
    both = write("both.yaml", "inherits: [size.yaml, method.yaml]\n")
    for files in ([size, method], [both], [size, both], [base, rate, method]):
        config = load_config(files)
        assert (config.optimizer.learning_rate, config.rollout.temperature) == (1e-4, 0.5), files


def test_items_of_an_inherited_list_change_by_position(small, write) -> None:
    write("base.yaml", small)
    run = write("run.yaml", "inherits: base.yaml\nphases:\n  0:\n    until_step: 4\n    coefficient: 0.5\n")
    config = load_config(run)
    assert (config.phases[0].until_step, config.phases[0].coefficient, config.phases[0].name) == (4, 0.5, "warm-up")
    assert config.phases[1] == load_config(write("same.yaml", "inherits: base.yaml")).phases[1]
    with pytest.raises(UserError, match=re.escape(f"coefficient: expected greater than 0, got -1 ({run}:5)")):
        load_config(write("run.yaml", run.read_text().replace("0.5", "-1")))
    for key in ("2", "name"):
        with pytest.raises(UserError, match=rf"other\.yaml: index '?{key}'? is out of range for the inherited list"):
            load_config(write("other.yaml", f"inherits: base.yaml\nphases: {{{key}: {{until_step: 4}}}}"))


def test_a_choice_with_another_name_does_not_inherit_options(small, write) -> None:
    phase = small["phases"][1] | {"loss": {"name": "dual_clip", "clip_low": 0.1, "clip_high": 0.28}}
    write("base.yaml", small | {"phases": [{**phase, "space": {"name": "pre_train", "bos": "none"}}]})

    def phase_with(changes: str) -> PhaseConfig:
        return load_config(write("run.yaml", f"inherits: base.yaml\nphases: {{0: {{{changes}}}}}")).phases[0]

    changed = phase_with("name: mine, loss: {name: gspo, clip_low: 0.001}, space: {name: post_train}")
    assert (changed.loss.clip_low, changed.loss.clip_high) == (0.001, 4e-4)
    assert changed.space.name == "post_train" and changed.advantage == phase_with("name: grpo").advantage
    same = phase_with("loss: {name: dual_clip, clip_low: 0.2}").loss
    assert (same.clip_low, same.clip_high) == (0.2, 0.28)


def test_overrides_come_last_in_order_and_are_typed(small, write) -> None:
    config = load_config(
        write("run.yaml", small),
        [
            "rollout.temperature=0.7",
            "optimizer.learning_rate=1e-5",  # a section that the file does not have
            "phases.0.until_step=3",
            "phases.1.space={name: pre_train, bos: none}",
            "optimizer.betas=[0.5, 0.6]",
            "data.system_prompt=",
            "engine.extra_arguments.attention_backend=torch_native",
            "rollout.temperature=0.8",
            "data.answer_pattern='#### (.+)$'",
            "data.problem_template={{ prompt[0].content }}",
        ],
    )
    assert config.rollout.temperature == 0.8
    assert config.optimizer.learning_rate == 1e-5
    assert config.phases[0].until_step == 3
    assert config.phases[1].space.bos == "none"
    assert config.optimizer.betas == (0.5, 0.6)
    assert config.data.system_prompt is None
    assert config.engine.extra_arguments == {"attention_backend": "torch_native"}
    assert config.data.answer_pattern == "#### (.+)$"
    assert config.data.problem_template == "{{ prompt[0].content }}"


def test_dumped_config_loads_again_to_an_equal_one(small, write, tmp_path) -> None:
    config = load_config(
        write("run.yaml", small),
        ["optimizer.eps=1e-15", "engine.extra_arguments={a: '1e-5', b: 1e-5, c: 1, d: true, e: '2024-01-31'}"],
    )
    dump_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.temprature=0.7", "rollout.temprature: unknown key; did you mean temperature? (override `rollout.tem"),
        ("temperature=0.7", "temperature: unknown key; did you mean rollout.temperature?"),
        ("rollout.learning_rate=1", "rollout.learning_rate: unknown key; valid names are prompts_per_step, "),
        ("phases.1.space.bos=none", "phases.1.space.bos: unknown key; valid names are name (override"),
        ("phases.0.space.name=pretrain", "phases.0.space.name: unknown name, got 'pretrain'; did you mean pre_tr"),
        ("phases.0.advantage={}", "phases.0.advantage: needs a `name` that says which kind it is, got {}"),
        ("phases.0.filter=negativ", "phases.0.filter: unknown name, got 'negativ'; did you mean negative?; valid na"),
        ("phases.0.space=3", "phases.0.space: needs a `name` that says which kind it is, got 3"),
        ("rollout.prompts_per_step='8'", "rollout.prompts_per_step: expected an integer, got '8'"),
        ("rollout.prompts_per_step=8.0", "rollout.prompts_per_step: expected an integer, got 8.0"),
        ("rollout.prompts_per_step=true", "rollout.prompts_per_step: expected an integer, got True"),
        ("rollout.top_p=1.5", "rollout.top_p: expected less than or equal to 1, got 1.5"),
        ("optimizer.learning_rate=.inf", "optimizer.learning_rate: expected a finite number, got inf"),
        ("observability.tensorboard=1", "observability.tensorboard: expected true or false, got 1"),
        ("model=null", "model: expected a section (`key: value` lines), got None"),
        ("parallel=3", "parallel: expected a section (`key: value` lines), got 3"),
        ("engine.extra_arguments.a=[1]", "engine.extra_arguments.a: expected a string or an integer or a number or "),
        ("data={}", "data.source: missing; it has no default (override `data={}`)"),
        ("phases=[]", "phases: is empty, got "),
        ("name=.", "name: expected the name of one folder: at most 200 bytes, without `/`, and not only dots"),
        ("name=..", "name: expected the name of one folder"),
        ("name=../x", "name: expected the name of one folder"),
        ("name=/elsewhere", "name: expected the name of one folder"),
        ("name=' '", "name: expected the name of one folder"),
        ("name=" + 300 * "x", "name: expected the name of one folder"),
        ("seed=10000000000000000000000", "seed: expected less than 2147483648, got 10000000000000000000000"),
        ("engine.urls=['http://user:secret@host:1']", "engine.urls.0: expected http://host:port without a user name"),
        ("reference.url=http://host:1/v1", "reference.url: expected http://host:port, without a path"),
    ],
)
def test_a_wrong_value_names_field_value_and_place(small, write, override, message) -> None:
    path = write("run.yaml", small)
    with pytest.raises(UserError, match=re.escape(message)) as raised:
        load_config(path, [override])
    assert str(raised.value).startswith(f"{path}: 1 problem in the configuration\n")
    assert f"(override `{override}`)" in str(raised.value)


def test_all_problems_are_listed_with_the_file_and_line_that_set_them(small, write) -> None:
    base = write("base.yaml", {"name": "x", "steps": 0, **{key: small[key] for key in ("model", "data", "phases")}})
    run = write("run.yaml", "inherits: base.yaml\nseed: -1\nrollout:\n  temprature: 1\n")
    with pytest.raises(UserError) as raised:
        load_config(run)
    problems = str(raised.value).splitlines()
    assert problems[0] == f"{run}: 3 problems in the configuration"
    assert sorted(problems[1:]) == [
        f"  rollout.temprature: unknown key; did you mean temperature? ({run}:4)",
        f"  seed: expected greater than or equal to 0, got -1 ({run}:2)",
        f"  steps: expected greater than or equal to 1, got 0 ({base}:2)",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.temperature", "expected key.path=value"),
        ("=3", "expected key.path=value"),
        ("rollout..temperature=3", "expected key.path=value"),
        ("phases.2.name=x", "phases is a list of 2, so `2` must be a position from 0 to 1"),
        ("phases.last.name=x", "phases is a list of 2, so `last` must be a position from 0 to 1"),
        ("steps.x=1", "steps is the single value 6, it has no `x`"),
        ("seed=[1", "override `seed=[1`: not valid YAML"),
        ("name=@x", "; put a text with such characters in quotes: name='...'"),
        ("name=#x", "`#` begins a comment in YAML; put a text with such characters in quotes"),
        ("name=a #### (.+)$", "`#` begins a comment in YAML"),
        ("inherits=a.yaml", "inherits: unknown key"),
    ],
)
def test_malformed_overrides(small, write, override, message) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        load_config(write("run.yaml", small), [override])


def test_a_folder_may_begin_with_the_users_home(small, write, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    settings = ["output_dir=~/runs", "rollout.replay_from=~/recorded", "data.pass_rates_from=~/rates"]
    config = load_config(write("run.yaml", small), settings)
    assert config.output_dir == "/home/someone/runs"
    assert config.rollout.replay_from == "/home/someone/recorded"
    assert config.data.pass_rates_from == "/home/someone/rates"


def test_missing_and_unreadable_files(write, tmp_path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such configuration file$"):
        load_config(tmp_path / "nowhere.yaml")
    child = write("child.yaml", "inherits: nowhere.yaml")
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such configuration file \(named by `inherits` in .*child"):
        load_config(child)
    with pytest.raises(UserError, match="cannot read this configuration file: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(UserError, match="latin.yaml: cannot read this configuration file: it is not text in UTF-8"):
        load_config(tmp_path / "latin.yaml")
    with pytest.raises(UserError, match="found a list"):
        load_config(write("list.yaml", "- 1"))
    with pytest.raises(UserError, match=r"list\.yaml: inherits: expected the path of a YAML file or a list of them"):
        load_config(write("list.yaml", "inherits: [1]"))
    with pytest.raises(UserError, match="a key must be a string"):
        load_config(write("key.yaml", "1: a"))
    with pytest.raises(UserError, match=r"name: missing(.|\n)*phases: missing"):
        load_config(write("empty.yaml", ""))


def test_a_file_may_be_named_through_a_link(small, write, tmp_path) -> None:
    write("base.yaml", small)
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link.yaml"
    link.symlink_to(write("child.yaml", "inherits: base.yaml\nseed: 7"))
    assert load_config(link).seed == 7


def test_a_circle_of_parents_is_refused(write) -> None:
    write("a.yaml", "inherits: b.yaml")
    with pytest.raises(UserError, match=r"`inherits` is circular: .*b\.yaml -> .*a\.yaml -> .*b\.yaml"):
        load_config(write("b.yaml", "inherits: a.yaml"))
    with pytest.raises(UserError, match="is circular"):
        load_config(write("self.yaml", "inherits: self.yaml"))
