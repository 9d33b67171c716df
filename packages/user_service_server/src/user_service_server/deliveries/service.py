"""The decisions: the rules of the schemas, on the documents of the recipients."""

from __future__ import annotations

from datetime import UTC, datetime

from user_service_schemas import Decision, ResolveDeliveries, check_delivery, decide

from ..settings import Settings
from ..storage.document import decode_user
from ..storage.documents import Documents


class Deliveries:
    """What senders ask before they send."""

    def __init__(self, settings: Settings, documents: Documents) -> None:
        self._catalogue = settings.categories
        self._documents = documents

    async def resolve(self, request: ResolveDeliveries) -> list[Decision]:
        """Decide for each recipient, in the order of the request, repeated ones too.

        Takes one round trip to Redis, and one statement for all that is not cached.

        Raises:
            RuleViolation: the channel, category or priority is not for senders to ask for.
        """
        check_delivery(request.channel, request.category, request.priority, self._catalogue)
        at = request.at or datetime.now(UTC)
        ids = [user_id.lower() for user_id in request.user_ids]
        found = await self._documents.get_many(list(dict.fromkeys(ids)))
        decisions = {
            user_id: decide(
                decode_user(found[user_id].body) if user_id in found else None,
                request.channel,
                at,
                category=request.category,
                priority=request.priority,
                app=request.app,
                explain=request.explain,
                user_id=user_id,
            )
            for user_id in dict.fromkeys(ids)
        }
        return [decisions[user_id] for user_id in ids]
