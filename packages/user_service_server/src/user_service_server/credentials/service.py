"""The rules of credentials: when a password may be set."""

from __future__ import annotations

from user_service_schemas import ChangeKind, PasswordUpdate

from ..errors import Invalid, InvalidCredentials, UserNotFound
from ..storage.database import Database
from ..storage.document import EntityTags
from ..storage.documents import Documents, Recorder
from . import repository
from .passwords import Passwords, judge_password


class Credentials:
    """What can be done with a user's password."""

    def __init__(self, database: Database, documents: Documents, passwords: Passwords) -> None:
        self._database = database
        self._documents = documents
        self._passwords = passwords

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
        if request.current_password is not None and not await self._passwords.verify(
            request.current_password, seen.password_hash
        ):
            raise InvalidCredentials
        password_hash = await self._passwords.hash(request.password)
        async with self._documents.write(user_id, recorder) as write:
            row = await write.lock_user(user_id, if_match)
            if proven and row.password_hash != seen.password_hash:
                raise InvalidCredentials
            await repository.set_password_hash(write.connection, user_id, password_hash)
            write.changed(user_id, ChangeKind.PASSWORD_UPDATED)
            await write.conclude(lambda: None)
