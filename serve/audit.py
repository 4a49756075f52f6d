"""Administrative acts that come over HTTP, noted."""

from __future__ import annotations

import logging
from typing import Any

from carillon.errors import CarillonError
from serve.http import Request
from serve.services import Services

log = logging.getLogger(__name__)


async def audited(services: Services, request: Request, action: str, target: str = "", **detail: Any) -> None:
    """Note what was done, by the key of the request. `detail` holds no secret.

    The act itself is done: a note that cannot be written is logged and does not make it a failure.
    """
    actor = "key:unknown" if request.caller is None else f"key:{request.caller.key_id}"
    try:
        await services.tenants.record_audit(request.tenant, actor, action, target, **detail)
    except CarillonError as exc:
        log.error("audit: %s did %s %s in %s: %s", actor, action, target, request.tenant, exc)
