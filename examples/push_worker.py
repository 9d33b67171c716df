"""Sends the jobs of `{push}:jobs` by FCM's HTTP v1 API: `python examples/push_worker.py`.

Of the environment, beside what `settings.py` reads:

    FCM_URL     https://fcm.googleapis.com/v1/projects/<project>, or a fake: `providers.py`
    FCM_TOKEN   an access token. Real ones last an hour; google-auth renews them
"""

from __future__ import annotations

from collections.abc import Mapping

import httpx
from jobs import Job, Queue
from settings import start
from user_service_client import UserServiceClient
from user_service_schemas import Channel, Decision, DeliveryDevice, FeedbackItem
from worker import Pace, Refused, TryAgain, Worker

TIMEOUT = 10.0


class PushWorker(Worker[DeliveryDevice]):
    """Sends to each of a user's devices."""

    channel: Channel = "push"

    def __init__(
        self, client: UserServiceClient, queue: Queue, pace: Pace, environ: Mapping[str, str]
    ) -> None:
        super().__init__(client, queue, pace)
        url = environ.get("FCM_URL", "http://localhost:8025/v1/projects/example")
        self._url = f"{url}/messages:send"
        token = environ.get("FCM_TOKEN")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.AsyncClient(timeout=TIMEOUT)

    async def run(self) -> None:
        async with self._http:
            await super().run()

    def targets(self, decision: Decision) -> Mapping[str, DeliveryDevice]:
        return {device.id: device for device in decision.devices}

    async def send(self, job: Job, target: DeliveryDevice) -> FeedbackItem | None:
        at = self.now()
        body = {"message": _message(job, target.token)}
        try:
            answer = await self._http.post(self._url, json=body, headers=self._headers)
        except httpx.TransportError as error:
            raise TryAgain(f"fcm {type(error).__name__}") from None
        if answer.is_success:
            return None
        feedback = self.client.feedback.from_fcm(
            answer.status_code, answer.content, token=target.token, at=at
        )
        if feedback is not None:
            return feedback
        if answer.status_code in (400, 404):
            raise Refused(f"fcm {answer.status_code}")
        # 429 and 5xx pass; 401 and 403 are of our own key, which somebody will have to renew.
        after = answer.headers.get("Retry-After", "")
        raise TryAgain(f"fcm {answer.status_code}", float(after) if after.isdecimal() else 0.0)


def _message(job: Job, token: str) -> dict[str, object]:
    """Return the message; on the device, what has the same tag takes the place of the first."""
    return {
        "token": token,
        "notification": {"title": job.title, "body": job.body},
        "android": {"notification": {"tag": job.id}},
        "apns": {"headers": {"apns-collapse-id": job.id}},
        "webpush": {"notification": {"tag": job.id}},
    }


if __name__ == "__main__":
    start("push", PushWorker)
