"""The data config and the table of formats agree."""

import pathlib
import typing

from rlhf_jax.data import config, formats


def test_the_config_allows_exactly_the_formats_there_are():
    assert set(typing.get_args(config.FormatName)) == {"auto", *formats.FORMATS}


def test_the_guide_lists_every_format():
    guide = (pathlib.Path(__file__).resolve().parents[1] / "docs/data.md").read_text()
    assert not [name for name in formats.FORMATS if f"`{name}`" not in guide]


def test_every_leaf_says_what_it_means():
    for name, hint in typing.get_type_hints(config.Data, include_extras=True).items():
        assert typing.get_origin(hint) is typing.Annotated, name
        assert all(isinstance(text, str) for text in hint.__metadata__)
