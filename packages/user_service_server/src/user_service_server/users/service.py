"""The rules of users: registration, profiles, lookup, erasure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec import UNSET
from user_service_schemas import (
    ChangeKind,
    Choices,
    CreateUser,
    FieldError,
    LookupUsers,
    RuleViolation,
    User,
    UserUpdate,
    merge_preferences,
)
from uuid_utils import uuid7

from ..credentials.passwords import Passwords, judge_password
from ..devices import repository as devices
from ..errors import EmailTaken, ExternalIdTaken, Invalid
from ..preferences import repository as preferences
from ..settings import Settings
from ..storage import recorded_answers
from ..storage.database import driver
from ..storage.direct import Fields
from ..storage.document import EntityTags, StoredDocument
from ..storage.documents import Documents, Write
from ..storage.recorded_answers import Recorder
from ..storage.revisions import Revision
from . import repository
from .profile import email_key, phone_key, profile_values


class Users:
    """What can be done with users."""

    def __init__(self, settings: Settings, documents: Documents, passwords: Passwords) -> None:
        self._password_required = settings.password_required
        self._catalogue = settings.categories
        self._documents = documents
        self._passwords = passwords

    async def register(self, request: CreateUser, recorder: Recorder) -> User:
        """Register a user with default preferences where the request names none.

        Raises:
            Invalid: fields are not valid.
            EmailTaken, ExternalIdTaken: another user has it.
            Overloaded: too many passwords wait to be hashed.
        """
        values, choices, errors = self._judged(request)
        if errors:
            raise Invalid(*errors)
        if request.password is not None:
            values["password_hash"] = await self._passwords.hash(request.password)
        user_id, consent = str(uuid7()), request.preferences.consent or None

        def decide(row: Fields) -> Revision[User] | None:
            if row["is_taken"]:
                return None
            deliverable, at = row["email_deliverable"], row["now"]
            user = self._documents.shape.registered(
                user_id, values, choices, email_deliverable=deliverable, at=at
            ).user
            effects = repository.register(
                values, choices, email_deliverable=deliverable, consent=consent
            )
            return Revision(user, ChangeKind.USER_CREATED, effects, user, tuple(_names(values)))

        name = repository.email_name(str(values["email_key"]))
        entered = await self._documents.enter(
            user_id,
            recorder,
            repository.LOOK,
            decide,
            email_name=name,
            email_key=values["email_key"],
            external_id=values.get("external_id"),
        )
        if entered is not None:
            return entered
        async with self._documents.write(user_id, recorder) as write:
            await write.announce(user_id)
            await write.lock_names(*_names(values))
            # With these locks the transaction has begun.
            connection = await driver(write.connection)
            while not await repository.insert_user(connection, user_id, values):
                # Whoever had it may have given it up in between: then it is free now.
                await _refuse_taken(write, user_id, values)
            await preferences.insert_choices(
                connection,
                user_id,
                choices,
                consent=consent,
                actor=write.actor,
            )
            write.changed(user_id, ChangeKind.USER_CREATED)
            return await write.conclude(lambda: write.document)

    def judge_registration(self, request: Any) -> list[FieldError]:
        """Return what is wrong with a registration that may be valid only in part."""
        return self._judged(request)[-1]

    def _judged(self, request: Any) -> tuple[dict[str, str | None], Choices, list[FieldError]]:
        """Return the columns that a registration sets, its choices, and what is wrong with it."""
        values, errors = profile_values(request)
        choices = Choices()
        if request.preferences is not UNSET:
            try:
                choices = merge_preferences(choices, request.preferences, self._catalogue)
            except RuleViolation as violation:
                errors += [
                    FieldError(field=f"preferences.{detail.field}", message=detail.message)
                    for detail in violation.details
                ]
        if isinstance(request.password, str):
            about = {name: str(getattr(request, name) or "") for name in ("email", "name")}
            errors += judge_password(request.password, field="password", **about)
        elif request.password is None and self._password_required:
            errors.append(FieldError(field="password", message="This field is required."))
        return values, choices, errors

    async def get_many(self, ids: Sequence[str]) -> dict[str, StoredDocument]:
        """Return the documents of those of `ids` that exist."""
        return await self._documents.get_many(ids)

    async def lookup(self, request: LookupUsers) -> list[User]:
        """Find users by email, telephone number or external id."""
        if request.email is not UNSET:
            by = repository.by_email(email_key(request.email))
        elif request.phone is not UNSET:
            by = repository.by_phone(phone_key(request.phone))
        else:
            by = repository.by_external_id(str(request.external_id))
        return await self._documents.find(by, limit=1000)

    async def list_after(self, user_id: str | None, limit: int) -> list[User]:
        """Return up to `limit` users behind `user_id`, oldest registration first."""
        where = [repository.after(user_id)] if user_id else []
        return await self._documents.find(*where, limit=limit)

    async def update(
        self,
        user_id: str,
        request: UserUpdate,
        if_match: EntityTags | None,
        recorder: Recorder,
    ) -> User:
        """Change a profile.

        Raises:
            Invalid, UserNotFound, VersionMismatch, EmailTaken, ExternalIdTaken
        """
        values, errors = profile_values(request)
        if errors:
            raise Invalid(*errors)
        async with self._documents.write(user_id, recorder) as write:
            await write.lock_names(*_names(values))
            row = await write.lock_user(user_id, if_match)
            fresh = {column: v for column, v in values.items() if getattr(row, column) != v}
            if fresh:
                await _refuse_taken(write, user_id, fresh)
                changed: dict[str, Any] = dict(fresh)
                if key := fresh.get("email_key"):
                    # Suppression is by address, whoever has it.
                    changed["email_deliverable"] = repository.is_deliverable(key)
                await repository.update_user(write.connection, user_id, changed)
                write.changed(user_id, ChangeKind.USER_UPDATED)
            return await write.conclude(lambda: write.document)

    async def erase(self, user_id: str, if_match: EntityTags | None, recorder: Recorder) -> None:
        """Erase a user's personal data, recorded answers included; that the id existed stays.

        Raises:
            UserNotFound, VersionMismatch
        """
        async with self._documents.write(user_id, recorder) as write:
            await write.lock_user(user_id, if_match)
            await recorded_answers.forget(write.connection, user_id)
            await preferences.erase(write.connection, user_id)
            await devices.erase(write.connection, user_id)
            await repository.erase_user(write.connection, user_id)
            write.changed(user_id, ChangeKind.USER_DELETED)
            await write.conclude(lambda: None)


def _names(values: dict[str, str | None]) -> list[bytes]:
    """Return the names to lock so that a check for a taken value stays true until the commit."""
    names = []
    if key := values.get("email_key"):
        names.append(repository.email_name(key))
    if external_id := values.get("external_id"):
        names.append(repository.external_id_name(external_id))
    return names


async def _refuse_taken(write: Write, user_id: str, values: dict[str, str | None]) -> None:
    key, external_id = values.get("email_key"), values.get("external_id")
    if key and await repository.is_taken(write.connection, repository.by_email(key), user_id):
        raise EmailTaken(FieldError(field="email", message=EmailTaken.message))
    if external_id and await repository.is_taken(
        write.connection, repository.by_external_id(external_id), user_id
    ):
        raise ExternalIdTaken(FieldError(field="external_id", message=ExternalIdTaken.message))
