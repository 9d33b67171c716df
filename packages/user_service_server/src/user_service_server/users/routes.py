"""The HTTP of users."""

from __future__ import annotations

import re

import msgspec
from litestar import Router, delete, get, post, route
from litestar.enums import HttpMethod, ScopeType
from litestar.params import FromPath, FromQuery, JSONBody
from litestar.types import HTTPScope, Receive, Send
from litestar.types import Scope as ASGIScope
from user_service_schemas import (
    BatchOfUsers,
    BatchUsers,
    CreateUser,
    ErrorCode,
    FoundUsers,
    LookupUsers,
    Page,
    Scope,
    User,
    UserUpdate,
)

from ..http.answers import (
    HTTPRequest,
    ReadyAnswer,
    answer,
    document_answer,
    documents_answer,
)
from ..http.bodies import MAX_BATCH_BODY
from ..http.callers import Gate
from ..http.idempotency import Idempotency
from ..http.observation import Observation, Observed
from ..http.operations import Operation, operation
from ..http.requests import (
    UUID_PATTERN,
    Limit,
    decode_cursor,
    encode_cursor,
    header,
    if_match,
    min_version,
    user_id_of,
)
from ..storage.documents import Documents
from .profile import judge_profile
from .service import Users

_SAMPLE = {
    "name": "John Doe",
    "email": "john@example.com",
    "password": "StrongPass123!",
    "preferences": {"email": True, "push": False},
}


GET_USER = operation(
    "get_user",
    "Retrieve a user by id",
    User,
    ErrorCode.USER_NOT_FOUND,
    reads_document=True,
    scope=Scope.USERS_READ,
)
_USER = re.compile(f"/api/v1/users/({UUID_PATTERN})")


async def answer_user(documents: Documents, scope: HTTPScope, user_id: str) -> ReadyAnswer:
    """Answer with a user; raises as `Documents.get` does, and `Invalid`."""
    document = await documents.get(user_id, min_version(scope))
    held = header(scope, b"if-none-match")
    return document_answer(held, document, documents.etag(document.version))


