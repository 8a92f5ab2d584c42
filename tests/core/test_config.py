from typing import Self

import pytest
from pydantic import model_validator

from dougong.core.config import Config, from_yaml, override, parse, to_yaml
from dougong.core.errors import ConfigError


class Inner(Config):
    steps: int = 10


class Outer(Config):
    name: str = "run"
    train: Inner = Inner()


class Twice(Config):
    low: int = 0
    high: int = 1

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low > self.high:
            raise ValueError("low is above high. Give them in order.")
        return self


def test_an_unknown_setting_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"the recipe has no setting 'train.step'. Did you mean 'steps'\?"):
        parse(Outer, {"train": {"step": 3}}, where="the recipe")


def test_a_wrong_value_is_named_and_quoted() -> None:
    with pytest.raises(ConfigError, match=r"the recipe: train.steps: .*integer.*\(given 'many'\)"):
        parse(Outer, {"train": {"steps": "many"}}, where="the recipe")


def test_what_no_one_setting_is_to_blame_for_is_said_once() -> None:
    with pytest.raises(ConfigError) as refused:
        parse(Twice, {"low": 2}, where="the recipe")

    assert str(refused.value) == "the recipe: low is above high. Give them in order."


def test_settings_survive_yaml() -> None:
    config = Outer(name="斗拱", train=Inner(steps=7))
    assert parse(Outer, from_yaml(to_yaml(config), where="run.yaml"), where="run.yaml") == config


def test_an_override_changes_one_value_and_not_its_source() -> None:
    values = {"name": "run", "train": {"steps": 1}}
    assert override(values, ["train.steps=200"]) == {"name": "run", "train": {"steps": 200}}
    assert values == {"name": "run", "train": {"steps": 1}}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.steps", "has no 'key=value'"),
        ("name.first=1", "'name' is a value, not a group"),
        ("name=[", "is not YAML"),
    ],
)
def test_a_broken_override_says_what_would_work(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override({"name": "run"}, [setting])


@pytest.mark.parametrize(("text", "message"), [("a: [", "not YAML at line 1"), ("- 1", "holds list")])
def test_a_file_that_holds_no_settings_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_yaml(text, where="run.yaml")
