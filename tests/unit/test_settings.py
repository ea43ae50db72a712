"""Settings: the caller wins over the environment, and the environment over the defaults."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from pathlib import Path

import pytest

from tests.unit.doubles import environ
from weightferry.errors import BadRequest
from weightferry.settings import Settings


def test_every_field_has_a_variable() -> None:
    names = [spec.name for spec in fields(Settings) if spec.name not in ("cache_dir", "cache_tiers")]
    # 40 + position gives each setting another value, and a beat_timeout of at least twice the beat_interval.
    variables = {f"WEIGHTFERRY_{name.upper()}": 40 + position for position, name in enumerate(names)}
    variables |= {"WEIGHTFERRY_BEAT_INTERVAL": 2, "WEIGHTFERRY_CACHE_DIR": "/cache"}  # type: ignore[dict-item]
    variables |= {"WEIGHTFERRY_CACHE_TIERS": "/sw/weights,~/mine"}  # type: ignore[dict-item]
    variables |= {"WEIGHTFERRY_OFFLINE_FALLBACK": False}
    read = Settings.from_environ(environ(**variables))
    for name in names:
        assert str(getattr(read, name)).strip("(',)").removesuffix(".0") == str(
            variables[f"WEIGHTFERRY_{name.upper()}"]
        )
        assert isinstance(getattr(read, name), type(getattr(Settings(), name))), name
    assert read.cache_dir == Path("/cache")
    assert read.cache_tiers == (Path("/sw/weights"), Path.home() / "mine")


def test_the_caller_wins_and_none_is_ignored() -> None:
    variables = environ(WEIGHTFERRY_RETRIES=9, WEIGHTFERRY_CACHE_DIR="/cache")
    assert Settings.from_environ(variables, retries=2, cache_dir="/mine").retries == 2
    assert Settings.from_environ(variables, retries=2, cache_dir="/mine").cache_dir == Path("/mine")
    assert Settings.from_environ(variables, retries=None, cache_dir=None) == Settings.from_environ(variables)


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, Path.home() / ".cache/weightferry"),
        ({"XDG_CACHE_HOME": "/xdg"}, Path("/xdg/weightferry")),
        ({"XDG_CACHE_HOME": "/xdg", "WEIGHTFERRY_CACHE_DIR": "~/w"}, Path.home() / "w"),
        ({"WEIGHTFERRY_CACHE_DIR": "w"}, Path.cwd() / "w"),
        ({"XDG_CACHE_HOME": "xdg"}, Path.cwd() / "xdg/weightferry"),
        ({"XDG_CACHE_HOME": "", "WEIGHTFERRY_CACHE_DIR": ""}, Path.home() / ".cache/weightferry"),
    ],
)
def test_the_cache_folder_is_absolute(variables: dict[str, str], folder: Path) -> None:
    assert Settings.from_environ(variables).cache_dir == folder


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("CONNECTIONS", "many"),
        ("CONNECTIONS", "2.5"),
        ("CONNECTIONS", "0"),
        ("RETRIES", "-1"),
        ("READ_TIMEOUT", "30s"),
        ("READ_TIMEOUT", "0"),
        ("READ_TIMEOUT", "nan"),
        ("BEAT_TIMEOUT", "3"),
        ("OFFLINE_FALLBACK", "never"),
        ("OFFLINE_FALLBACK", "2"),
    ],
)
def test_bad_values_name_the_setting(name: str, text: str) -> None:
    with pytest.raises(BadRequest, match=f"(?i){name}") as raised:
        Settings.from_environ({f"WEIGHTFERRY_{name}": text})
    assert text.rstrip("s") in str(raised.value)


@pytest.mark.parametrize(
    ("text", "value"), [("0", False), ("false", False), ("off", False), ("1", True), ("Yes", True)]
)
def test_switches(text: str, value: bool) -> None:
    assert Settings.from_environ({"WEIGHTFERRY_OFFLINE_FALLBACK": text}).offline_fallback is value


def test_settings_are_immutable() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().retries = 3  # type: ignore[misc]
