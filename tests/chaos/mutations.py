"""The rules of the cache, each taken out of the server: a plugin for `pytest -p` in a subprocess.

The environment variable `WITHOUT` names the rule; nothing is taken out where it is not set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping

from sqlalchemy import text
from user_service_server.storage import cache, documents, state
from user_service_server.storage.cache import Announcement, DocumentCache, Outcome
from user_service_server.storage.documents import Documents
from user_service_server.storage.state import StateWatcher


def _changed(source: str, pattern: str, replacement: str) -> str:
    changed, times = re.subn(pattern, replacement, source, flags=re.DOTALL)
    assert times == 1, f"{pattern} is not in the source once"
    return changed


def _announcement() -> None:
    cache._ANNOUNCE = "return 'OK'"


def _lease() -> None:
    # What a version alone would guard: a fill takes every place that holds nothing newer.
    cache._FILL = """
    local stored = 0
    for i, key in ipairs(KEYS) do
      local held = redis.pcall('GET', key) or ''
      if type(held) == 'string' then
        local cached = tonumber(string.match(held, '^D(%d+)') or '0')
        if cached <= tonumber(string.match(ARGV[3 * i - 1], '^D(%d+)')) then
          redis.call('SET', key, ARGV[3 * i - 1], 'PX', ARGV[3 * i])
          stored = stored + 1
        end
      end
    end
    return stored
    """


def _last_writer() -> None:
    cache._PUBLISH = _changed(cache._PUBLISH, "others = true", "")


def _highest_version() -> None:
    cache._PUBLISH = _changed(cache._PUBLISH, "redis.call\\('HSET'[^\n]*", "")


def _conclude_never_raises() -> None:
    conclude = documents._CONCLUDE
    conclude.text = _changed(conclude.text, r"AND NOT raised_at BETWEEN[^\n]*", "AND false")


def _never_left_behind() -> None:
    async def leave_behind(
        _self: StateWatcher, _generations: Mapping[int, int], _reason: str
    ) -> None:
        pass

    StateWatcher.leave_behind = leave_behind  # type: ignore[assignment, method-assign]


def _strangers_are_believed() -> None:
    source = _changed(state._RECOGNISE.text, r"WHERE is_stranger", "WHERE false")
    state._RECOGNISE = text(source)


def _recent_look() -> None:
    StateWatcher.is_outdated = False  # type: ignore[assignment, method-assign]


def _quiet_time() -> None:
    def is_quiet(_self: StateWatcher, _bucket: int) -> bool:
        return False

    StateWatcher.is_quiet = is_quiet  # type: ignore[assignment, method-assign]


def _detached_futures() -> None:
    def forget_flights(_self: Documents, _ids: Iterable[str]) -> None:
        pass

    Documents.forget_flights = forget_flights  # type: ignore[assignment, method-assign]


def _publish_with(
    change: Callable[[Announcement, Mapping[str, Outcome]], Mapping[str, Outcome]],
) -> None:
    publish = DocumentCache.publish

    async def publish_changed(
        self: DocumentCache, announcement: Announcement, outcomes: Mapping[str, Outcome]
    ) -> set[int]:
        return await publish(self, announcement, change(announcement, outcomes))

    DocumentCache.publish = publish_changed  # type: ignore[method-assign]


def _quiet_announcement() -> None:
    def forget(
        announcement: Announcement, outcomes: Mapping[str, Outcome]
    ) -> Mapping[str, Outcome]:
        for said in announcement.buckets.values():
            said.quiet = False
        return outcomes

    _publish_with(forget)


def _deleted_version() -> None:
    _publish_with(lambda _announcement, said: {i: o for i, o in said.items() if o.document})


RULES: Mapping[str, Callable[[], None]] = {
    "announcement": _announcement,
    "lease": _lease,
    "last_writer": _last_writer,
    "highest_version": _highest_version,
    "generation_unannounced": _conclude_never_raises,
    "generation_unpublished": _never_left_behind,
    "generation_stranger": _strangers_are_believed,
    "recent_look": _recent_look,
    "quiet_time": _quiet_time,
    "detached_futures": _detached_futures,
    "quiet_announcement": _quiet_announcement,
    "deleted_version": _deleted_version,
}

if rule := os.environ.get("WITHOUT"):
    RULES[rule]()
