"""The rules of preferences: how they merge, and what the history keeps."""

from __future__ import annotations

from typing import TypeAlias

from user_service_schemas import (
    ChangeKind,
    Preferences,
    PreferencesRevision,
    PreferencesUpdate,
    merge_preferences,
    preference_changes,
)

from ..errors import UserNotFound
from ..settings import Settings
from ..storage.database import Database
from ..storage.document import EntityTags
from ..storage.documents import Documents
from ..storage.recorded_answers import Recorder
from ..storage.revisions import Base, Revision, Settled
from . import repository

_Decision: TypeAlias = Revision[tuple[Preferences, int]] | Settled[tuple[Preferences, int]]


class PreferenceCenter:
    """What can be done with a user's preferences."""

    def __init__(self, settings: Settings, database: Database, documents: Documents) -> None:
        self._catalogue = settings.categories
        self._database = database
        self._documents = documents

    async def update(
        self,
        user_id: str,
        request: PreferencesUpdate,
        if_match: EntityTags | None,
        recorder: Recorder,
    ) -> tuple[Preferences, int]:
        """Merge a change into a user's preferences; returns them and the user's version.

        A consent that changes no preference is kept in the history all the same: it says under
        which policy the user agreed to what was there.

        Raises:
            RuleViolation: the merged result breaks a rule.
            UserNotFound, VersionMismatch
        """
        consent = request.consent or None

        def decide(base: Base) -> _Decision | None:
            after = merge_preferences(base.choices, request, self._catalogue)
            changes = preference_changes(base.choices, after)
            if not changes:
                document = base.document
                return None if consent else Settled((document.user.preferences, document.version))
            user = base.changed(preferences=self._documents.shape.preferences(after))
            return Revision(
                user,
                ChangeKind.PREFERENCES_UPDATED,
                repository.say(after, changes, consent),
                (user.preferences, user.version),
            )

        revised = await self._documents.revise(user_id, if_match, recorder, repository.READ, decide)
        if revised:
            return revised
        async with self._documents.write(user_id, recorder) as write:
            row = await write.lock_user(user_id, if_match)
            before = await repository.read_choices(write.connection, user_id)
            after = merge_preferences(before, request, self._catalogue)
            changes = preference_changes(before, after)
            if changes:
                write.changed(user_id, ChangeKind.PREFERENCES_UPDATED)
            if changes or consent:
                version = row.version + bool(changes)
                await repository.append_history(
                    write.connection,
                    user_id,
                    version,
                    changes,
                    consent=consent,
                    actor=write.actor,
                    choices=after if changes else None,
                )
            return await write.conclude(
                lambda: (write.document.preferences, write.document.version)
            )

    async def history(
        self, user_id: str, before: int | None, limit: int
    ) -> list[tuple[int, PreferencesRevision]]:
        """Return up to `limit` entries below the id `before`, newest first, with their ids.

        Raises:
            UserNotFound: there is no such user.
        """
        async with self._database.reading() as connection:
            found = await repository.read_history(connection, user_id, before, limit)
        if found is None:
            raise UserNotFound
        return found
