"""The command line: what it explains and how it refuses."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from carillon.errors import SettingsError
from cluster.cli import _settings, build_parser, main
from cluster.remote import status_lines


def _parsers(
    parser: argparse.ArgumentParser, name: str = ""
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, child in action.choices.items():
                yield from _parsers(child, f"{name} {word}".strip())


PARSERS = dict(_parsers(build_parser()))


def test_commands_are_those_promised() -> None:
    """Every command of the documentation is there."""
    assert set(PARSERS) == {
        "",
        "up",
        "down",
        "status",
        "drain",
        "restart",
        "migrate",
        "partitions",
        "tenant",
        "tenant create",
        "tenant list",
        "tenant rotate-secret",
        "tenant jwks",
        "tenant policy",
        "key",
        "key create",
        "key list",
        "key revoke",
        "broadcast",
        "broadcast list",
        "broadcast show",
        "broadcast watch",
        "broadcast pause",
        "broadcast resume",
        "broadcast cancel",
        "dead-letters",
        "dead-letters list",
        "dead-letters show",
        "dead-letters replay",
        "key rotate",
        "key limit",
        "tenant limit",
        "audit",
        "archive",
        "archive run",
        "archive list",
        "archive search",
        "archive restore",
        "archive verify",
        "archive erase",
        "template",
        "template put",
        "template show",
        "template list",
        "template versions",
        "template delete",
        "template preview",
    }


@pytest.mark.parametrize("name", sorted(PARSERS))
def test_every_option_is_explained(name: str) -> None:
    """No command, argument or option is without a sentence about it."""
    parser = PARSERS[name]
    assert parser.description
    for action in parser._actions:
        if not isinstance(action, argparse._SubParsersAction):
            assert action.help, f"{name}: {action.option_strings or action.dest} has no help"


@pytest.mark.parametrize("name", sorted(PARSERS))
def test_help_ends_well(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--help prints and ends with status 0, whatever signs its texts hold."""
    with pytest.raises(SystemExit) as ended:
        main([*name.split(), "--help"], {})
    assert ended.value.code == 0
    assert "usage: python -m cluster" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", [[], ["fly"], ["up", "--http-port", "70000"], ["up", "--http-port", "x"], ["key", "create"]]
)
def test_wrong_usage_is_status_2(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong command line ends with status 2 and the usage on stderr."""
    with pytest.raises(SystemExit) as ended:
        main(line, {})
    assert ended.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_wrong_setting_is_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    """A setting that breaks its bound is wrong usage, told in one line."""
    assert main(["status"], {"CARILLON_GATEWAY_PORT": "99999"}) == 2
    err = capsys.readouterr().err
    assert err == "carillon: expected gateway.port to be at most 65535, got 99999\n"


@pytest.mark.parametrize("command", [["status"], ["drain", "1a2b"], ["restart"], ["tenant", "list"]])
def test_nothing_running_is_one_sentence(
    command: list[str], tmp_path: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands that need a running system say so in one line, status 1."""
    assert main([*command, "--data-dir", str(tmp_path)], {}) == 1
    err = capsys.readouterr().err
    assert err.startswith("carillon: ")
    assert err.count("\n") == 1
    assert str(tmp_path) in err


def test_down_of_nothing_is_fine(
    tmp_path: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """`down` where nothing runs has nothing to do."""
    assert main(["down", "--data-dir", str(tmp_path)], {}) == 0
    assert "nothing runs" in capsys.readouterr().out


def test_cluster_needs_its_servers(capsys: pytest.CaptureFixture[str]) -> None:
    """`up --address` names every setting that is missing, before it connects anywhere."""
    assert main(["up", "--address", "127.0.0.1:1"], {"CARILLON_REDIS_URL": "redis://x"}) == 1
    err = capsys.readouterr().err
    assert "CARILLON_POSTGRES_DSN, CARILLON_CLUSTER_SECRET" in err
    assert "CARILLON_REDIS_URL" not in err


def test_status_shows_what_matters() -> None:
    """A line per actor with its slots, sessions, sockets and queue; silent and lost ones are told apart."""

    def member(kind: str, name: str, slots: int = 0, joined: bool = True) -> dict[str, object]:
        return {"kind": kind, "name": name, "node": "abcdef0123", "slots": slots, "joined": joined}

    text = status_lines(
        {
            "version": 7,
            "postgres": "ok",
            "nodes": [{"node": "abcdef0123", "host": "10.0.0.1", "head": True}],
            "members": [
                member("gateway", "gateway-a-0"),
                member("pool", "pool-fcm-a"),
                member("pool", "pool-apns-a"),
                member("shard", "shard-a-0", 512),
                member("shard", "shard-a-1", 511, joined=False),
            ],
            "missing": ["router-a"],
            "limited": {'limit="tenant",tenant="acme"': 7.0},
            "ownerless": 1,
        },
        {
            "gateway-a-0": {"connections": 12},
            "pool-fcm-a": {"error": "GetTimeoutError"},
            "pool-apns-a": {
                "queued": 5,
                "apps": [
                    {
                        "app": "com.example/production",
                        "state": "open",
                        "queued": 5,
                        "inFlight": 1,
                        "limit": 10,
                        "usualMs": 41.8,
                        "waitS": 4.6,
                    },
                ],
            },
            "shard-a-0": {"sessions": 9, "appendQueue": 3},
            "shard-a-1": {"sessions": 1, "appendQueue": 0},
        },
    )
    rows = {line.split()[0]: line.split() for line in text}
    assert rows["gateway-a-0"] == ["gateway-a-0", "abcdef01", "ok", "12"]
    assert rows["pool-fcm-a"][2] == "silent"
    app = "  com.example/production: breaker open for 5 s, 1 in flight of 10, 5 waiting, usually 42 ms"
    assert text[text.index(next(line for line in text if line.startswith("pool-apns-a"))) + 1] == app
    assert rows["shard-a-0"] == ["shard-a-0", "abcdef01", "ok", "512", "9", "3"]
    assert rows["shard-a-1"][2] == "lost"
    assert "missing: router-a" in text
    assert "slots without owner: 1" in text
    assert 'refused or held up by rate limits: 7 events (limit="tenant",tenant="acme")' in text
    assert text[-1] == "10 live sessions, 12 sockets"


def test_up_chooses_ports_that_are_0() -> None:
    """By option or variable, for `up` here alone: free ones that differ; a gateway's 0 stays."""

    def ports(line: list[str], environ: dict[str, str]) -> tuple[int, int, int]:
        settings = _settings(build_parser().parse_args(line), environ)
        return settings.ingress.port, settings.ingress.direct_port, settings.gateway.port

    variables = {f"CARILLON_{name}": "0" for name in ("INGRESS_PORT", "INGRESS_DIRECT_PORT")}
    for line, environ in (
        (["up", "--http-port", "0", "--direct-port", "0", "--ws-port", "0"], {}),
        (["up"], variables),
    ):
        chosen = ports(line, environ)
        assert len({*chosen, 0}) == 4
    assert ports(["up", "--ws-port", "9000"], variables)[2] == 9000
    assert ports(["up"], {"CARILLON_GATEWAY_PORT": "0"})[2] == 0
    for line in (["up", "--address", "127.0.0.1:1"], ["status"]):
        with pytest.raises(SettingsError):  # what is deployed elsewhere is not ours to choose
            ports(line, variables)
