"""The HTTP of credentials."""

from __future__ import annotations

from litestar import Router, post, put
from litestar.params import FromPath, JSONBody
from user_service_schemas import ErrorCode, PasswordUpdate, Scope, VerifiedUser, VerifyCredentials

from ..http.answers import HTTPRequest, ReadyAnswer, answer
from ..http.idempotency import Idempotency
from ..http.operations import Traffic, operation
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
            scope=Scope.CREDENTIALS_WRITE,
            traffic=Traffic.CREDENTIALS,
        ),
    )
    async def set_password(
        request: HTTPRequest, user_id: FromPath[str], data: JSONBody[PasswordUpdate]
    ) -> ReadyAnswer:
        subject = user_id_of(user_id)
        return await idempotency.run(
            request,
            lambda _: answer(None, "Password set"),
            lambda recorder: credentials.set_password(subject, data, if_match(request), recorder),
            is_costly=True,
        )

    @post(
        "/credentials/verify",
        **operation(
            "verify_credentials",
            "Ask whose email and password these are",
            VerifiedUser,
            ErrorCode.INVALID_CREDENTIALS,
            ErrorCode.RATE_LIMITED,
            body=VerifyCredentials,
            example={"email": "john@example.com", "password": "StrongPass123!"},
            description="The same answer, and the same work, for an unknown email, a user without a"
            " password, and a wrong one.",
            scope=Scope.CREDENTIALS_VERIFY,
            traffic=Traffic.CREDENTIALS,
        ),
    )
    async def verify_credentials(data: JSONBody[VerifyCredentials]) -> ReadyAnswer:
        user_id = await credentials.verify(data)
        return answer(VerifiedUser(user_id=user_id), "Credentials verified")

    return Router("/", route_handlers=[set_password, verify_credentials])
