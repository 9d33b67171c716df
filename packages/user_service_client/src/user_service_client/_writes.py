"""A write of a user: its condition, and what the cache learns from how it ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from user_service_schemas import ErrorCode, Request

from user_service_client._answers import Answer
from user_service_client._cache import DocumentCache, Tag
from user_service_client._calls import Call, Calls, Id, WriteOptions, id_text, user_path
from user_service_client.errors import (
    ApiError,
    MaybeProcessed,
    NotSent,
    UserServiceError,
    VersionMismatch,
)

_ANY_FORMAT = "0"
"""`If-Match` compares epoch and version, whatever the document's format."""


class Writes:
    """Makes writes of users, so that this client reads what it has written."""

    def __init__(self, calls: Calls, cache: DocumentCache) -> None:
        self._calls = calls
        self._cache = cache

    async def send(
        self,
        operation: str,
        method: str,
        user_id: Id,
        options: WriteOptions,
        *,
        rest: str = "",
        body: Request | None = None,
    ) -> Answer:
        """Write at the path of a user, or at `rest` below it, and return the answer."""
        subject = id_text(user_id)
        deadline: float | None = None
        if isinstance(options.get("if_version"), int):  # there may be a read before
            deadline = self._calls.deadline(options.get("timeout"))
        call = Call(
            operation,
            method,
            user_path(subject, rest),
            body=body,
            timeout=options.get("timeout"),
            retries=options.get("retries"),
            headers=options.get("headers"),
            is_write=True,
            idempotency_key=options.get("idempotency_key"),
            if_match=await self._condition(subject, options, deadline),
            deadline=deadline,
        )
        with self._heard(subject):
            answer = await self._calls.send(call)
        if answer.is_replayed or not self._learn(subject, answer.etag):
            self._cache.invalidate(subject)
        return answer

    def floor(self, user_id: Id) -> int:
        """Return the version of a user below which nothing is believed."""
        return self._cache.floor(id_text(user_id))

    async def _condition(
        self, user_id: str, options: WriteOptions, deadline: float | None
    ) -> str | None:
        version = options.get("if_version")
        if version is None or isinstance(version, str):
            return version
        entry = self._cache.peek(user_id)
        if entry is not None and entry.user.version == version:
            return entry.etag
        epoch = self._cache.epoch
        if epoch is None:
            # Nothing was read yet: a version alone does not say which epoch it is of.
            call = Call(
                "users.get",
                "GET",
                user_path(user_id),
                retries=options.get("retries"),
                headers=options.get("headers"),
                deadline=deadline,
            )
            with _before_the_write():
                answer = await self._calls.send(call)
            self._learn(user_id, answer.known_etag())
            epoch = self._cache.epoch
        return f'"{epoch}.{_ANY_FORMAT}.{version}"'

    @contextmanager
    def _heard(self, user_id: str) -> Iterator[None]:
        """Believe no copy of whom a failed write may have changed, or has shown to be another."""
        try:
            yield
        except VersionMismatch as error:
            if not self._learn(user_id, error.etag):
                self._cache.invalidate(user_id)
            raise
        except UserServiceError as error:
            is_gone = isinstance(error, ApiError) and error.code == ErrorCode.USER_NOT_FOUND
            if error.maybe_processed or is_gone:
                self._cache.invalidate(user_id)
            raise
        except BaseException:  # cancelled: it may be on its way
            self._cache.invalidate(user_id)
            raise

    def _learn(self, user_id: str, etag: str | None) -> bool:
        """Hear of the version that an ETag tells; returns whether it does."""
        tag = Tag.parse(etag)
        if tag is None:
            return False
        self._cache.heard_of(user_id, tag.version, tag.epoch)
        return True


@contextmanager
def _before_the_write() -> Iterator[None]:
    """Say of what fails that the write has certainly not happened."""
    try:
        yield
    except MaybeProcessed as error:
        raise NotSent(
            str(error),
            request_id=error.request_id,
            attempts=error.attempts,
            elapsed=error.elapsed,
        ) from error
    except UserServiceError as error:
        error.maybe_processed = False
        raise
