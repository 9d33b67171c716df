"""`client.credentials`: whose email and password these are."""

from __future__ import annotations

from typing import Unpack

import msgspec
from user_service_schemas import Envelope, VerifiedUser, VerifyCredentials

from user_service_client._calls import Call, CallOptions, Calls

_VERIFIED = msgspec.json.Decoder(Envelope[VerifiedUser])


class Credentials:
    """Passwords, judged by the service: nothing of them is kept here."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    async def verify(self, email: str, password: str, **options: Unpack[CallOptions]) -> str:
        """Return the id of the user whose email and password these are.

        It changes nothing, so that it is tried again when no answer came; what the service has
        answered is final, and is not kept.

        Raises:
            Unauthenticated: with the code `invalid_credentials`, the password is wrong, or there
                is no such user, or none with a password: nobody is told which. With
                `unauthenticated`, it is the service key that is wrong.
            RateLimited: too many wrong passwords for this email, or too many calls.
        """
        body = VerifyCredentials(email=email, password=password)
        call = Call(
            "credentials.verify", "POST", "/api/v1/credentials/verify", body=body, **options
        )
        return (await self._calls.send(call)).data(_VERIFIED).user_id
