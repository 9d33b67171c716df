"""The HTTP of feedback and of suppressed addresses."""

from __future__ import annotations

from litestar import Router, delete, post
from litestar.params import FromPath, JSONBody
from user_service_schemas import ErrorCode, FeedbackResult, ReportFeedback, Scope

from ..http.answers import HTTPRequest, ReadyAnswer, answer
from ..http.bodies import MAX_FEEDBACK_BODY
from ..http.callers import caller_of
from ..http.idempotency import Idempotency
from ..http.operations import operation
from ..http.requests import if_match, user_id_of
from ..storage.documents import Documents
from .service import Feedback

_SAMPLE = {
    "items": [
        {
            "channel": "push",
            "token": "fcm_device_token_123",
            "reason": "unregistered",
            "at": "2026-01-02T03:04:05Z",
        },
        {
            "channel": "email",
            "address": "john@example.com",
            "reason": "soft_bounce",
            "at": "2026-01-02T03:04:05Z",
        },
    ]
}


def feedback_router(feedback: Feedback, documents: Documents, idempotency: Idempotency) -> Router:
    """Return the routes of feedback."""

    @post(
        "/feedback",
        request_max_body_size=MAX_FEEDBACK_BODY,
        **operation(
            "report_feedback",
            "Report what providers said of tokens and addresses",
            tuple[FeedbackResult, ...],
            ErrorCode.RATE_LIMITED,
            body=ReportFeedback,
            example=_SAMPLE,
            is_write=True,
            description="One result for each item, in order: `applied`, `ignored` (seen since,"
            " known already, or a reason that is only counted) or `unknown`. An `at` in the future"
            " counts as now. Reporting twice changes nothing.",
            scope=Scope.FEEDBACK_WRITE,
        ),
    )
    async def report_feedback(request: HTTPRequest, data: JSONBody[ReportFeedback]) -> ReadyAnswer:
        return await idempotency.run(
            request,
            lambda results: answer(results, "Feedback taken"),
            lambda recorder: feedback.report(data.items, caller_of(request).name, recorder),
            is_costly=True,
        )

    @delete(
        "/users/{user_id:str}/suppression",
        **operation(
            "restore_address",
            "Let a suppressed email address be tried again",
            None,
            ErrorCode.USER_NOT_FOUND,
            writes_document=True,
            description="Changes nothing where the address is not suppressed.",
            scope=Scope.USERS_WRITE,
        ),
    )
    async def restore_address(request: HTTPRequest, user_id: FromPath[str]) -> ReadyAnswer:
        def render(version: int) -> ReadyAnswer:
            return answer(None, "Address restored", headers=[("ETag", documents.etag(version))])

        subject = user_id_of(user_id)
        return await idempotency.run(
            request,
            render,
            lambda recorder: feedback.restore(subject, if_match(request), recorder),
        )

    return Router("/", route_handlers=[report_feedback, restore_address])
