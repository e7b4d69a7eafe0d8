"""Fields: a config is the same after JSON, and two differ in the fields that are named."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax import fields
from rlhf_jax.errors import UserError
from tests.toy import Alone, Config, Data, Inner, Loss, Train


@pytest.mark.parametrize("path", ["steps", "data", "train.step"])
def test_a_change_of_what_is_no_leaf_is_refused(path):
    with pytest.raises(UserError, match=f"there is no field {path} to change; the nearest is"):
        fields.replace(Config(), {path: 1})
    with pytest.raises(UserError, match=f"there is no field config.{path} to change"):
        fields.replace(Config(), {f"config.{path}": 1}, "config")
    assert fields.replace(Config(), {"elsewhere.x": 1}, "config") == Config()


finite = st.floats(allow_nan=False)
words = st.text()
configs = st.builds(
    Config,
    seed=st.integers(),
    data=st.builds(
        Data,
        path=st.lists(words).map(tuple),
        shares=st.lists(finite).map(tuple),
        too_long=st.sampled_from(["cut_prompt", "refuse", "stop"]),
        length=st.none() | st.integers(),
        shuffle=st.booleans(),
        pack=st.none() | st.booleans(),
        inner=st.builds(Inner, depth=st.integers()),
    ),
    loss=st.builds(
        Loss,
        name=words,
        beta=st.none() | finite,
        label_smoothing=st.none() | finite,
        form=st.none() | st.sampled_from(["a", "b"]),
    ),
    train=st.builds(Train, rate=finite),
)


@settings(deadline=None)
@given(configs)
def test_a_config_survives_json(config):
    saved = json.loads(json.dumps(fields.to_dict(config)))
    again = fields.from_dict(Config, saved)
    assert again == config and fields.diff(config, again) == []
    assert fields.to_dict(again) == saved


@settings(deadline=None)
@given(configs, configs)
def test_diff_is_empty_only_for_equals(a, b):
    assert (fields.diff(a, b) == []) == (a == b)
    assert len(fields.diff(a, b)) == len(fields.diff(b, a))


def test_diff_names_the_field_and_both_values():
    changed = Config(seed=1, data=Data(path=("a", "b"), length=None))
    lines = ["seed: 0 -> 1", "data.path:  -> a,b", "data.length: 256 -> none"]
    assert fields.diff(Config(), changed) == lines


def test_from_dict_refuses_what_it_does_not_know_and_keeps_the_defaults_of_what_is_absent():
    assert fields.from_dict(Config, {"train": {"steps": 3}}) == Config(train=Train(steps=3))
    for values, message in (
        ({"train": {"step": 3}}, "there is no field train.step; the nearest is train.steps."),
        ({"train": 3}, "train is 3, but it is a section with fields."),
        ({"train": {"steps": True}}, "train.steps is True, but it takes an int."),
        ({"train": {"steps": "3"}}, "train.steps is '3', but it takes an int."),
        (
            {"data": {"path": "a,b"}},
            "data.path is 'a,b', but it takes values with commas between, each a string.",
        ),
        ({"data": {"too_long": "x"}}, "data.too_long is 'x', but it takes one of cut_prompt, refuse, stop."),
    ):
        with pytest.raises(UserError) as caught:
            fields.from_dict(Config, values, "config.json: ")
        assert str(caught.value) == f"config.json: {message}"
    with pytest.raises(UserError, match="the field out is missing"):
        fields.from_dict(Alone, {})
