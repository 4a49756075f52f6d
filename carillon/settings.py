"""One frozen tree of settings: unit, default and effect beside each field.

Environment and file are parsed once, by the driver, with `load_settings`; actors get the finished tree
as an argument. The variable of a field is `CARILLON_<SECTION>_<FIELD>` in capitals, e.g.
`CARILLON_GATEWAY_PORT`; a TOML file named by `CARILLON_CONFIG` holds the same as `[section] field = ...`.
The environment wins. docs/reference/settings.md is checked against this module by a test.

The sections lie in settings_*.py by subject; all of them are imported from here.
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from carillon.errors import SettingsError
from carillon.settings_cluster import ClusterSettings, LinkSettings, RouterSettings
from carillon.settings_edge import GatewaySettings, InboundSettings, IngressSettings
from carillon.settings_fields import check_bounds, parse_value
from carillon.settings_push import PushSettings
from carillon.settings_shard import (
    BroadcastSettings,
    MergeSettings,
    PresenceSettings,
    ScheduleSettings,
    ShardSettings,
    TemplateSettings,
)
from carillon.settings_stores import ArchiveSettings, PostgresSettings, RedisSettings

WATCH: tuple[str, ...] = ("nobody", "tenant", "callback")
"""Who may watch whose presence (carillon/policy.py)."""
_TIME_OF_DAY = re.compile(r"([01]\d|2[0-3]):[0-5]\d", re.ASCII)
WHEN_AWAY = ("in_app", "both", "push_after")
"""What may be done while every device of a connected user is hidden or idle (carillon/policy.py)."""


@dataclass(frozen=True)
class Settings:
    """The whole tree."""

    postgres: PostgresSettings = field(default_factory=PostgresSettings)
    redis: RedisSettings = field(default_factory=RedisSettings)
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    link: LinkSettings = field(default_factory=LinkSettings)
    shard: ShardSettings = field(default_factory=ShardSettings)
    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    ingress: IngressSettings = field(default_factory=IngressSettings)
    push: PushSettings = field(default_factory=PushSettings)
    router: RouterSettings = field(default_factory=RouterSettings)
    presence: PresenceSettings = field(default_factory=PresenceSettings)
    template: TemplateSettings = field(default_factory=TemplateSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    inbound: InboundSettings = field(default_factory=InboundSettings)
    broadcast: BroadcastSettings = field(default_factory=BroadcastSettings)
    archive: ArchiveSettings = field(default_factory=ArchiveSettings)
    merge: MergeSettings = field(default_factory=MergeSettings)

    def __post_init__(self) -> None:
        for section in dataclasses.fields(self):
            check_bounds(section.name, getattr(self, section.name))
        for name, section in (("gateway", self.gateway), ("ingress", self.ingress)):
            if bool(section.tls_cert_file) != bool(section.tls_key_file):
                raise SettingsError(
                    f"expected {name}.tls_cert_file and {name}.tls_key_file together, got one of them"
                )
        if self.cluster.lease_timeout_s < 2 * self.cluster.lease_renew_s:
            raise SettingsError(
                "expected cluster.lease_timeout_s to be at least twice cluster.lease_renew_s, got "
                f"{self.cluster.lease_timeout_s} and {self.cluster.lease_renew_s}: "
                "one late renewal would move slots"
            )
        if self.shard.when_away not in WHEN_AWAY:
            raise SettingsError(
                f"expected shard.when_away to be {'|'.join(WHEN_AWAY)}, got {self.shard.when_away!r}"
            )
        if self.presence.watch not in ("nobody", "tenant"):
            raise SettingsError(f"expected presence.watch to be nobody|tenant, got {self.presence.watch!r}")
        if self.broadcast.chunk_max < self.broadcast.chunk_min:
            raise SettingsError(
                "expected broadcast.chunk_max to be at least broadcast.chunk_min, got "
                f"{self.broadcast.chunk_max} and {self.broadcast.chunk_min}"
            )
        if self.link.reconnect_max_s < self.link.reconnect_min_s:
            raise SettingsError(
                "expected link.reconnect_max_s to be at least link.reconnect_min_s, got "
                f"{self.link.reconnect_max_s} and {self.link.reconnect_min_s}"
            )
        if self.archive.run_at and _TIME_OF_DAY.fullmatch(self.archive.run_at) is None:
            raise SettingsError(f"expected archive.run_at to be HH:MM, got {self.archive.run_at!r}")
        if self.merge.keep_s < self.shard.idempotency_ttl_s:
            raise SettingsError(
                "expected merge.keep_s to be at least shard.idempotency_ttl_s, got "
                f"{self.merge.keep_s} and {self.shard.idempotency_ttl_s}: a replay would not be recognised"
            )
        if self.push.max_senders < self.push.min_senders:
            raise SettingsError(
                "expected push.max_senders to be at least push.min_senders, got "
                f"{self.push.max_senders} and {self.push.min_senders}"
            )

    def with_values(self, **sections: Mapping[str, Any]) -> Settings:
        """A copy with some fields replaced: `with_values(gateway={"port": 0})`. Raises SettingsError."""
        changes: dict[str, Any] = {}
        for name, values in sections.items():
            try:
                changes[name] = dataclasses.replace(getattr(self, name), **values)
            except (AttributeError, TypeError) as exc:
                raise SettingsError(f"unknown setting in section {name!r}: {exc}") from exc
        return dataclasses.replace(self, **changes)


def load_settings(environ: Mapping[str, str], config_path: Path | None = None) -> Settings:
    """Build the tree from a TOML file and environment variables.

    Args:
        environ: usually `os.environ`, read by the driver only.
        config_path: TOML file; None means the one named by `CARILLON_CONFIG`, if any.

    Raises:
        SettingsError: a value has the wrong type, breaks a bound, or names no setting.
    """
    if config_path is None and environ.get("CARILLON_CONFIG"):
        config_path = Path(environ["CARILLON_CONFIG"])
    document: dict[str, Any] = {}
    if config_path is not None:
        try:
            document = tomllib.loads(config_path.read_text())
        except OSError as exc:
            raise SettingsError(f"cannot read the settings file {config_path}: {exc.strerror}") from exc
        except tomllib.TOMLDecodeError as exc:
            raise SettingsError(f"expected {config_path} to be TOML: {exc}") from exc
    sections = {f.name: f.default_factory for f in dataclasses.fields(Settings)}
    for name in document:
        if name not in sections:
            raise SettingsError(f"unknown section [{name}] in {config_path}; known: {', '.join(sections)}")
        if not isinstance(document[name], dict):
            raise SettingsError(f"expected [{name}] in {config_path} to be a table, got {document[name]!r}")
    built: dict[str, Any] = {}
    known_variables: set[str] = {"CARILLON_CONFIG"}
    for name, make in sections.items():
        assert callable(make)
        kinds = get_type_hints(make)
        values: dict[str, Any] = {}
        for key, value in document.get(name, {}).items():
            if key not in kinds:
                raise SettingsError(f"unknown setting {name}.{key} in {config_path}")
            values[key] = parse_value(f"{name}.{key}", kinds[key], value)
        for key, kind in kinds.items():
            variable = f"CARILLON_{name}_{key}".upper()
            known_variables.add(variable)
            if variable in environ:
                values[key] = parse_value(variable, kind, environ[variable])
        built[name] = make(**values)
    prefixes = tuple(f"CARILLON_{name}_".upper() for name in sections)
    for variable in environ:
        if variable.startswith(prefixes) and variable not in known_variables:
            raise SettingsError(f"unknown setting {variable}; docs/reference/settings.md lists them")
    return Settings(**built)
