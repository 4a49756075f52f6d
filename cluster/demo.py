"""The demo tenant of `up`: a tenant, a key that stays the same, and users with phones."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Final

from carillon.api_keys import SCOPES, hash_key
from carillon.errors import ClusterError
from carillon.settings import PostgresSettings
from cluster.run_folder import RunFolder
from stores.postgres.pool import open_pool
from stores.postgres.tenants import TenantStore

DEMO_TENANT: Final = "demo"

DEMO_USERS: Final = ("alice", "bob", "carol")
"""Users of the demo page."""

DEMO_DEVICES: Final = {
    "alice": {
        "alice-phone": {"platform": "android", "provider": "fcm", "token": "demo-fcm-alice"},
    },
    "bob": {
        # APNs tokens are hex; the local server takes any.
        "bob-iphone": {"platform": "ios", "provider": "apns", "token": "b0b0" * 16},
    },
    # carol has no push target: what she misses waits in her feed.
}
"""Push targets by user and device."""


@dataclass(frozen=True)
class DemoTenant:
    """What a service needs to use the demo tenant."""

    api_key: str
    client_secret: str


async def ensure_demo_tenant(postgres: PostgresSettings, folder: RunFolder) -> DemoTenant:
    """The demo tenant with a valid key: the one kept in `folder`, or a new one if the database is new."""
    pool = await open_pool(postgres, 1)
    try:
        store = TenantStore(pool)
        tenant = await store.tenant(DEMO_TENANT)
        if tenant is None:
            tenant = await store.create_tenant(DEMO_TENANT)
            await store.put_policy(DEMO_TENANT, '{"presence":{"watch":"tenant"}}')
        key = folder.api_key()
        known = await store.api_key(hash_key(key)) if key else None
        if key is None or known is None or known.revoked or known.tenant != DEMO_TENANT:
            key = await store.create_key(DEMO_TENANT, "made by up", list(SCOPES))
            folder.keep_api_key(key)
        return DemoTenant(key, tenant.client_secret)
    finally:
        await pool.close()


def register_demo_devices(url: str, api_key: str) -> None:
    """Give the demo users their phones, through the API. Idempotent. Raises ClusterError."""
    for user, devices in DEMO_DEVICES.items():
        for device, target in devices.items():
            request = urllib.request.Request(  # noqa: S310  our own http:// address
                f"{url}/v1/users/{user}/devices/{device}",
                data=json.dumps(target).encode(),
                method="PUT",
                headers={"Authorization": f"Bearer {api_key}", "Content-Type": "application/json"},
            )
            try:
                with urllib.request.urlopen(request, timeout=15.0):  # noqa: S310
                    pass
            except urllib.error.HTTPError as exc:
                raise ClusterError(
                    f"cannot register {device} of {user}: {exc.code} {exc.read(300).decode(errors='replace')}"
                ) from exc
            except OSError as exc:
                raise ClusterError(f"cannot register {device} of {user}: {exc}") from exc