class DirectUsers:
    """Answers the most frequent request, a user by id, past Litestar, which costs half of it.

    Whatever else is asked for is left to the observed router, where the same route is found again:
    by HEAD, by what is written otherwise (an id in capitals, a slash at the end), and by OpenAPI.
    """

    def __init__(self, observation: Observation, gate: Gate, documents: Documents) -> None:
        self._observation = observation
        self._gate = gate
        self._documents = documents
        self._operation: Operation = GET_USER["opt"]["operation"]

    async def __call__(self, scope: ASGIScope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == ScopeType.WEBSOCKET or scope["method"] != HttpMethod.GET:
            return await self._observation(scope, receive, send)
        asked = _USER.fullmatch(scope["path"])
        if asked is None:
            return await self._observation(scope, receive, send)
        scope["path_template"] = "/api/v1/users/{user_id}"
        observed = Observed(self._observation, scope)
        try:
            await self._gate.admit(scope, self._operation)
            answered = await answer_user(self._documents, scope, asked[1])
            # By itself, and not through the answer: each coroutine between is 1 µs.
            observed.status = answered.status
            headers = answered.headers + observed.headers()
            await send(
                {"type": "http.response.start", "status": answered.status, "headers": headers}
            )
            await send({"type": "http.response.body", "body": answered.body, "more_body": False})
        except Exception as error:  # noqa: BLE001 - as around the app
            await observed.fail(error, receive, send)
        finally:
            observed.end()


def users_router(users: Users, documents: Documents, idempotency: Idempotency) -> Router:
    """Return the routes of users."""

    @post(
        "/",
        **operation(
            "create_user",
            "Register a user",
            {201: User},
            ErrorCode.EMAIL_TAKEN,
            ErrorCode.EXTERNAL_ID_TAKEN,
            body=CreateUser,
            judge=users.judge_registration,
            is_write=True,
            example=_SAMPLE,
            description="Preferences that are not named are: email and push on, no quiet hours.",
            scope=Scope.USERS_WRITE,
        ),
    )
    async def create_user(request: HTTPRequest, data: JSONBody[CreateUser]) -> ReadyAnswer:
        def render(user: User) -> ReadyAnswer:
            headers = [
                ("Location", f"/api/v1/users/{user.id}"),
                ("ETag", documents.etag(user.version)),
            ]
            return answer(user, "User registered", status=201, headers=headers)

        return await idempotency.run(
            request, render, lambda recorder: users.register(data, recorder), is_costly=True
        )

    @get("/{user_id:str}", **GET_USER)
    async def get_user(request: HTTPRequest, user_id: FromPath[str]) -> ReadyAnswer:
        return await answer_user(documents, request.scope, user_id_of(user_id))

    @get(
        "/",
        **operation(
            "list_users",
            "List users, oldest registration first",
            Page[User],
            page=True,
            scope=Scope.USERS_LIST,
        ),
    )
    async def list_users(limit: Limit = 50, cursor: FromQuery[str | None] = None) -> ReadyAnswer:
        position = decode_cursor("users", cursor, UUID_PATTERN)
        found = await users.list_after(position, limit + 1)
        more = len(found) > limit
        page = Page[User](
            items=tuple(found[:limit]),
            next_cursor=encode_cursor("users", found[limit - 1].id) if more else None,
        )
        return answer(page, "Users listed")

    @post(
        "/lookup",
        **operation(
            "lookup_users",
            "Find users by email, phone or external id",
            FoundUsers,
            body=LookupUsers,
            example={"email": "john@example.com"},
            scope=Scope.USERS_READ,
        ),
    )
    async def lookup_users(data: JSONBody[LookupUsers]) -> ReadyAnswer:
        return answer(FoundUsers(users=tuple(await users.lookup(data))), "Users looked up")

    @post(
        "/batch",
        request_max_body_size=MAX_BATCH_BODY,
        **operation(
            "batch_users",
            "Retrieve up to 1000 users by id",
            BatchOfUsers,
            body=BatchUsers,
            example={"ids": ["01a205c7-a743-7a16-a135-c839ba84936e"]},
            scope=Scope.USERS_READ,
        ),
    )
    async def batch_users(data: JSONBody[BatchUsers]) -> ReadyAnswer:
        ids = list(dict.fromkeys(user_id.lower() for user_id in data.ids))
        found = await users.get_many(ids)
        missing = msgspec.json.encode([user_id for user_id in ids if user_id not in found])
        bodies = [found[user_id].body for user_id in ids if user_id in found]
        rest = b',"missing":' + missing
        return documents_answer("users", bodies, rest, "Users retrieved", documents.tag)

    @route(
        "/{user_id:str}",
        http_method=["PATCH", "PUT"],
        **operation(
            "update_user",
            "Update a profile",
            User,
            ErrorCode.USER_NOT_FOUND,
            ErrorCode.EMAIL_TAKEN,
            ErrorCode.EXTERNAL_ID_TAKEN,
            body=UserUpdate,
            judge=judge_profile,
            example={"phone": "+48221234567"},
            writes_document=True,
            description="What is omitted keeps its value, null clears. PUT merges, too.",
            scope=Scope.USERS_WRITE,
        ),
    )
    async def update_user(
        request: HTTPRequest, user_id: FromPath[str], data: JSONBody[UserUpdate]
    ) -> ReadyAnswer:
        def render(user: User) -> ReadyAnswer:
            return answer(user, "User updated", headers=[("ETag", documents.etag(user.version))])

        subject = user_id_of(user_id)
        return await idempotency.run(
            request,
            render,
            lambda recorder: users.update(subject, data, if_match(request), recorder),
        )

    @delete(
        "/{user_id:str}",
        **operation(
            "delete_user",
            "Erase a user",
            None,
            ErrorCode.USER_NOT_FOUND,
            writes_document=True,
            etag=False,
            description="Personal data is gone; that the id existed stays.",
            scope=Scope.USERS_WRITE,
        ),
    )
    async def delete_user(request: HTTPRequest, user_id: FromPath[str]) -> ReadyAnswer:
        subject = user_id_of(user_id)
        return await idempotency.run(
            request,
            lambda _: answer(None, "User erased"),
            lambda recorder: users.erase(subject, if_match(request), recorder),
        )

    return Router(
        "/users",
        route_handlers=[
            create_user,
            get_user,
            list_users,
            lookup_users,
            batch_users,
            update_user,
            delete_user,
        ],
    )
