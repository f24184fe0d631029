"""A config fits its class to the letter or says what is wrong; a table written as TOML reads back the same."""

from __future__ import annotations

import math
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenizers_vis.config import ConfigError, build, coerce, did_you_mean, override, read_toml, to_toml
from tokenizers_vis.quantizers.base import Quantizer
from tokenizers_vis.quantizers.fsq import FSQ


@dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    kind: Literal["a", "b"] = "a"

    def __post_init__(self) -> None:
        if self.rate < 0:
            raise ValueError(f"rate is 0 or more, got {self.rate}")


@dataclass(frozen=True)
class Outer:
    name: str
    steps: int = 3
    flag: bool = False
    pair: tuple[int, float] = (1, 2.0)
    words: tuple[str, ...] = ()
    table: Mapping[str, int] = field(default_factory=dict)
    maybe: int | None = 7
    either: int | str = 0
    path: Path = Path()
    inner: Inner = Inner()


class Shape(ABC):
    @classmethod
    def kinds(cls) -> Mapping[str, type[Shape]]:
        return {"square": Square, "circle": Circle}

    @abstractmethod
    def area(self) -> float: ...


class Square(Shape):
    def __init__(self, *, side: float, inner: Inner = Inner()) -> None:  # noqa: B008 (frozen)
        self.side, self.inner = side, inner

    def area(self) -> float:
        return self.side**2


class Circle(Shape):
    def area(self) -> float:
        return math.pi


@dataclass(frozen=True)
class Drawing:
    shape: Shape


# -- build


def test_a_table_becomes_the_object_with_its_defaults():
    made = build(Outer, {"name": "x", "inner": {"rate": 1, "kind": "b"}, "pair": [4, 5], "path": "a/b", "words": ["u"]})
    assert made == Outer("x", inner=Inner(1.0, "b"), pair=(4, 5.0), path=Path("a/b"), words=("u",))
    assert [type(v) for v in (made.inner.rate, *made.pair)] == [float, int, float]
    assert build(Outer, {"name": "x"}) == Outer("x")
    assert build(Outer, {"name": "x", "maybe": None, "either": "w"}) == Outer("x", maybe=None, either="w")
    assert build(Outer, {"name": "x", "inner": Inner(2.0)}).inner == Inner(2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stebs": 3}, r"stebs.*no option 'stebs'. Did you mean 'steps'\? It takes: name, steps"),
        ({"zzzz": 3}, r"no option 'zzzz'\. It takes"),
        ({5: 3}, "no option 5"),
        ({"inner": {"rat": 3}}, r"inner\.rat: Inner has no option 'rat'. Did you mean 'rate'"),
        ({"steps": 3.0}, r"steps is a whole number, got 3\.0 \(float\)"),
        ({"steps": True}, r"steps is a whole number, got True \(bool\)"),
        ({"steps": "3"}, "steps is a whole number"),
        ({"steps": None}, "steps is a whole number"),
        ({"flag": 1}, "flag is true or false, got 1"),
        ({"name": 1}, "name is a text"),
        ({"path": 1}, "path is a path"),
        ({"inner": {"rate": True}}, r"inner\.rate is a number, got True"),
        ({"inner": {"rate": "1"}}, r"inner\.rate is a number"),
        ({"inner": {"kind": "c"}}, r"inner\.kind is one of 'a', 'b'; got 'c'"),
        ({"inner": {"kind": ["a"]}}, r"inner\.kind is one of"),
        ({"inner": {"rate": -1.0}}, r"inner: rate is 0 or more, got -1\.0"),
        ({"inner": 3}, "inner is a table of options, got 3"),
        ({"pair": [1]}, "pair is a list of 2, got 1"),
        ({"pair": [1.5, 2.0]}, r"pair\[0\] is a whole number"),
        ({"pair": 1}, "pair is a list, got 1"),
        ({"words": "abc"}, "words is a list, got 'abc'"),
        ({"words": ["a", 1]}, r"words\[1\] is a text"),
        ({"table": {"x": "y"}}, r"table\.x is a whole number"),
        ({"table": [1]}, "table is a table"),
        ({"maybe": "x"}, "maybe is a whole number"),
        ({"either": 1.5}, "either is a text"),
    ],
    ids=str,
)
def test_a_wrong_table_is_named_with_what_is_allowed(change, message):
    with pytest.raises(ConfigError, match=message):
        build(Outer, {"name": "x", **change})


