"""The HTTP of deliveries."""

from __future__ import annotations

from litestar import Router, post
from litestar.params import JSONBody
from user_service_schemas import Decision, ResolveDeliveries, Scope

from ..http.answers import ReadyAnswer, answer
from ..http.bodies import MAX_BATCH_BODY
from ..http.operations import operation
from .service import Deliveries


def deliveries_router(deliveries: Deliveries) -> Router:
    """Return the routes of deliveries."""

    @post(
        "/resolve",
        request_max_body_size=MAX_BATCH_BODY,
        **operation(
            "resolve_deliveries",
            "Ask whether a message may go to each recipient now",
            {200: list[Decision]},
            body=ResolveDeliveries,
            example={
                "channel": "push",
                "user_ids": ["01a205c7-a743-7a16-a135-c839ba84936e"],
                "category": "marketing",
                "explain": True,
            },
            description="One decision for each id, in their order: `allow`, with where to; `defer`,"
            " to ask again at `deferred_until`; or `suppress`. The first rule that holds decides,"
            " and is the `reason`.",
            scope=Scope.USERS_READ,
        ),
    )
    async def resolve_deliveries(data: JSONBody[ResolveDeliveries]) -> ReadyAnswer:
        return answer(await deliveries.resolve(data), "Deliveries resolved")

    return Router("/deliveries", route_handlers=[resolve_deliveries])
