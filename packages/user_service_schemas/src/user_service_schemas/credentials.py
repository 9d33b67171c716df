"""Whether a password is a user's."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from ._base import Request, Response
from .fields import Email


class VerifyCredentials(Request, frozen=True):
    """Ask whose email and password these are. Any password is judged, the empty one, too."""

    email: Email
    password: Annotated[
        str,
        Meta(
            max_length=1024,
            description="At most 1024 bytes.",
            extra={"expected": "a password of at most 1024 bytes"},
            extra_json_schema={"format": "password"},
        ),
    ]

    def __post_init__(self) -> None:
        if len(self.password.encode("utf-8", "surrogatepass")) > 1024:
            raise ValueError("The password has more than 1024 bytes")


class VerifiedUser(Response, frozen=True):
    """Whose they are."""

    user_id: str
