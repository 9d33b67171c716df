"""`client.changes`: what was changed, page by page."""

from __future__ import annotations

from typing import Unpack

import msgspec
from user_service_schemas import Changes, Envelope

from user_service_client._calls import Call, CallOptions, Calls

_CHANGES = msgspec.json.Decoder(Envelope[Changes])


class ChangesOfUsers:
    """The feed of changes. A client made with `live=True` follows it by itself."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def list(
        self, *, after: str | None = None, limit: int | None = None, **options: Unpack[CallOptions]
    ) -> Changes:
        """Return changes behind a cursor, oldest first; go on with `next`, also if there are none.

        Of one user, versions never go back; a change may come twice, never not at all.

        Args:
            after: A `position` or a `next`; None: from the oldest that is kept.
            limit: 1 to 1000; the service's own page if omitted.
            **options: See `CallOptions`.

        Raises:
            BadRequest: the cursor is none (code `invalid_cursor`), or, after a restore of the
                service's database or being away too long, no longer valid.
        """
        params = {} if limit is None else {"limit": str(limit)}
        if after is not None:
            params["after"] = after
        call = Call("changes.list", "GET", "/api/v1/changes", params, **options)
        return (await self._calls.send(call)).data(_CHANGES)
