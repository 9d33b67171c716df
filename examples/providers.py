"""A mail server and a push provider to try the workers with: `python examples/providers.py`.

SMTP is on port SMTP_PORT (2525), FCM's `messages:send` on HTTP_PORT (8025), where `GET /received`
shows what came. Nothing goes anywhere. What an address or a token begins with says what happens:

    nobody…   no such mailbox: 550 5.1.1
    blocked…  a policy, which says nothing about the mailbox: 550 5.7.1
    gone…     no such token: 404 UNREGISTERED
    bad…      a bad message: 400 INVALID_ARGUMENT
    busy…     not now, for the first time that it is tried: 451 4.3.2, or 503
    slow…     taken after a second and a half, unless the sender has gone by then
"""

from __future__ import annotations

import asyncio
import email
import os
import signal
from collections.abc import Mapping
from datetime import UTC, datetime

from aiohttp import web
from aiosmtpd.smtp import SMTP, Envelope, Session

SLOWLY = 1.5
_FCM_ERROR = "type.googleapis.com/google.firebase.fcm.v1.FcmError"
_REFUSALS: Mapping[str, tuple[int, str, str]] = {
    "gone": (404, "NOT_FOUND", "UNREGISTERED"),
    "bad": (400, "INVALID_ARGUMENT", "INVALID_ARGUMENT"),
    "busy": (503, "UNAVAILABLE", "UNAVAILABLE"),
}


class Providers:
    """Both providers, and what they have taken."""

    def __init__(self) -> None:
        self.mails: list[dict[str, str]] = []
        self.pushes: list[dict[str, str]] = []
        self._tried: set[str] = set()

    def _is_first(self, name: str) -> bool:
        is_first = name not in self._tried
        self._tried.add(name)
        return is_first

    async def handle_RCPT(  # noqa: N802 - aiosmtpd's name
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: object
    ) -> str:
        """Judge a recipient."""
        if address.startswith("nobody"):
            return "550 5.1.1 No such mailbox here"
        if address.startswith("blocked"):
            return "550 5.7.1 Not from you"
        if address.startswith("busy") and self._is_first(address):
            return "451 4.3.2 Try again"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(  # noqa: N802 - aiosmtpd's name
        self, _server: SMTP, _session: Session, envelope: Envelope
    ) -> str:
        """Take a message."""
        if any(address.startswith("slow") for address in envelope.rcpt_tos):
            await asyncio.sleep(SLOWLY)
        message = email.message_from_bytes(envelope.original_content or b"")
        for address in envelope.rcpt_tos:
            self.mails.append(
                {
                    "to": address,
                    "id": message["Message-ID"],
                    "subject": message["Subject"],
                    "at": datetime.now(UTC).isoformat(),
                }
            )
        return "250 OK"

    async def send(self, request: web.Request) -> web.Response:
        """Take a push, as FCM's `messages:send`."""
        message = (await request.json())["message"]
        token = str(message["token"])
        for beginning, (status, name, code) in _REFUSALS.items():
            if token.startswith(beginning) and (beginning != "busy" or self._is_first(token)):
                detail = {"@type": _FCM_ERROR, "errorCode": code}
                error = {"code": status, "message": name, "status": name, "details": [detail]}
                headers = {"Retry-After": "0"} if status == 503 else {}
                return web.json_response({"error": error}, status=status, headers=headers)
        if token.startswith("slow"):
            await asyncio.sleep(SLOWLY)
        tag = message["android"]["notification"]["tag"]
        self.pushes.append(
            {
                "token": token,
                "id": tag,
                "title": str(message["notification"]["title"]),
                "at": datetime.now(UTC).isoformat(),
            }
        )
        return web.json_response({"name": f"{request.path.rpartition('/')[0]}/messages/{tag}"})

    async def received(self, _request: web.Request) -> web.Response:
        """Show what came."""
        return web.json_response({"mails": self.mails, "pushes": self.pushes})


async def main() -> None:
    """Serve both until SIGTERM or SIGINT."""
    providers, loop = Providers(), asyncio.get_running_loop()
    host = os.environ.get("HOST", "127.0.0.1")
    smtp_port = int(os.environ.get("SMTP_PORT", "2525"))
    smtp = await loop.create_server(
        lambda: SMTP(providers, hostname="sink", enable_SMTPUTF8=True), host, smtp_port
    )
    app = web.Application()
    app.router.add_post("/v1/projects/{project}/messages:send", providers.send)
    app.router.add_get("/received", providers.received)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, int(os.environ.get("HTTP_PORT", "8025"))).start()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    await stopping.wait()
    smtp.close()
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main())
