"""The HTTP of credentials."""

from __future__ import annotations

from litestar import Router, put
from litestar.params import FromPath, JSONBody
from litestar.response.base import ASGIResponse
from user_service_schemas import ErrorCode, PasswordUpdate

from ..http.answers import HTTPRequest, answer
from ..http.idempotency import Idempotency
from ..http.operations import operation
from ..http.requests import if_match, user_id_of
from .service import Credentials


def credentials_router(credentials: Credentials, idempotency: Idempotency) -> Router:
    """Return the routes of credentials."""

    @put(
        "/users/{user_id:str}/password",
        **operation(
            "set_password",
            "Set a password",
            None,
            ErrorCode.USER_NOT_FOUND,
            ErrorCode.INVALID_CREDENTIALS,
            body=PasswordUpdate,
            example={"password": "Another-Pass-456"},
            writes_document=True,
            etag=False,
            description="With `current_password`, only if that is the current one.",
        ),
    )
    async def set_password(
        request: HTTPRequest, user_id: FromPath[str], data: JSONBody[PasswordUpdate]
    ) -> ASGIResponse:
        subject = user_id_of(user_id)
        return await idempotency.run(
            request,
            lambda _: answer(None, "Password set"),
            lambda recorder: credentials.set_password(subject, data, if_match(request), recorder),
        )

    return Router("/", route_handlers=[set_password])
