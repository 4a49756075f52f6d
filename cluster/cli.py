"""The command line: `python -m cluster COMMAND`.

Exit status: 0 done, 1 it failed (one sentence on stderr says why), 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from carillon.api_keys import SCOPES
from carillon.errors import CarillonError, SettingsError
from carillon.limits import COLLECT_S, OVERFLOWS
from carillon.settings import Settings, load_settings
from cluster import broadcasts, dead_letters
from cluster.archive_commands import add_commands as add_archive_commands
from cluster.maintenance import KINDS
from cluster.template_commands import add_commands as add_template_commands

Handler = Callable[[argparse.Namespace, Settings], int]


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster",
        description="Start, look at and administer Carillon.",
        epilog="Every setting can be given as CARILLON_<SECTION>_<FIELD> or in the TOML file named by "
        "CARILLON_CONFIG; docs/reference/settings.md lists them.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_up(commands)
    _add_cluster_commands(commands)
    _add_admin_commands(commands)
    for command in (*dead_letters.add_commands(commands), *broadcasts.add_commands(commands)):
        _data_dir(command)
    add_template_commands(commands, _command, _dsn)
    add_archive_commands(commands, _command, _dsn)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, handler: str, text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text[0].lower() + text[1:].split(".")[0], description=text)
    parser.set_defaults(handler=handler)
    return parser


def _data_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data-dir",
        metavar="FOLDER",
        help="data, secrets and state of this machine (default: .carillon, or CARILLON_CLUSTER_RUNTIME_DIR)",
    )


def _dsn(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dsn",
        help="the database (default: CARILLON_POSTGRES_DSN, else that of the system that runs in the "
        "data folder)",
    )
    _data_dir(parser)


def _address(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--address", metavar="HOST:PORT", help=text)


def _add_up(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    up = _command(
        commands,
        "up",
        "up",
        "Start the whole system here and stay until Ctrl-C. Data stays in the data folder between runs.",
    )
    _address(
        up,
        "deploy onto the Ray cluster at this address instead of starting one, then return; needs "
        "CARILLON_POSTGRES_DSN, CARILLON_REDIS_URL and CARILLON_CLUSTER_SECRET",
    )
    _data_dir(up)
    port = "0 takes any free one"
    up.add_argument(
        "--http-port", type=_port, metavar="PORT", help=f"HTTP through Serve (default 8000; {port})"
    )
    up.add_argument(
        "--direct-port", type=_port, metavar="PORT", help=f"HTTP straight to a replica (default 8080; {port})"
    )
    up.add_argument("--ws-port", type=_port, metavar="PORT", help=f"WebSockets (default 8001; {port})")
    up.add_argument(
        "--postgres-port", type=_port, metavar="PORT", help="embedded PostgreSQL (default 0: any free one)"
    )
    up.add_argument(
        "--redis-port", type=_port, metavar="PORT", help="embedded Valkey (default 0: any free one)"
    )
    up.add_argument("--shards", type=int, metavar="N", help="shard actors on each node (default 2)")
    up.add_argument(
        "--no-demo",
        action="store_true",
        help="leave out the local FCM and APNs, the tenant `demo` and its users",
    )
    up.add_argument(
        "--timeout", type=float, default=180.0, metavar="S", help="longest start, in seconds (default 180)"
    )
    up.add_argument("--quiet", action="store_true", help="no progress lines, only the table at the end")


def _add_cluster_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    down = _command(
        commands,
        "down",
        "down",
        "Stop the system that `up` runs in the data folder, or remove it from a cluster.",
    )
    _address(down, "remove Carillon from the Ray cluster at this address")
    _data_dir(down)
    down.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="longest wait, in seconds (default 60)"
    )
    status = _command(
        commands, "status", "status", "Show nodes, actors, slots, live sessions and queue depths."
    )
    _address(status, "of the Ray cluster at this address")
    _data_dir(status)
    status.add_argument("--json", action="store_true", help="everything known, as one JSON document")
    drain = _command(
        commands,
        "drain",
        "drain",
        "Leave a node: its slots move to other nodes, its gateways close their sockets with 4201 spread over "
        "CARILLON_GATEWAY_DRAIN_S, then its actors end. Again, it goes on where it was.",
    )
    drain.add_argument("node", nargs="+", metavar="NODE", help="nodes by the start of their id, see `status`")
    drain.add_argument("--undo", action="store_true", help="use the node again")
    _address(drain, "of the Ray cluster at this address")
    _data_dir(drain)
    drain.add_argument(
        "--timeout", type=float, default=40.0, metavar="S", help="longest wait, in seconds (default 40)"
    )
    restart = _command(
        commands,
        "restart",
        "restart",
        "Replace all actors one by one, each once the cluster is well again: new code without an end of "
        "service. Interrupted, it goes on where it was.",
    )
    restart.add_argument(
        "--actors", nargs="+", metavar="KIND|ACTOR", help=f"only these: {', '.join(KINDS)}, or names"
    )
    restart.add_argument(
        "--anew", action="store_true", help="do not go on with a restart that was interrupted"
    )
    _address(restart, "of the Ray cluster at this address")
    _data_dir(restart)
    restart.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="longest wait for one actor, and for the cluster to be well after it (default 60)",
    )


def _add_admin_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    migrate = _command(commands, "migrate", "migrate", "Apply missing migrations to the database.")
    partitions = _command(
        commands, "partitions", "partitions", "Make the partitions of the coming months that are missing."
    )
    partitions.add_argument(
        "--months", type=int, default=3, metavar="N", help="months to make ahead of this one (default 3)"
    )
    tenant = commands.add_parser("tenant", help="tenants", description="Administer tenants.")
    tenants = tenant.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    create = _command(tenants, "create", "tenant_create", "Create a tenant and print its client secret.")
    create.add_argument("tenant", help="its name: letters, digits, dots, dashes, underscores; at most 64")
    create.add_argument(
        "--client-secret",
        metavar="SECRET",
        help="HS256 key of client tokens, at least 32 bytes (default: made and printed)",
    )
    listing = _command(tenants, "list", "tenant_list", "List tenants.")
    rotate = _command(
        tenants, "rotate-secret", "tenant_rotate_secret", "Give a tenant a new client secret and print it."
    )
    rotate.add_argument("tenant", help="the tenant")
    rotate.add_argument(
        "--overlap-s",
        type=_seconds,
        default=86_400.0,
        metavar="S",
        help="how long the former secret stays valid, in seconds (default 86400: a day)",
    )
    rotate.add_argument(
        "--client-secret", metavar="SECRET", help="the new one, at least 32 bytes (default: made and printed)"
    )
    jwks = _command(
        tenants,
        "jwks",
        "tenant_jwks",
        "Take tokens that the tenant's own identity provider signs (RS256, ES256).",
    )
    jwks.add_argument("tenant", help="the tenant")
    source = jwks.add_mutually_exclusive_group(required=True)
    source.add_argument("--url", help="where the provider publishes its JWK Set (https)")
    source.add_argument("--file", metavar="FILE", help="a JWK Set to keep here instead")
    source.add_argument("--off", action="store_true", help="only the client secret signs again")
    policy = _command(
        tenants,
        "policy",
        "tenant_policy",
        "Show or change what push does while users are connected.",
    )
    policy.add_argument("tenant", help="the tenant")
    policy.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="whenAway, whenAwayDelayS or holdS, or types.TYPE.NAME of one type; empty: as by default again",
    )
    policy.add_argument("--file", metavar="FILE", help="a JSON document that replaces the policy")
    limits = _command(
        tenants,
        "limit",
        "tenant_limit",
        "Show or set how many events per second a tenant may send, all its keys together.",
    )
    limits.add_argument("tenant", help="the tenant")
    _rate_options(limits, required=False)
    limits.add_argument(
        "--overflow",
        choices=OVERFLOWS,
        help="what becomes of events beyond the rate that are not urgent: refused (429), in the feed alone, "
        "or told together (default: as it was; reject)",
    )
    limits.add_argument(
        "--collect",
        type=float,
        metavar="S",
        help=f"with --overflow digest, for how many seconds a user's digest collects (default {COLLECT_S:g})",
    )
    key = commands.add_parser("key", help="API keys", description="Administer API keys.")
    keys = key.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    make = _command(keys, "create", "key_create", "Create an API key and print it: it cannot be seen again.")
    make.add_argument("tenant", help="the tenant it acts for")
    make.add_argument("--name", default="", help="what it is for, shown in lists")
    make.add_argument(
        "--scope",
        action="append",
        choices=list(SCOPES),
        help="what it may do; give it several times for several (default: admin)",
    )
    make.add_argument(
        "--rate",
        type=float,
        metavar="N",
        help="events per second that pass, over all replicas (default: all)",
    )
    make.add_argument(
        "--burst", type=int, metavar="N", help="events that pass at once (default: those of one second)"
    )
    renew = _command(
        keys, "rotate", "key_rotate", "Make a key like another one and print it; the other one ends later."
    )
    renew.add_argument("tenant", help="the tenant")
    renew.add_argument("key_id", help="the id of the key to replace, as listed")
    renew.add_argument(
        "--overlap-s",
        type=_seconds,
        default=86_400.0,
        metavar="S",
        help="how long the key to replace stays valid, in seconds (default 86400: a day)",
    )
    limit = _command(keys, "limit", "key_limit", "Limit how many events per second an API key may send.")
    limit.add_argument("tenant", help="the tenant")
    limit.add_argument("key_id", help="the key's id, as listed")
    _rate_options(limit, required=True)
    audit = _command(commands, "audit", "audit", "Show who did what to tenants and keys, oldest first.")
    audit.add_argument("--tenant", help="of this tenant only")
    audit.add_argument("--limit", type=int, default=50, metavar="N", help="the latest N acts (default 50)")
    key_list = _command(keys, "list", "key_list", "List the API keys of a tenant.")
    key_list.add_argument("tenant", help="the tenant")
    revoke = _command(keys, "revoke", "key_revoke", "Revoke an API key, for good.")
    revoke.add_argument("tenant", help="the tenant")
    revoke.add_argument("key_id", help="the key's id, as listed")
    for parser in (
        migrate,
        partitions,
        create,
        listing,
        rotate,
        jwks,
        policy,
        make,
        key_list,
        revoke,
        renew,
        limit,
        limits,
        audit,
    ):
        _dsn(parser)


def _rate_options(parser: argparse.ArgumentParser, *, required: bool) -> None:
    rate = parser.add_mutually_exclusive_group(required=required)
    rate.add_argument("--rate", type=float, metavar="N", help="events per second, over all replicas")
    rate.add_argument("--off", action="store_true", help="no limit")
    parser.add_argument(
        "--burst", type=int, metavar="N", help="events that pass at once (default: those of one second)"
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 1e9:
        raise argparse.ArgumentTypeError(f"expected seconds, 0 or more, got {text}")
    return seconds


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, got {text}")
    return port


_PORTS: Final = ("CARILLON_INGRESS_PORT", "CARILLON_INGRESS_DIRECT_PORT")
"""Not the gateways': each of them takes a free one, for several may share a machine."""


