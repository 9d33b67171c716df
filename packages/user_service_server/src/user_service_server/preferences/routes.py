"""The HTTP of preferences."""

from __future__ import annotations

from litestar import Router, get, route
from litestar.params import FromPath, FromQuery, JSONBody
from litestar.types import ASGIApp
from user_service_schemas import (
    ErrorCode,
    Page,
    Preferences,
    PreferencesRevision,
    PreferencesUpdate,
    Scope,
)

from ..http.answers import PRIVATE, HTTPRequest, ReadyAnswer, answer, is_held, not_modified
from ..http.idempotency import Idempotency
from ..http.operations import operation
from ..http.requests import (
    Limit,
    decode_cursor,
    encode_cursor,
    header,
    if_match,
    min_version,
    user_id_of,
)
from ..storage.documents import Documents
from .service import PreferenceCenter

_SAMPLE = {
    "email": False,
    "push": True,
    "quiet_hours_start": "22:00",
    "quiet_hours_end": "07:00",
}


def preferences_router(
    preferences: PreferenceCenter, documents: Documents, idempotency: Idempotency
) -> Router:
    """Return the routes of preferences."""

    @get(
        "/",
        **operation(
            "get_preferences",
            "Retrieve notification preferences",
            Preferences,
            ErrorCode.USER_NOT_FOUND,
            reads_document=True,
            scope=Scope.USERS_READ,
        ),
    )
    async def get_preferences(request: HTTPRequest, user_id: FromPath[str]) -> ASGIApp:
        user = await documents.get_user(user_id_of(user_id), min_version(request.scope))
        etag = documents.etag(user.version)
        if is_held(header(request.scope, b"if-none-match"), etag):
            return not_modified(etag)
        return answer(
            user.preferences, "Preferences retrieved", headers=[("ETag", etag)], cache=PRIVATE
        )

    @route(
        "/",
        http_method=["PUT", "PATCH"],
        **operation(
            "update_preferences",
            "Update notification preferences",
            Preferences,
            ErrorCode.USER_NOT_FOUND,
            body=PreferencesUpdate,
            example=_SAMPLE,
            writes_document=True,
            description="Merges per field, category and channel: what is omitted keeps its value,"
            " null clears one.",
            scope=Scope.PREFERENCES_WRITE,
        ),
    )
    async def update_preferences(
        request: HTTPRequest, user_id: FromPath[str], data: JSONBody[PreferencesUpdate]
    ) -> ReadyAnswer:
        def render(result: tuple[Preferences, int]) -> ReadyAnswer:
            updated, version = result
            return answer(
                updated, "Preferences updated", headers=[("ETag", documents.etag(version))]
            )

        subject = user_id_of(user_id)
        return await idempotency.run(
            request,
            render,
            lambda recorder: preferences.update(subject, data, if_match(request), recorder),
        )

    @get(
        "/history",
        **operation(
            "list_preference_history",
            "List who changed which preference, newest first",
            Page[PreferencesRevision],
            ErrorCode.USER_NOT_FOUND,
            page=True,
            scope=Scope.USERS_READ,
        ),
    )
    async def list_preference_history(
        user_id: FromPath[str],
        limit: Limit = 50,
        cursor: FromQuery[str | None] = None,
    ) -> ReadyAnswer:
        position = decode_cursor("history", cursor, "[0-9]{1,18}")
        found = await preferences.history(
            user_id_of(user_id), None if position is None else int(position), limit + 1
        )
        more = len(found) > limit
        page = Page[PreferencesRevision](
            items=tuple(revision for _, revision in found[:limit]),
            next_cursor=encode_cursor("history", str(found[limit - 1][0])) if more else None,
        )
        return answer(page, "Preference history listed")

    return Router(
        "/users/{user_id:str}/preferences",
        route_handlers=[get_preferences, update_preferences, list_preference_history],
    )
