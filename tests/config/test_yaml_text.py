"""YAML reading and writing."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_dsrl.common.errors import UserError
from megatron_dsrl.config.yaml_text import format_yaml, parse_yaml

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
# Texts that look like other types are where a round trip breaks.
lookalikes = st.sampled_from(
    ["1e-6", "1.5", ".5", "1_000", "2024-01-31", "null", "true", "", "0x1f", "1:30", "- a", "#"]
)
documents = st.recursive(
    scalars | lookalikes,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | lookalikes, inner, max_size=3),
    max_leaves=8,
)

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(9 * ['*' + before])}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)
"""Nine lists of nine items, each item an alias of the list before: 9**9 values in 400 characters."""


@given(documents)
@example({"\x85": "a\u2028 b"})  # Unicode line breaks
def test_what_is_written_reads_back_equal(document) -> None:
    data, _ = parse_yaml(format_yaml(document), "test")
    assert data == document and repr(data) == repr(document)  # repr tells 1 from 1.0 and True


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2024-01-31", "2024-01-31"),
    ],
)
def test_scalars_that_yaml_1_1_reads_otherwise(text, value) -> None:
    data, _ = parse_yaml(text, "test")
    assert data == value and type(data) is type(value)


def test_every_value_has_its_line() -> None:
    _, lines = parse_yaml("a: 1\nb:\n  c:\n  - x\n  - d: 2\n", "test")
    assert lines[("a",)] == 1
    assert lines[("b", "c", 1, "d")] == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1, 2\nc: 3", r"f\.yaml: not valid YAML: line 3, column \d+: .+"),
        ("a: 1\n\tb: 2", r"f\.yaml: not valid YAML: line 2, column 1: .+"),
        ("a: {b: 1,\n  c: 2,\n  b: 3}", r"f\.yaml, line 3: a\.b: this key appears twice"),
        ("a: !!python/object:os.system x", r"f\.yaml: not valid YAML: line 1, .+"),
        ("a: 1\n---\nb: 2", r"f\.yaml: not valid YAML: line 2, .+"),
        ("a: 1\nb: x\x07y", r"f\.yaml: not valid YAML: line 2: it contains the character U\+0007"),
        ("a: 1\nb: {{ problem }}", r"f\.yaml, line 2: b: a key must be a single value; a template, .* needs quotes"),
        ("a: {{ prompt[0].content }}", r"f\.yaml: not valid YAML: line 1, .*a template, .* needs quotes"),
        ("a: {% if x %}y{% endif %}", r"f\.yaml: not valid YAML: line 1, .*a template, .* needs quotes"),
        ("a: 0x_", r"f\.yaml: not valid YAML: invalid literal for int"),
        ("a: &a [*a]", r"f\.yaml, line 1: .* an alias \(`\*name`\) may contain itself"),
        ("a: " + 100 * "[" + 100 * "]", r"f\.yaml, line 1: .* nested more than 50 levels deep"),
        ("a: " + 100_000 * "[", r"f\.yaml: not valid YAML: .* nested more than 50 levels deep"),
        (BOMB, r"f\.yaml, line 1: more than 100,000 values, with each alias .* counted as often as it is used"),
    ],
)
def test_bad_text_names_the_line(text, message) -> None:
    with pytest.raises(UserError, match=message):
        parse_yaml(text, "f.yaml")


def test_an_alias_is_a_copy() -> None:
    data, _ = parse_yaml("phases: [&first {space: {name: pre_train}, sizes: [1]}, *first]", "f.yaml")
    data["phases"][0]["space"]["name"] = "post_train"
    data["phases"][0]["sizes"].append(2)
    assert data["phases"][1] == {"space": {"name": "pre_train"}, "sizes": [1]}
