"""`client.users`: reading, registering, changing and deleting users."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable
from typing import Unpack

import msgspec
from user_service_schemas import (
    MAX_BATCH,
    BatchOfUsers,
    BatchUsers,
    CreateUser,
    Envelope,
    FoundUsers,
    LookupUsers,
    Page,
    PasswordUpdate,
    PreferencesUpdate,
    User,
    UserUpdate,
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

_USER = msgspec.json.Decoder(Envelope[User])
_BATCH = msgspec.json.Decoder(Envelope[BatchOfUsers])
_FOUND = msgspec.json.Decoder(Envelope[FoundUsers])
_PAGE = msgspec.json.Decoder(Envelope[Page[User]])


class Users:
    """The users of the service.

    Every method takes the keywords of `CallOptions`, writes those of `WriteOptions`, and raises
    `UserServiceError`s: named below is only what is special to the method.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def get(self, user_id: Id, **options: Unpack[CallOptions]) -> User:
        """Return a user.

        Raises:
            NotFound: nobody has this id.
        """
        return (await self._read(user_id, **options)).data(_USER)

    async def get_with_etag(self, user_id: Id, **options: Unpack[CallOptions]) -> tuple[User, str]:
        """Return a user and the ETag that a write takes as `if_match`.

        Raises:
            NotFound: nobody has this id.
        """
        answer = await self._read(user_id, **options)
        return answer.data(_USER), answer.etag()

    async def _read(self, user_id: Id, **options: Unpack[CallOptions]) -> Answer:
        return await self._calls.send(Call("users.get", "GET", user_path(user_id), **options))

    async def get_many(self, ids: Iterable[Id], **options: Unpack[CallOptions]) -> BatchOfUsers:
        """Return the users that exist, in the order of `ids` and once each, and who is `missing`.

        More than 1000 ids are asked for in several requests, one after the other. `timeout` is the
        deadline for all of them.
        """
        unique = list(dict.fromkeys(str(id_).lower() for id_ in ids))
        timeout = options.pop("timeout", None)
        ends = time.monotonic() + (self._calls.timeout if timeout is None else timeout)
        users: list[User] = []
        missing: list[str] = []
        for start in range(0, len(unique), MAX_BATCH):
            options["timeout"] = max(0.0, ends - time.monotonic())
            body = BatchUsers(ids=unique[start : start + MAX_BATCH])
            answer = await self._calls.send(
                Call("users.get_many", "POST", "/api/v1/users/batch", body=body, **options)
            )
            batch = answer.data(_BATCH)
            users.extend(batch.users)
            missing.extend(batch.missing)
        return BatchOfUsers(users=tuple(users), missing=tuple(missing))

    async def lookup(
        self,
        *,
        email: str | msgspec.UnsetType = msgspec.UNSET,
        phone: str | msgspec.UnsetType = msgspec.UNSET,
        external_id: str | msgspec.UnsetType = msgspec.UNSET,
        **options: Unpack[CallOptions],
    ) -> tuple[User, ...]:
        """Return who has this email, telephone number or external id: give exactly one of them.

        Nobody is an empty tuple; several users can share a telephone number. Emails are compared
        without regard to case.

        Raises:
            ValueError: none, or more than one of them is given.
        """
        body = LookupUsers(email=email, phone=phone, external_id=external_id)
        answer = await self._calls.send(
            Call("users.lookup", "POST", "/api/v1/users/lookup", body=body, **options)
        )
        return answer.data(_FOUND).users

    async def list(
        self, *, page_size: int | None = None, **options: Unpack[CallOptions]
    ) -> AsyncIterator[User]:
        """Iterate over all users, asking for a page when the one before is used up.

        Args:
            page_size: Users a page; the service's own size if omitted.
            **options: `timeout` is the deadline of each page.
        """
        cursor: str | None = None
        while True:
            call = Call(
                "users.list", "GET", "/api/v1/users", page_params(page_size, cursor), **options
            )
            page = (await self._calls.send(call)).data(_PAGE)
            for user in page.items:
                yield user
            cursor = page.next_cursor
            if cursor is None:
                return

    async def create(
        self,
        *,
        name: str,
        email: str,
        password: str | None = None,
        phone: str | None = None,
        external_id: str | None = None,
        locale: str | None = None,
        preferences: PreferencesUpdate | None = None,
        **options: Unpack[CallOptions],
    ) -> User:
        """Register a user.

        Args:
            name: 1 to 200 characters.
            email: An address of at most 254 characters, unique without regard to case.
            password: 8 to 128 characters; a service may be set to do without one.
            phone: A telephone number in E.164 form, such as `+48221234567`.
            external_id: The id in your own system, 1 to 128 characters, unique.
            locale: A language tag (BCP 47), such as `pl-PL`.
            preferences: What is not named is: email and push on, no quiet hours.
            **options: See `CallOptions`.

        Raises:
            Conflict: the email or the external id is taken.
            Invalid: `details` names every bad field.
        """
        body = CreateUser(
            name=name,
            email=email,
            password=password,
            phone=phone,
            external_id=external_id,
            locale=locale,
            preferences=preferences or PreferencesUpdate(),
        )
        answer = await self._calls.send(
            Call("users.create", "POST", "/api/v1/users/", body=body, **options)
        )
        return answer.data(_USER)

    async def update(
        self,
        user_id: Id,
        *,
        name: str | msgspec.UnsetType = msgspec.UNSET,
        email: str | msgspec.UnsetType = msgspec.UNSET,
        phone: str | msgspec.UnsetType | None = msgspec.UNSET,
        external_id: str | msgspec.UnsetType | None = msgspec.UNSET,
        locale: str | msgspec.UnsetType | None = msgspec.UNSET,
        **options: Unpack[WriteOptions],
    ) -> User:
        """Change a profile and return the user. What is omitted stays, None clears.

        The fields are those of `create`.

        Raises:
            NotFound: nobody has this id.
            Conflict: the email or the external id is taken.
            Invalid: `details` names every bad field.
            VersionMismatch: the version is not that of `if_match`.
        """
        body = UserUpdate(
            name=name, email=email, phone=phone, external_id=external_id, locale=locale
        )
        answer = await self._calls.send(
            Call("users.update", "PATCH", user_path(user_id), body=body, **options)
        )
        return answer.data(_USER)

    async def delete(self, user_id: Id, **options: Unpack[WriteOptions]) -> None:
        """Erase a user's personal data, for good.

        Raises:
            NotFound: nobody has this id.
            VersionMismatch: the version is not that of `if_match`.
        """
        answer = await self._calls.send(
            Call("users.delete", "DELETE", user_path(user_id), **options)
        )
        answer.check()

    async def set_password(
        self,
        user_id: Id,
        password: str,
        *,
        current_password: str | None = None,
        **options: Unpack[WriteOptions],
    ) -> None:
        """Set a password of 8 to 128 characters.

        Args:
            user_id: Whose.
            password: The new one.
            current_password: If given, it must be the current one.
            **options: See `WriteOptions`.

        Raises:
            NotFound: nobody has this id.
            Unauthenticated: the current password is another (code `invalid_credentials`).
            Invalid: the new one is refused.
            VersionMismatch: the version is not that of `if_match`.
        """
        body = PasswordUpdate(password=password, current_password=current_password)
        path = user_path(user_id, "/password")
        answer = await self._calls.send(
            Call("users.set_password", "PUT", path, body=body, **options)
        )
        answer.check()
