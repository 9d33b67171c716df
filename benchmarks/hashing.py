"""Owns how many passwords the cores can hash when they do nothing else.

python -m benchmarks.hashing 3    # seconds; prints hashes a second
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

from argon2 import PasswordHasher
from user_service_server.credentials.passwords import usable_cpus


def rate(seconds: float) -> float:
    """Hash as the service does, in a thread for each core that this process may use."""
    hasher = PasswordHasher(time_cost=2, memory_cost=19456, parallelism=1)
    workers = usable_cpus()
    began = time.monotonic()

    def work(_worker: int) -> int:
        made = 0
        while time.monotonic() < began + seconds:
            hasher.hash("correct horse battery staple")
            made += 1
        return made

    with ThreadPoolExecutor(workers) as pool:
        made = sum(pool.map(work, range(workers)))
    return made / (time.monotonic() - began)


if __name__ == "__main__":
    print(rate(float(sys.argv[1])))