def test_missing_options_and_tables_that_are_none():
    with pytest.raises(ConfigError, match="Outer needs name"):
        build(Outer, {})
    with pytest.raises(ConfigError, match=r"shape: Square needs side"):
        build(Drawing, {"shape": {"kind": "square"}})
    with pytest.raises(ConfigError, match="Outer is a table of options, got 'x'"):
        build(Outer, "x")


def test_a_literal_does_not_take_a_number_for_a_truth():
    assert coerce(1, Literal[1, 2], "x") == 1
    for wrong in (True, 1.0):
        with pytest.raises(ConfigError, match="x is one of 1, 2"):
            coerce(wrong, Literal[1, 2], "x")


def test_kinds_choose_the_class():
    drawing = build(Drawing, {"shape": {"kind": "square", "side": 2, "inner": {"rate": 0}}})
    assert drawing.shape.area() == 4 and drawing.shape.inner == Inner(0.0)
    assert isinstance(build(Shape, {"kind": "circle"}), Circle)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("sqare", r"shape\.kind: there is no shape 'sqare'. Did you mean 'square'\? There are: square, circle"),
        (["square"], "there is no shape"),
        (3, "there is no shape 3"),
        ("tokenizers_vis.nowhere:X", "cannot import 'tokenizers_vis.nowhere:X'"),
        ("tokenizers_vis.config:Nothing", "cannot import"),
        (":X", "cannot import"),
        (".config:X", "cannot import"),
        ("tokenizers_vis.quantizers.fsq:FSQ", "is not a Shape"),
        ("tokenizers_vis.config:build", "is not a Shape"),
    ],
    ids=str,
)
def test_a_wrong_kind(kind, message):
    with pytest.raises(ConfigError, match=message):
        build(Drawing, {"shape": {"kind": kind}})


def test_no_kind_and_an_abstract_one():
    with pytest.raises(ConfigError, match="shape needs a kind: square, circle"):
        build(Drawing, {"shape": {"side": 2}})
    with pytest.raises(ConfigError, match="not a Quantizer that can be built"):
        build(Quantizer, {"kind": "tokenizers_vis.quantizers.base:Quantizer"})


def test_a_class_from_another_module_is_found_by_its_path():
    made = build(Quantizer, {"kind": "tokenizers_vis.quantizers.fsq:FSQ", "levels": [4, 4]})
    assert isinstance(made, FSQ) and made.codebook_sizes == (16,)


def test_did_you_mean():
    assert did_you_mean("flextoc", ["titok", "flextok"]) == " Did you mean 'flextok'?"
    assert did_you_mean("qqq", ["titok"]) == did_you_mean("x", []) == ""


# -- override


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=1", 1),
        ("a=1.5", 1.5),
        ("a=1e-3", 1e-3),
        ("a=true", True),
        ("a=True", "True"),
        ("a=[1, 2]", [1, 2]),
        ('a="1"', "1"),
        ("a=word", "word"),
        ("a = word", "word"),
        ("a=a path/with=signs", "a path/with=signs"),
        ("a=train-{0..2}.tar", "train-{0..2}.tar"),
        ("a=", ""),
        ("a={ b = 1 }", {"b": 1}),
        ("a=1\nb=2", "1\nb=2"),
    ],
)
def test_the_value_of_an_override_is_toml_or_a_bare_word(text, value):
    result = override({"a": 0, "z": 9}, [text])
    assert result == {"a": value, "z": 9} and type(result["a"]) is type(value)


