"""Messages of browsers are checked, whatever they are."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ttt_video.errors import UserError
from ttt_video.live import COMMANDS, Player, parse_command
from ttt_video.live.commands import LONGEST


@pytest.mark.parametrize(
    ("text", "command"),
    [
        ('{"do": "pause", "value": true}', ("pause", True)),
        ('{"do": "reset"}', ("reset", None)),
        ('{"do": "back", "value": 3}', ("back", 3)),
        ('{"do": "method", "value": "tent"}', ("method", "tent")),
        ('{"do": "step_size", "value": 1}', ("step_size", 1.0)),
        ('{"do": "step_size", "value": 1e-3}', ("step_size", 0.001)),
    ],
)
def test_commands_are_read(text, command):
    assert parse_command(text) == command


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "a message is JSON"),
        ("[]", "a message is JSON"),
        ('{"do": 1}', "a message is JSON"),
        ("[" * 900, "a message is JSON"),
        ('{"do": "pause", "value": true' + " " * LONGEST + "}", "a message is JSON"),
        ('{"do": "paus"}', "did you mean pause"),
        ('{"do": "__init__"}', "no command"),
        ('{"do": "pause"}', "pause takes a value of the kind bool, not null"),
        ('{"do": "pause", "value": 1}', "kind bool, not 1"),
        ('{"do": "back", "value": true}', "kind int, not true"),
        ('{"do": "reset", "value": 1}', "reset takes no value"),
        ('{"do": "step_size", "value": -1}', "at least 0"),
        ('{"do": "step_size", "value": NaN}', "finite"),
        ('{"do": "step_size", "value": 1e999}', "finite"),
        ('{"do": "step_size", "value": 1%s}' % ("0" * 400), "finite"),
    ],
)
def test_everything_else_is_refused_in_one_line(text, match):
    with pytest.raises(UserError, match=match) as error:
        parse_command(text)
    assert "\n" not in str(error.value)


@settings(max_examples=50)
@given(st.one_of(st.text(), st.text().map(json.dumps)))
def test_no_text_is_a_surprise(text):
    with pytest.raises(UserError):
        parse_command(text)


def test_the_player_has_all_of_them():
    assert all(callable(getattr(Player, f"_{name}")) for name in COMMANDS)
