"""The rules of credentials: when a password is right, and when one may be set."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator
from typing import Final

from user_service_schemas import ChangeKind, PasswordUpdate, VerifyCredentials, canonical_email

from ..errors import DependencyUnavailable, Invalid, InvalidCredentials, Overloaded, UserNotFound
from ..http.limits import RateLimits
from ..settings import Settings
from ..storage.database import Database
from ..storage.document import EntityTags
from ..storage.documents import Documents
from ..storage.recorded_answers import Recorder
from . import repository
from .passwords import Passwords, judge_password

FAILURES_WITHIN: Final = 900
"""Seconds within which the wrong passwords for one email are counted."""


class Credentials:
    """What can be done with a user's password."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        documents: Documents,
        passwords: Passwords,
        limits: RateLimits,
    ) -> None:
        self._failures = settings.password_failures
        self._database = database
        self._documents = documents
        self._passwords = passwords
        self._limits = limits

    async def verify(self, request: VerifyCredentials) -> str:
        """Return whose email and password these are.

        The same is done, and takes as long, whoever it is about and whether anybody.

        Raises:
            InvalidCredentials: nobody's.
            RateLimited: too many wrong ones were tried for this email.
            Overloaded: too many passwords wait to be judged.
        """
        try:
            key = canonical_email(request.email)
        except ValueError:
            key = request.email  # what can be nobody's email is judged like that of nobody
        async with self._trying(key):
            async with self._database.reading() as connection:
                seen = await repository.read_by_email(connection, key)
            stored = seen.password_hash if seen is not None else None
            if not await self._passwords.verify(request.password, stored) or seen is None:
                raise InvalidCredentials
        if self._passwords.is_outdated(seen.password_hash):
            # What was right stays right when there is no time for it now: the next time, then.
            with contextlib.suppress(DependencyUnavailable, Overloaded):
                renewed = await self._passwords.hash(request.password)
                async with self._database.reading() as connection:
                    await repository.renew_password_hash(
                        connection, seen.id, seen.password_hash, renewed
                    )
        return str(seen.id)

    @contextlib.asynccontextmanager
    async def _trying(self, subject: str) -> AsyncIterator[None]:
        """Count an attempt before it is made, so that no two pass for one; a right one is free."""
        digest = hashlib.sha256(subject.encode("utf-8", "surrogatepass")).hexdigest()
        key = f"password:{digest}"
        await self._limits.take_strictly(key, self._failures, FAILURES_WITHIN)
        try:
            yield
        except InvalidCredentials:
            raise
        except BaseException:
            await self._limits.give_back(key)
            raise
        await self._limits.give_back(key)

    async def set_password(
        self,
        user_id: str,
        request: PasswordUpdate,
        if_match: EntityTags | None,
        recorder: Recorder,
    ) -> None:
        """Set a new password; where a current one is given, only if that is right.

        Raises:
            Invalid, UserNotFound, VersionMismatch, Overloaded
            InvalidCredentials: the current password is another, or was changed meanwhile.
        """
        async with self._database.reading() as connection:
            seen = await repository.read_credentials(connection, user_id)
        if seen is None:
            raise UserNotFound
        errors = judge_password(
            request.password, field="password", email=seen.email, name=seen.name
        )
        if errors:
            raise Invalid(*errors)
        proven = request.current_password is not None
        if request.current_password is not None:
            async with self._trying(canonical_email(seen.email)):
                if not await self._passwords.verify(request.current_password, seen.password_hash):
                    raise InvalidCredentials
        password_hash = await self._passwords.hash(request.password)
        async with self._documents.write(user_id, recorder) as write:
            row = await write.lock_user(user_id, if_match)
            if proven and row.password_hash != seen.password_hash:
                raise InvalidCredentials
            await repository.set_password_hash(write.connection, user_id, password_hash)
            write.changed(user_id, ChangeKind.PASSWORD_UPDATED)
            await write.conclude(lambda: None)
