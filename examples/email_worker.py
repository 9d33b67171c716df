"""Sends the jobs of `{email}:jobs` by SMTP: `python examples/email_worker.py`.

Of the environment, beside what `settings.py` reads:

    SMTP_HOST, SMTP_PORT    the relay: localhost, 2525
    SMTP_USER, SMTP_PASSWORD, SMTP_TLS=on   as the relay wants it; it then has STARTTLS
    MAIL_FROM               whom mail is from
"""

from __future__ import annotations

import asyncio
import re
import smtplib
import ssl
from collections.abc import Mapping
from contextlib import suppress
from email.message import EmailMessage

from jobs import Job, Queue
from settings import start
from user_service_client import UserServiceClient
from user_service_schemas import Channel, Decision, FeedbackItem
from worker import Pace, Refused, TryAgain, Worker

TIMEOUT = 10.0
_ENHANCED = re.compile(r"([245]\.\d{1,3}\.\d{1,3})\s")


class EmailWorker(Worker[str]):
    """Sends to the address that the User Service says, by a relay."""

    channel: Channel = "email"

    def __init__(
        self, client: UserServiceClient, queue: Queue, pace: Pace, environ: Mapping[str, str]
    ) -> None:
        super().__init__(client, queue, pace)
        self._relay = environ.get("SMTP_HOST", "localhost"), int(environ.get("SMTP_PORT", "2525"))
        self._login = environ.get("SMTP_USER", ""), environ.get("SMTP_PASSWORD", "")
        self._tls = ssl.create_default_context() if environ.get("SMTP_TLS") == "on" else None
        self._sender = environ.get("MAIL_FROM", "news@example.com")

    def targets(self, decision: Decision) -> Mapping[str, str]:
        # One message for a user, whichever address was theirs at the first attempt.
        return {} if decision.email is None else {"email": decision.email}

    async def send(self, job: Job, target: str) -> FeedbackItem | None:
        at = self.now()
        try:
            # A thread, which a cancelled task would leave behind: nobody cancels this one.
            await asyncio.to_thread(self._send, self._message(job, target), target)
        except smtplib.SMTPRecipientsRefused as error:
            refusal: tuple[int, bytes | str] = error.recipients[target]
        except smtplib.SMTPSenderRefused as error:  # our own set-up, or a limit
            raise TryAgain(f"smtp sender {error.smtp_code}") from None
        except smtplib.SMTPDataError as error:
            refusal = error.smtp_code, error.smtp_error
        except smtplib.SMTPNotSupportedError:
            raise Refused("smtp utf8") from None
        except ValueError:  # such as a line break in the title
            raise Refused("message") from None
        except (OSError, smtplib.SMTPException) as error:
            raise TryAgain(f"smtp {type(error).__name__}") from None
        else:
            return None
        code, said = refusal
        if code < 500:
            raise TryAgain(f"smtp {code}")
        text = said.decode(errors="replace") if isinstance(said, bytes) else said
        found = _ENHANCED.match(text)
        enhanced = found[1] if found else None
        feedback = self.client.feedback.from_smtp(code, enhanced, address=target, at=at)
        if feedback is None:
            raise Refused(f"smtp {code} {enhanced or ''}".rstrip())
        return feedback

    def _message(self, job: Job, address: str) -> EmailMessage:
        message = EmailMessage()
        # The same for each attempt: whoever gets two of them can tell.
        message["Message-ID"] = f"<{job.id}@{self._sender.rpartition('@')[2]}>"
        message["From"] = self._sender
        message["To"] = address
        message["Subject"] = job.title
        message.set_content(job.body)
        return message

    def _send(self, message: EmailMessage, address: str) -> None:
        smtp = smtplib.SMTP(*self._relay, timeout=TIMEOUT)
        try:
            if self._tls is not None:
                smtp.starttls(context=self._tls)
            if self._login[0]:
                smtp.login(*self._login)
            smtp.send_message(message, self._sender, [address])
            # It is sent by now: how the goodbye goes must not have it sent again.
            with suppress(OSError, smtplib.SMTPException):
                smtp.quit()
        finally:
            smtp.close()


if __name__ == "__main__":
    start("email", EmailWorker)
