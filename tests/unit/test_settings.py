"""The settings tree: documented, bounded, parsed once, with sentences for what is wrong."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from carillon.errors import SettingsError
from carillon.settings import Settings, load_settings

SECTIONS = [(f.name, f.default_factory) for f in dataclasses.fields(Settings)]
FIELDS = [(name, f) for name, make in SECTIONS for f in dataclasses.fields(make)]  # type: ignore[arg-type]


@pytest.mark.parametrize(("section", "field"), FIELDS, ids=lambda v: v if isinstance(v, str) else v.name)
def test_every_field_has_a_doc_a_default_and_a_unit(section: str, field: Any) -> None:
    """A sentence each; a duration in seconds says so and is named so; the default keeps its own bounds."""
    doc = field.metadata["doc"]
    assert doc[0].isupper() or doc[0] in "/:r"
    assert doc.endswith("."), doc
    if field.name.endswith("_s"):
        assert field.metadata["unit"] == "s" or field.name.endswith("per_s"), field.name
    if field.metadata["unit"] == "s":
        assert field.name.endswith("_s")
    assert field.default is not dataclasses.MISSING
    if isinstance(field.default, int | float) and not isinstance(field.default, bool):
        low, high = field.metadata["low"], field.metadata["high"]
        assert low is not None, f"{section}.{field.name} has no least value"
        assert low <= field.default
        assert high is None or field.default <= high


def test_no_environment_gives_the_defaults() -> None:
    """Nothing set: the tree as declared; variables of others are not looked at."""
    assert load_settings({"HOME": "/root", "CARILLON": "x"}) == Settings()


def test_variables_are_typed() -> None:
    """Whole numbers, numbers, truth values and text come out as what the field says."""
    settings = load_settings(
        {
            "CARILLON_GATEWAY_PORT": "0",
            "CARILLON_SHARD_GRACE_S": "2.5",
            "CARILLON_INGRESS_DEMO": "yes",
            "CARILLON_CLUSTER_NAMESPACE": "x",
        }
    )
    assert settings.gateway.port == 0
    assert settings.shard.grace_s == 2.5
    assert settings.ingress.demo is True
    assert settings.cluster.namespace == "x"


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (
            {"CARILLON_GATEWAY_PORT": "http"},
            "expected CARILLON_GATEWAY_PORT to be a whole number, got 'http'",
        ),
        ({"CARILLON_SHARD_GRACE_S": "long"}, "expected CARILLON_SHARD_GRACE_S to be a number, got 'long'"),
        (
            {"CARILLON_INGRESS_DEMO": "maybe"},
            "expected CARILLON_INGRESS_DEMO to be true or false, got 'maybe'",
        ),
        ({"CARILLON_GATEWAY_PORT": "70000"}, "expected gateway.port to be at most 65535, got 70000"),
        ({"CARILLON_SHARD_GRACE_S": "-1"}, "expected shard.grace_s to be at least 0.0 s, got -1.0"),
        ({"CARILLON_SHARD_GRACE_S": "nan"}, "expected CARILLON_SHARD_GRACE_S to be a number, got 'nan'"),
        ({"CARILLON_GATEWAY_PROT": "1"}, "unknown setting CARILLON_GATEWAY_PROT"),
        ({"CARILLON_CLUSTER_LEASE_TIMEOUT_S": "1.5"}, "at least twice cluster.lease_renew_s"),
        ({"CARILLON_LINK_RECONNECT_MIN_S": "9"}, "expected link.reconnect_max_s to be at least"),
        ({"CARILLON_PUSH_MIN_SENDERS": "9"}, "expected push.max_senders to be at least"),
    ],
)
def test_what_is_wrong_is_told_in_a_sentence(variables: dict[str, str], sentence: str) -> None:
    """The sentence names the setting, what was expected and what was found."""
    with pytest.raises(SettingsError, match=re.escape(sentence)):
        load_settings(variables)


def test_a_file_sets_and_the_environment_wins(tmp_path: Path) -> None:
    """CARILLON_CONFIG names a TOML file; a variable beats it."""
    path = tmp_path / "carillon.toml"
    path.write_text("[gateway]\nport = 9001\nheartbeat_s = 10\n[ingress]\ndemo = true\n")
    settings = load_settings({"CARILLON_CONFIG": str(path), "CARILLON_GATEWAY_PORT": "9002"})
    assert settings.gateway.port == 9002
    assert settings.gateway.heartbeat_s == 10.0
    assert settings.ingress.demo is True


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[gatway]\nport = 1\n", "unknown section [gatway]"),
        ("[gateway]\nprot = 1\n", "unknown setting gateway.prot"),
        ("[gateway]\nport = 'x'\n", "expected gateway.port to be a whole number, got 'x'"),
        ("[gateway]\nport = 80.5\n", "expected gateway.port to be a whole number, got 80.5"),
        ("[gateway]\nport = true\n", "expected gateway.port to be a whole number, got True"),
        ("gateway = 3\n", "expected [gateway] in"),
        ("[gateway\n", "to be TOML"),
    ],
)
def test_a_bad_file_is_told_in_a_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    """So are mistakes in the file."""
    path = tmp_path / "carillon.toml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=re.escape(sentence)):
        load_settings({}, path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    """A CARILLON_CONFIG that cannot be read is an error, not ignored."""
    with pytest.raises(SettingsError, match="cannot read the settings file"):
        load_settings({"CARILLON_CONFIG": str(tmp_path / "none.toml")})


def test_with_values_checks_too() -> None:
    """A changed copy keeps the bounds, and an unknown field is an error."""
    assert Settings().with_values(gateway={"port": 0}).gateway.port == 0
    with pytest.raises(SettingsError, match=r"gateway\.port"):
        Settings().with_values(gateway={"port": -1})
    with pytest.raises(SettingsError, match="unknown setting in section 'gateway'"):
        Settings().with_values(gateway={"prot": 1})
    with pytest.raises(SettingsError, match="unknown setting in section 'gatway'"):
        Settings().with_values(gatway={"port": 1})
