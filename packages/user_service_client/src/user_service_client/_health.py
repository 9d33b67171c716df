"""What the service says of itself and of what it depends on."""

from __future__ import annotations

from datetime import datetime

import msgspec
from user_service_schemas import Envelope, Health

from user_service_client._answers import Answer
from user_service_client.errors import DecodeError

_HEALTH = msgspec.json.Decoder(Envelope[Health])


def read_health(answer: Answer, now: datetime) -> Health:
    """Return what the service says, also when that is a 503 with which it says `unhealthy`.

    Raises:
        ServerError: a proxy answered; `now` is what its `Retry-After` is compared with.
    """
    try:
        return answer.data(_HEALTH)
    except DecodeError:
        if answer.status == 503:  # a proxy's, which says nothing of the dependencies
            raise answer.error(now) from None
        raise
