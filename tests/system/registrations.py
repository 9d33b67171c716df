"""Owns people who register and set up their devices, and what each of them was told."""

from __future__ import annotations

import asyncio
import time
from itertools import count
from types import TracebackType
from typing import Any, Self

import httpx
from user_service_server.embedded import EmbeddedPostgres

from .traffic import person
from .trouble import until

A_SECOND = 30
CALLERS = 6

# Each line is one user that was written by half, and what of it.
HALF_USERS = """
SELECT u.id, 'no preferences' FROM users u
WHERE u.deleted_at IS NULL AND NOT EXISTS (SELECT FROM preferences p WHERE p.user_id = u.id)
UNION ALL
SELECT u.id, 'no history' FROM users u
WHERE u.deleted_at IS NULL
AND NOT EXISTS (SELECT FROM preference_history h WHERE h.user_id = u.id AND h.version = 1)
UNION ALL
SELECT c.user_id, 'a preference was changed without history' FROM changes c
WHERE c.kind = 'preferences.updated' AND NOT EXISTS
(SELECT FROM preference_history h WHERE h.user_id = c.user_id AND h.version = c.version)
UNION ALL
SELECT h.user_id, 'a history without its change' FROM preference_history h
WHERE h.version > 1 AND NOT EXISTS
(SELECT FROM changes c WHERE c.user_id = h.user_id AND c.version = h.version)
UNION ALL
SELECT u.id, 'changes do not count up to the version' FROM users u
WHERE (SELECT array_agg(c.version ORDER BY c.version) FROM changes c WHERE c.user_id = u.id)
IS DISTINCT FROM (SELECT array_agg(v) FROM generate_series(1, u.version) v)
UNION ALL
SELECT c.user_id, 'changes of nobody' FROM changes c
WHERE NOT EXISTS (SELECT FROM users u WHERE u.id = c.user_id)
UNION ALL
SELECT c.user_id, 'devices and their registrations differ' FROM changes c
WHERE c.kind = 'device.registered' AND
NOT EXISTS (SELECT FROM devices d WHERE d.user_id = c.user_id)
UNION ALL
SELECT d.user_id, 'a device without its change' FROM devices d WHERE NOT EXISTS
(SELECT FROM changes c WHERE c.user_id = d.user_id AND c.kind = 'device.registered')
"""


class Registrations:
    """Thirty people a second who register, choose and add a device, until the block ends.

    Attributes:
        acknowledged: the newest document that each was shown, by id.
        unanswered: the emails of those who were never told whether they are registered.
        statuses: of all answers.
    """

    def __init__(self, url: str, prefix: str) -> None:
        self.acknowledged: dict[str, dict[str, Any]] = {}
        self.unanswered: set[str] = set()
        self.statuses: set[int] = set()
        self._url = url
        self._prefix = prefix
        self._numbers = count()
        self._end = asyncio.Event()
        self._callers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._callers = [asyncio.create_task(self._register()) for _ in range(CALLERS)]
        return self

    async def __aexit__(
        self,
        error_class: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end.set()
        await asyncio.gather(*self._callers)

    async def wait_for(self, number: int) -> None:
        """Return when this many more are registered."""
        goal = len(self.acknowledged) + number
        await until(lambda: len(self.acknowledged) >= goal, 20)

    async def _register(self) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=15) as http:
            while not self._end.is_set():
                next_at = time.monotonic() + CALLERS / A_SECOND
                await self._one(http, person(f"{self._prefix}{next(self._numbers)}"))
                await asyncio.sleep(max(0.0, next_at - time.monotonic()))

    async def _one(self, http: httpx.AsyncClient, body: dict[str, object]) -> None:
        email = str(body["email"])
        self.unanswered.add(email)
        try:
            answer = await http.post("/api/v1/users/", json=body)
            self.statuses.add(answer.status_code)
            if answer.status_code != 201:
                return
            self.unanswered.discard(email)
            user = answer.json()["data"]
            self.acknowledged[user["id"]] = user
            answer = await http.patch(
                f"/api/v1/users/{user['id']}/preferences", json={"push": False}
            )
            self.statuses.add(answer.status_code)
            if answer.status_code == 200:
                user = {**user, "preferences": answer.json()["data"], "version": 2}
                self.acknowledged[user["id"]] = user
            device = {"token": f"token of {email}", "platform": "android"}
            answer = await http.post(f"/api/v1/users/{user['id']}/devices", json=device)
            self.statuses.add(answer.status_code)
        except httpx.TransportError:
            return


async def assert_everybody_is_there(url: str, *told: Registrations) -> None:
    """Each acknowledged user can be read, as it was shown or newer; the others are whole or not."""
    async with httpx.AsyncClient(base_url=url, timeout=15) as http:
        for user_id, shown in [pair for one in told for pair in one.acknowledged.items()]:
            answer = await http.get(f"/api/v1/users/{user_id}")
            assert answer.status_code == 200, f"{shown} was lost"
            read = answer.json()["data"]
            assert read["version"] >= shown["version"]
            assert read["email"] == shown["email"]
            if shown["version"] == 2:
                assert read["preferences"] == shown["preferences"]
        for email in [email for one in told for email in one.unanswered]:
            answer = await http.post("/api/v1/users/lookup", json={"email": email})
            assert answer.status_code == 200
            for user in answer.json()["data"]["users"]:
                assert (await http.get(f"/api/v1/users/{user['id']}")).json()["data"] == user


def half_users(postgres: EmbeddedPostgres, database: str) -> str:
    """Return who was written by half, a line each."""
    socket = str(postgres.socket_dir)
    done = postgres.run("psql", "-h", socket, "-d", database, "-qtAc", HALF_USERS)
    assert done.returncode == 0, done.stderr
    return done.stdout
