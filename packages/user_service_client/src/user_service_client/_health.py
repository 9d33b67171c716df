"""What the service says of itself and of what it depends on."""

from __future__ import annotations

import msgspec
from user_service_schemas import Envelope, Health

from user_service_client._answers import Answer
from user_service_client.errors import DecodeError

_HEALTH = msgspec.json.Decoder(Envelope[Health])


def read_health(answer: Answer) -> Health:
    """Return what the service says, also when that is a 503 with which it says `unhealthy`."""
    try:
        return answer.data(_HEALTH)
    except DecodeError:
        if answer.status == 503:  # a proxy's, which says nothing of the dependencies
            raise answer.error() from None
        raise