def _settings(options: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
    """Settings of the environment with what the command line says over them."""
    from cluster.processes import free_port

    given = vars(options)
    here = given.get("command") == "up" and not given.get("address")
    if here:  # ports that stay the same over restarts of whoever listens on them
        environ = {
            name: str(free_port()) if name in _PORTS and value.strip() == "0" else value
            for name, value in environ.items()
        }
    settings = load_settings(environ)
    sections: dict[str, dict[str, object]] = {}

    def put(section: str, field: str, value: object) -> None:
        if value is not None:
            sections.setdefault(section, {})[field] = value

    def chosen(port: int | None) -> int | None:
        return free_port() if port == 0 else port

    put("cluster", "runtime_dir", given.get("data_dir"))
    put("cluster", "shards_per_node", given.get("shards"))
    put("ingress", "port", chosen(given.get("http_port")))
    put("ingress", "direct_port", chosen(given.get("direct_port")))
    put("gateway", "port", chosen(given.get("ws_port")))
    put("postgres", "embedded_port", given.get("postgres_port"))
    put("redis", "embedded_port", given.get("redis_port"))
    if here and "CARILLON_GATEWAY_DRAIN_S" not in environ:
        # There is no other gateway here to spread the reconnecting clients over.
        put("gateway", "drain_s", min(settings.gateway.drain_s, 1.0))
    runtime_dir = Path(str(sections.get("cluster", {}).get("runtime_dir") or settings.cluster.runtime_dir))
    put("cluster", "runtime_dir", str(runtime_dir.resolve()))
    return settings.with_values(**sections)


def main(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = build_parser().parse_args(argv)
    try:
        settings = _settings(options, os.environ if environ is None else environ)
    except SettingsError as exc:
        print(f"carillon: {exc}", file=sys.stderr)
        return 2
    try:
        return _handlers()[options.handler](options, settings)
    except CarillonError as exc:
        print(f"carillon: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1


def _handlers() -> dict[str, Handler]:
    from cluster import admin, archive, remote, templates

    return {
        "up": _up,
        **remote.HANDLERS,
        **admin.HANDLERS,
        **archive.HANDLERS,
        **dead_letters.HANDLERS,
        **broadcasts.HANDLERS,
        **templates.HANDLERS,
    }


def _up(options: argparse.Namespace, settings: Settings) -> int:
    if options.address:
        from cluster.remote import deploy_to

        return deploy_to(options.address, settings, options.timeout)
    from cluster.run_folder import RunFolder
    from cluster.up import UpOptions, run_up

    folder = RunFolder(settings.cluster.runtime_dir)
    up = UpOptions(demo=not options.no_demo, timeout_s=options.timeout, quiet=options.quiet)
    return asyncio.run(run_up(folder, settings, up))
