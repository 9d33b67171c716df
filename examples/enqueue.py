"""Puts a job in: `python examples/enqueue.py push <user id> "Title" "Body" [category]`."""

from __future__ import annotations

import argparse
import os
from uuid import UUID, uuid4

import msgspec
from jobs import Job
from redis import Redis


def main() -> None:
    """Read the command line, and add the job."""
    parser = argparse.ArgumentParser()
    parser.add_argument("channel", choices=["email", "push"])
    parser.add_argument("user_id", type=UUID)
    parser.add_argument("title")
    parser.add_argument("body")
    parser.add_argument("category", nargs="?")
    parser.add_argument("--id", default=str(uuid4()), help="the same for what is put in again")
    said = vars(parser.parse_args())
    channel = said.pop("channel")
    job = msgspec.json.encode(Job(**said))
    with Redis.from_url(os.environ.get("QUEUE_URL", "redis://localhost:6379/1")) as redis:
        redis.xadd(f"{{{channel}}}:jobs", {"job": job})


if __name__ == "__main__":
    main()
