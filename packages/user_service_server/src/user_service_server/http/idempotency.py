"""Idempotency-Key: a write that is repeated with the same key happens once.

As Stripe has it: the answer is recorded in the transaction of the write, so that whoever does not
know whether a write happened can repeat it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable
from typing import TypeVar

from user_service_schemas import FieldError

from ..errors import IdempotencyKeyReused, Invalid, ServiceError
from ..metrics import Metrics
from ..settings import Settings
from ..storage import recorded_answers
from ..storage.database import Database
from ..storage.recorded_answers import AlreadyAnswered, AnswerKey, RecordedAnswer, Recorder
from .answers import NO_STORE, HTTPRequest, ReadyAnswer, json_answer
from .callers import caller_of
from .requests import header

T = TypeVar("T")

PRUNED_AT_ONCE = 1000
HEADER = "Idempotency-Key"
_KEY = re.compile(r"[\x21-\x7e]([\x20-\x7e]{0,253}[\x21-\x7e])?")
_KEPT_HEADERS = (b"etag", b"location")


class Idempotency:
    """Runs writes, and answers repeats with what was recorded."""

    def __init__(self, settings: Settings, database: Database, metrics: Metrics) -> None:
        # The first keys new digests; one that was replaced is tried, too.
        said = [settings.secret_key, *filter(None, [settings.secret_key_previous])]
        self._secrets = [secret.encode() for secret in said]
        self._database = database
        self._replayed = metrics.idempotent_replays

    async def run(
        self,
        request: HTTPRequest,
        render: Callable[[T], ReadyAnswer],
        work: Callable[[Recorder], Awaitable[T]],
        *,
        is_costly: bool = False,
    ) -> ReadyAnswer:
        """Do the work and render its result, unless that was done before under the same key.

        The write itself looks whether it was; what is costly before it, as the hash of a password,
        is worth a look of its own.

        Raises:
            Invalid: the key is empty, longer than 255 characters, or not printable ASCII.
            IdempotencyInProgress: the first request with this key is still under way.
            IdempotencyKeyReused: the first one asked for something else.
        """
        caller = caller_of(request)
        key = header(request.scope, b"idempotency-key")
        if key is None:
            return render(await work(Recorder(caller.actor)))
        if not _KEY.fullmatch(key):
            raise Invalid(
                FieldError(field=HEADER, message="Expected 1 to 255 printable characters.")
            )
        digests = [_digest(secret, request, await request.body()) for secret in self._secrets]
        answer = await self._find(caller.name, key) if is_costly else None
        if answer is None:
            recorded = AnswerKey(
                caller.name, key, lambda result: _recorded(digests[0], render(result))
            )
            try:
                return render(await work(Recorder(caller.actor, recorded)))
            except AlreadyAnswered as already:
                answer = already.answer
            except ServiceError:
                # What refuses it may be what the first request has done, as a new password does.
                answer = await self._find(caller.name, key)
                if answer is None:
                    raise
        return self._replay(answer, digests)

    async def _find(self, caller: str, key: str) -> RecordedAnswer | None:
        async with self._database.reading() as connection:
            return await recorded_answers.find(connection, caller, key)

    async def prune(self) -> int:
        """Delete a batch of answers that are no longer kept; returns how many."""
        async with self._database.reading() as connection:
            return await recorded_answers.prune(connection, PRUNED_AT_ONCE)

    def _replay(self, answer: RecordedAnswer, digests: list[bytes]) -> ReadyAnswer:
        if not any(hmac.compare_digest(answer.digest, digest) for digest in digests):
            raise IdempotencyKeyReused
        self._replayed.inc()
        replayed = ("Idempotency-Replayed", "true")
        return json_answer(answer.status, answer.body, NO_STORE, *answer.headers, replayed)


def _recorded(digest: bytes, response: ReadyAnswer) -> RecordedAnswer:
    return RecordedAnswer(
        digest=digest,
        status=response.status,
        headers=[
            (name.decode(), value.decode("latin-1"))
            for name, value in response.headers
            if name in _KEPT_HEADERS
        ],
        body=response.body,
    )


def _digest(secret: bytes, request: HTTPRequest, body: bytes) -> bytes:
    """Digest what is asked: method, path, condition and body."""
    asked = (request.method, request.scope["path"], header(request.scope, b"if-match") or "")
    message = b"\0".join([*(part.encode() for part in asked), body])
    return hmac.digest(secret, message, hashlib.sha256)