def test_overrides_reach_into_tables_and_leave_the_original_alone():
    table = {"a": {"b": {"c": 1}, "d": 2}}
    assert override(table, ["a.b.c=5", "a.b.e=6", "new.x.y=7", "a.b.c=8"]) == {
        "a": {"b": {"c": 8, "e": 6}, "d": 2},
        "new": {"x": {"y": 7}},
    }
    assert table == {"a": {"b": {"c": 1}, "d": 2}}


def test_overrides_reach_into_lists_of_tables():
    table = {"align": [{"weight": 1.0, "net": {"name": "a"}}, {"weight": 2.0}], "betas": [0.9, 0.95]}
    assert override(table, ["align.0.net.name=b", "align.1.weight=3", "betas.1=0.99", "align.1.at=codes"]) == {
        "align": [{"weight": 1.0, "net": {"name": "b"}}, {"weight": 3, "at": "codes"}],
        "betas": [0.9, 0.99],
    }
    assert table["align"][0]["net"] == {"name": "a"} and table["betas"] == [0.9, 0.95]
    for text in ("align.2.weight=1", "align.first.weight=1", "betas.2=1", "align.-1.weight=1"):
        with pytest.raises(ConfigError, match="is no place of the list before it, which has 2, counted from 0"):
            override(table, [text])


@pytest.mark.parametrize("text", ["a", "", "=1", " =1"])
def test_an_override_without_key_or_value_is_refused(text):
    with pytest.raises(ConfigError, match="an override reads key.sub=value"):
        override({}, [text])


def test_an_override_does_not_go_through_a_value():
    with pytest.raises(ConfigError, match="'b' is a value, not a table"):
        override({"a": {"b": 1}}, ["a.b.c=1"])


# -- TOML

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
KEYS = st.sampled_from(["a", "a b", "x.y", "", '"', "é", "\n", "=", "#", "[k]", "a-b_1"]) | TEXTS
SCALARS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXTS
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=12
)


def typed(value: Any) -> Any:
    """The value with the type of each scalar beside it: 1, 1.0 and True are not the same in a config."""
    if isinstance(value, dict):
        return {key: typed(v) for key, v in value.items()}
    return [typed(v) for v in value] if isinstance(value, list) else (type(value), value)


@settings(max_examples=150)
@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_a_table_survives_toml(table):
    assert typed(tomllib.loads(to_toml(table))) == typed(table)


def test_every_character_survives_toml():
    every = "".join(map(chr, range(0x300))) + "\u2028\ufeff\U0001f431 \"\"\" ''' \\u0041 \r\n"
    table = {"t": {every: {"x": every, "in": [{every: [every]}]}}}
    assert tomllib.loads(to_toml(table)) == table


def test_inf_and_nan_survive_toml_and_none_is_left_out():
    text = to_toml({"a": math.inf, "b": -math.inf, "c": math.nan, "d": None, "e": {"f": None}, "g": [{"h": None}]})
    back = tomllib.loads(text)
    assert math.isnan(back.pop("c"))
    assert back == {"a": math.inf, "b": -math.inf, "e": {}, "g": [{}]}


def test_paths_and_tuples_are_written_as_texts_and_lists():
    assert tomllib.loads(to_toml({"p": Path("a/b"), "t": (1, (2.0, "x"))})) == {"p": "a/b", "t": [1, [2.0, "x"]]}


def test_read_toml_names_the_file(tmp_path):
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text(to_toml({"a": {"b": "ü"}}), encoding="utf-8")
    assert read_toml(good) == read_toml(str(good)) == {"a": {"b": "ü"}}
    for content in (b"a = 1\nb = = 2\n", b"a = '\xff'"):
        bad.write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad\.toml is not valid TOML"):
            read_toml(bad)
    with pytest.raises(ConfigError, match=r"there is no file .*none\.toml"):
        read_toml(tmp_path / "none.toml")
