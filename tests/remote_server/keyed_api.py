"""The API of an NDIF server that knows one key; it would look keys up in Postgres otherwise."""

import os
import uuid

from ndif.common.providers.postgres import PostgresProvider
from ndif.services.api.app import app

__all__ = ["app"]

_KNOWN = uuid.UUID(os.environ["PROBE_NDIF_KNOWN_KEY"])


async def _fetch(query, key):
    return [{"user_id": 1, "email": "reader@example.org", "user_tag": "trusted"}] * (key == _KNOWN)


PostgresProvider.enabled = classmethod(lambda cls: True)
PostgresProvider.fetch = _fetch
