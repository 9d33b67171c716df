"""Reads documents from a streaming replica of Postgres, as far as it shows all that is known here.

What is known is what the change feed brings from the primary: a look at it at which no change waits
for a position says that all that was acknowledged before has one, and the last of them is what the
replica has to show, in the very statement that reads. What this process wrote itself since such a
look is read from the primary. So a replica that lags, stands still or is another one's costs a
statement, and nobody reads what is older than the last look and `KNOWN_FOR`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import structlog
from sqlalchemy import select
from user_service_schemas import Change

from ..logs import describe
from ..metrics import Metrics
from ..periodic import Periodic
from ..settings import Settings
from .database import checked_out, create_engine, translated
from .document import Document, DocumentShape
from .state import StateWatcher
from .tables import change_feed, service_state

KNOWN_FOR = 0.3
"""Seconds for which a look at the primary counts: what others wrote since may not be read."""
PATIENCE = 0.25
"""Seconds that a read waits for the replica, once: then nobody does until it is well again."""
PROBE_INTERVAL = 0.2
FILL_WITHIN = 3.0
"""Seconds after which a document is not cached any more: as long as a lease lives."""

_log = structlog.get_logger()

_PROBE = select(change_feed.c.last_position, service_state.c.epoch).join_from(
    change_feed, service_state, change_feed.c.id == service_state.c.id
)


@dataclass(eq=False)
class _Unsettled:
    """Documents that wait for the next look at the primary, since `began`."""

    versions: Mapping[str, int]
    began: float = field(default_factory=time.monotonic)
    current: asyncio.Future[set[str]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Replica:
    """The replica as one process sees it; without `DATABASE_REPLICA_URL` it answers nothing."""

    def __init__(
        self, settings: Settings, state: StateWatcher, shape: DocumentShape, metrics: Metrics
    ) -> None:
        url = settings.database_replica_url
        self.is_used = url is not None
        self._engine = create_engine(
            settings, settings.database_pool_size, url=url
        ).execution_options(isolation_level="AUTOCOMMIT")
        self._state = state
        self._shape = shape
        self._reads = metrics.replica_reads
        self._probing = Periodic("replica", self._probe, lambda: PROBE_INTERVAL)
        self.latency: float | None = None
        """Seconds that the last probe took; None if it was not answered."""
        self.is_well = False
        """Whether it answers, and shows what is known."""
        self._position = 0
        self._looked_at = 0.0
        # By id: when this process wrote the user, if no look has begun since.
        self._written: dict[str, float] = {}
        # By id: the newest version that the feed brought since the last look, and since the one
        # before: what is unsettled is younger than that.
        self._seen: dict[str, int] = {}
        self._seen_before: dict[str, int] = {}
        self._unsettled: list[_Unsettled] = []

    def start(self) -> None:
        """Begin to look whether it is well."""
        if self.is_used:
            self._probing.start()

    def wrote(self, ids: Iterable[str]) -> None:
        """Note that this process has just written these users."""
        if self.is_used:
            self._written |= dict.fromkeys(ids, time.monotonic())

    def saw(self, changes: Iterable[Change]) -> None:
        """Note changes that the feed brought, in its order."""
        if self.is_used:
            self._seen |= {change.user_id: change.version for change in changes}

    def looked(self, began: float, position: int) -> None:
        """Note a look at the primary that began then (`time.monotonic`).

        All that was acknowledged before has a position, up to this one, and was seen.
        """
        self._position, self._looked_at = position, began
        self._written = {i: at for i, at in self._written.items() if at >= began}
        waiting, self._unsettled = self._unsettled, []
        for unsettled in waiting:
            if unsettled.began > began:
                self._unsettled.append(unsettled)
            elif not unsettled.current.done():
                versions = unsettled.versions.items()
                unsettled.current.set_result({i for i, v in versions if v >= self._newest(i)})
        self._seen_before, self._seen = self._seen, {}

    def _newest(self, user_id: str) -> int:
        return max(self._seen.get(user_id, 0), self._seen_before.get(user_id, 0))

    async def read(self, ids: Iterable[str]) -> dict[str, Document]:
        """Return the documents that the replica may answer with: perhaps none.

        Who is not there is left out: the replica cannot tell whether somebody is nobody.
        """
        if not (self.is_well and self._knows):
            return {}
        wanted = [user_id for user_id in ids if user_id not in self._written]
        try:
            async with asyncio.timeout(PATIENCE):
                with translated():
                    async with checked_out(self._engine) as connection:
                        seen = await self._shape.read_snapshot(connection, wanted)
        except Exception as error:  # noqa: BLE001 - whatever it is, the primary can tell
            self._leave(describe(error)["error"])
            self._reads.labels("failed").inc(len(wanted))
            return {}
        if seen is None:
            self._reads.labels("absent").inc(len(wanted))
            return {}
        if not (self._shows(seen.position, seen.epoch) and self._knows):
            self._leave("behind")
            self._reads.labels("behind").inc(len(wanted))
            return {}
        self._reads.labels("used").inc(len(seen.documents))
        self._reads.labels("absent").inc(len(wanted) - len(seen.documents))
        return seen.documents

    @property
    def _knows(self) -> bool:
        """Whether this process knows of the primary what it has to, to believe the replica."""
        return time.monotonic() - self._looked_at < KNOWN_FOR

    def _shows(self, position: int, epoch: str) -> bool:
        return position >= self._position and epoch == self._state.epoch

    def settle(self, versions: Mapping[str, int]) -> asyncio.Future[set[str]]:
        """Return, later, of which of these documents that were just read there is nothing newer.

        At the next look at the primary, that is: what lags by a moment is good enough for who asked
        for it, and cached it would be read for minutes. To be called before anything is awaited.
        """
        unsettled = _Unsettled(versions)
        self._unsettled.append(unsettled)
        return unsettled.current

    def _leave(self, reason: str) -> None:
        if self.is_well:
            self.is_well = False
            _log.warning("replica.left", reason=reason)

    async def _probe(self) -> None:
        known, began = self._position, time.monotonic()
        try:
            async with asyncio.timeout(PATIENCE):
                with translated():
                    async with self._engine.connect() as connection:
                        position, epoch = (await connection.execute(_PROBE)).one()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is not well
            self.latency = None
            self._leave(describe(error)["error"])
            return
        self.latency = time.monotonic() - began
        if position < known or epoch != self._state.epoch:
            self._leave("behind")
        elif not self.is_well:
            self.is_well = True
            _log.warning("replica.used")

    async def close(self) -> None:
        """Stop looking."""
        await self._probing.stop()
        await self._engine.dispose()
