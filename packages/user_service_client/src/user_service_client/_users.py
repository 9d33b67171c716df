"""`client.users`: reading, registering, changing and deleting users."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from sys import intern
from typing import Unpack

import msgspec
from user_service_schemas import (
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
from user_service_client._cache import (
    Asked,
    Batch,
    CachedUser,
    DocumentCache,
    Fetched,
    Nobody,
    Tag,
    Use,
    Wish,
)
from user_service_client._calls import (
    Call,
    CallOptions,
    Calls,
    CreateOptions,
    Id,
    WriteOptions,
    id_text,
    page_params,
    shared_wishes,
    user_path,
)
from user_service_client._writes import Writes

DOCUMENT_TAG = "X-Document-Tag"
"""The header of a batch: `<epoch>.<format>`, what the ETags of its documents begin with."""

_NOT_MODIFIED = frozenset({304})
_NOTHING_ELSE: frozenset[int] = frozenset()
_USER = msgspec.json.Decoder(Envelope[User])
_FOUND = msgspec.json.Decoder(Envelope[FoundUsers])
_PAGE = msgspec.json.Decoder(Envelope[Page[User]])
_BATCH = msgspec.json.Decoder(Envelope[BatchOfUsers])


class DocumentSource:
    """Asks the service for documents, for the cache."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def fetch(
        self,
        user_id: str,
        held: CachedUser | None,
        floor: int,
        deadline: float,
        options: CallOptions,
    ) -> Fetched | None:
        """Read one user; see `Source`."""
        call = Call(
            "users.get",
            "GET",
            user_path(user_id),
            held=held.etag if held else None,
            accepts=_NOT_MODIFIED if held else _NOTHING_ELSE,
            min_version=floor,
            deadline=deadline,
            retries=options.get("retries"),
            headers=options.get("headers"),
        )
        answer = await self._calls.send(call)
        return None if answer.status == 304 else fetched_user(answer)

    async def fetch_many(self, ids: Sequence[str], deadline: float, options: CallOptions) -> Batch:
        """Read up to 1000 users; see `Source`."""
        call = Call(
            "users.get_many",
            "POST",
            "/api/v1/users/batch",
            body=BatchUsers(ids=list(ids)),
            deadline=deadline,
            retries=options.get("retries"),
            headers=options.get("headers"),
        )
        answer = await self._calls.send(call)
        tag = answer.reply.headers.get(DOCUMENT_TAG, "")
        epoch, form = map(intern, tag.partition(".")[::2])
        users = answer.data(_BATCH).users
        return Batch(users, epoch, form, len(answer.reply.body) // max(1, len(users)))

    def deadline(self) -> float:
        """Return the deadline of a read for which nobody waits."""
        return self._calls.deadline_of_its_own()


def fetched_user(answer: Answer) -> Fetched:
    """Return the user that an answer holds, and what its ETag says of it."""
    user = answer.data(_USER)
    tag = Tag.parse(answer.etag)
    size = len(answer.reply.body)
    return Fetched(user, tag.epoch, tag.format, size) if tag else Fetched(user, "", "", size)


class Users:
    """The users of the service.

    Every method takes the keywords of `CallOptions`, `get` and `get_many` those of `ReadOptions`,
    writes those of `WriteOptions`, and raises `UserServiceError`s: named below is only what is
    special to the method.
    """

    def __init__(self, calls: Calls, cache: DocumentCache, writes: Writes) -> None:
        self._calls = calls
        self._cache = cache
        self._writes = writes
        self._hit = cache.hit
        self._peek = cache.peek

    async def get(
        self,
        user_id: Id,
        *,
        max_stale: float | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the call's deadline
        retries: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> User:
        """Return a user, from the client's own copy while that is fresh.

        Concurrent reads of one user are one request, unless they come with `retries` or `headers`
        of their own. An old copy is returned while it is revalidated in the background, or, up to
        `max_stale` seconds old, if the service cannot be reached.

        Raises:
            NotFound: nobody has this id.
        """
        # Keywords by name, and no `**options`: packing them would double what a hit costs.
        user = self._hit(user_id)  # type: ignore[arg-type]  # a UUID is not there, and not found
        if user is not None:
            return user
        wish = self._wish(max_stale, timeout, retries, headers)
        return (await self._cache.read(id_text(user_id), wish)).user

    def peek(self, user_id: Id) -> CachedUser | None:
        """Return the client's own copy of a user, however old, without asking: its `age` says."""
        # As it stands first, which is nearly always how it is kept: 0.1 µs less.
        return self._peek(user_id) or self._peek(id_text(user_id))  # type: ignore[arg-type]

    async def get_with_etag(self, user_id: Id, **options: Unpack[CallOptions]) -> tuple[User, str]:
        """Return a user as the service has it now, and the ETag that a write takes as `if_version`.

        Raises:
            NotFound: nobody has this id.
        """
        asked = self._cache.asking()
        floor = self._cache.floor(id_text(user_id))
        call = Call("users.get", "GET", user_path(user_id), min_version=floor, **options)
        answer = await self._calls.send(call)
        fetched = fetched_user(answer)
        self._cache.keep(fetched, asked)
        return fetched.user, answer.known_etag()

    async def get_many(
        self,
        ids: Iterable[Id],
        *,
        max_stale: float | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - the call's deadline
        retries: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> BatchOfUsers:
        """Return the users that exist, in the order of `ids` and once each, and who is `missing`.

        Each comes from the client's own copy while that is fresh, as at `get`; what is lacking is
        asked for 1000 at a time. `timeout` is the deadline for all of them.
        """
        unique = list(dict.fromkeys(map(id_text, ids)))
        wish = self._wish(max_stale, timeout, retries, headers)
        found = await self._cache.read_many(unique, wish)
        entries = [found[user_id] for user_id in unique]
        users = [entry.user for entry in entries if isinstance(entry, CachedUser)]
        missing: list[str] = []
        if len(users) < len(entries):
            missing = [user_id for user_id in unique if isinstance(found[user_id], Nobody)]
        return BatchOfUsers(users=tuple(users), missing=tuple(missing))

    def _wish(
        self,
        max_stale: float | None,
        timeout: float | None,
        retries: int | None,
        headers: Mapping[str, str] | None,
    ) -> Wish:
        options = shared_wishes(retries, headers)
        return Wish(Use.READ, self._calls.deadline(timeout), max_stale, options)

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
        **options: Unpack[CreateOptions],
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
            **options: See `CreateOptions`.

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
        asked = self._cache.asking()
        call = Call("users.create", "POST", "/api/v1/users/", body=body, is_write=True, **options)
        return self._written(await self._calls.send(call), asked)

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
            VersionMismatch: the version is not that of `if_version`.
        """
        body = UserUpdate(
            name=name, email=email, phone=phone, external_id=external_id, locale=locale
        )
        asked = self._cache.asking()
        answer = await self._writes.send("users.update", "PATCH", user_id, options, body=body)
        return self._written(answer, asked)

    def _written(self, answer: Answer, asked: Asked) -> User:
        """Return what a write has answered, and keep it, unless that was said long ago."""
        fetched = fetched_user(answer)
        if answer.is_replayed:
            self._cache.invalidate(fetched.user.id)
        else:
            self._cache.keep(fetched, asked)
        return fetched.user

    async def delete(self, user_id: Id, **options: Unpack[WriteOptions]) -> None:
        """Erase a user's personal data, for good.

        Raises:
            NotFound: nobody has this id.
            VersionMismatch: the version is not that of `if_version`.
        """
        await self._writes.send("users.delete", "DELETE", user_id, options)
        self._cache.erased(id_text(user_id))

    async def lift_suppression(self, user_id: Id, **options: Unpack[WriteOptions]) -> None:
        """Let mail be tried again to an address that a hard bounce has suppressed.

        Raises:
            NotFound: nobody has this id.
            VersionMismatch: the version is not that of `if_version`.
        """
        await self._writes.send(
            "users.lift_suppression", "DELETE", user_id, options, rest="/suppression"
        )

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
            VersionMismatch: the version is not that of `if_version`.
        """
        body = PasswordUpdate(password=password, current_password=current_password)
        await self._writes.send(
            "users.set_password", "PUT", user_id, options, rest="/password", body=body
        )
