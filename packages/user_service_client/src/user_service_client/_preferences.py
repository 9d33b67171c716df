"""`client.preferences`: what a user wants to get, and the history of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from typing import Unpack

import msgspec
from user_service_schemas import (
    CategoryUpdate,
    Consent,
    Envelope,
    Page,
    Preferences,
    PreferencesRevision,
    PreferencesUpdate,
)

from user_service_client._answers import Answer
from user_service_client._calls import (
    Call,
    CallOptions,
    Calls,
    Id,
    WriteOptions,
    page_params,
    user_path,
)
from user_service_client._writes import Writes

_PREFERENCES = msgspec.json.Decoder(Envelope[Preferences])
_HISTORY = msgspec.json.Decoder(Envelope[Page[PreferencesRevision]])


class PreferencesOfUsers:
    """The preferences of users. Options and errors are as at `Users`."""

    def __init__(self, calls: Calls, writes: Writes) -> None:
        self._calls = calls
        self._writes = writes

    async def get(self, user_id: Id, **options: Unpack[CallOptions]) -> Preferences:
        """Return a user's preferences as the service has them now, past the client's own copies.

        `users.get(user_id).preferences` has the same, and comes from them.

        Raises:
            NotFound: nobody has this id.
        """
        return (await self._read(user_id, **options)).data(_PREFERENCES)

    async def get_with_etag(
        self, user_id: Id, **options: Unpack[CallOptions]
    ) -> tuple[Preferences, str]:
        """Return a user's preferences and the user's ETag, which a write takes as `if_version`.

        Raises:
            NotFound: nobody has this id.
        """
        answer = await self._read(user_id, **options)
        return answer.data(_PREFERENCES), answer.known_etag()

    async def _read(self, user_id: Id, **options: Unpack[CallOptions]) -> Answer:
        path = user_path(user_id, "/preferences")
        floor = self._writes.floor(user_id)
        call = Call("preferences.get", "GET", path, min_version=floor, **options)
        return await self._calls.send(call)

    async def update(
        self,
        user_id: Id,
        *,
        email: bool | msgspec.UnsetType = msgspec.UNSET,
        push: bool | msgspec.UnsetType = msgspec.UNSET,
        quiet_hours_start: str | msgspec.UnsetType | None = msgspec.UNSET,
        quiet_hours_end: str | msgspec.UnsetType | None = msgspec.UNSET,
        timezone: str | msgspec.UnsetType | None = msgspec.UNSET,
        muted_until: datetime | msgspec.UnsetType | None = msgspec.UNSET,
        categories: Mapping[str, CategoryUpdate | None] | msgspec.UnsetType | None = msgspec.UNSET,
        consent: Consent | msgspec.UnsetType = msgspec.UNSET,
        **options: Unpack[WriteOptions],
    ) -> Preferences:
        """Change preferences and return them. What is omitted stays, None clears.

        Args:
            user_id: Whose.
            email: Whether emails are wanted at all.
            push: Whether pushes are wanted at all.
            quiet_hours_start: `HH:MM` in the user's zone. Afterwards both ends are set, or none.
            quiet_hours_end: `HH:MM`, not the same as the start.
            timezone: An IANA name; None for the service's default.
            muted_until: An instant with its offset: until then only urgent messages.
            categories: Changes of single categories; a category's None forgets what was said.
            consent: Where this comes from, kept in the history.
            **options: See `WriteOptions`.

        Raises:
            NotFound: nobody has this id.
            Invalid: `details` names every bad field.
            VersionMismatch: the version is not that of `if_version`.
        """
        body = PreferencesUpdate(
            email=email,
            push=push,
            quiet_hours_start=quiet_hours_start,
            quiet_hours_end=quiet_hours_end,
            timezone=timezone,
            muted_until=muted_until,
            categories=dict(categories) if isinstance(categories, Mapping) else categories,
            consent=consent,
        )
        answer = await self._writes.send(
            "preferences.update", "PATCH", user_id, options, rest="/preferences", body=body
        )
        return answer.data(_PREFERENCES)

    async def history(
        self, user_id: Id, *, page_size: int | None = None, **options: Unpack[CallOptions]
    ) -> AsyncIterator[PreferencesRevision]:
        """Iterate over who changed what and when, newest first, asking page by page.

        Args:
            user_id: Whose.
            page_size: Entries a page; the service's own size if omitted.
            **options: `timeout` is the deadline of each page.

        Raises:
            NotFound: nobody has this id.
        """
        path = user_path(user_id, "/preferences/history")
        cursor: str | None = None
        while True:
            call = Call(
                "preferences.history", "GET", path, page_params(page_size, cursor), **options
            )
            page = (await self._calls.send(call)).data(_HISTORY)
            for revision in page.items:
                yield revision
            cursor = page.next_cursor
            if cursor is None:
                return
