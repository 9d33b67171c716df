"""Nothing personal is logged: not by the server, not by Postgres, whatever happens."""

import asyncio
import json

import httpx

from ..engines import Engines, settings_for
from ..keys import EVERYTHING, REQUIRED, SECRET_KEY, make_key, showing
from ..servers import serving

PERSON = {
    "name": "Xaverius Quillfeather",
    "email": "xaverius.quillfeather@private-person.org",
    "password": "correct-zebra-Staple-77",
    "phone": "+48221234567",
    "external_id": "crm-record-998877",
}
OTHER = {
    "name": "Yolanda Brambleton",
    "email": "yolanda.brambleton@private-person.org",
    "password": "another-walrus-Staple-78",
    "phone": "+48227654321",
    "external_id": "crm-record-112233",
}
TOKENS = ["fcm:SECRETTOKEN-aaaa-bbbb-cccc", "apns:SECRETTOKEN-dddd-eeee"]
NEW_PASSWORD = "third-ocelot-Staple-79"
WRONG_PASSWORD = "fourth-gnu-Staple-80"
NOBODYS_KEY = f"usk_{'q' * 12}_{'7e57' * 16}"
PERSONAL = [*PERSON.values(), *OTHER.values(), *TOKENS, NEW_PASSWORD, WRONG_PASSWORD, NOBODYS_KEY]


class Caller:
    """Sends requests, each with an id of its own, and keeps ids, statuses and users' ids."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self.ids: list[str] = []
        self.statuses: set[int] = set()

    async def send(self, method: str, path: str, body: object = None) -> httpx.Response:
        self.ids.append(f"caller-{len(self.ids):04}")
        answer = await self._http.request(
            method, path, json=body, headers={"X-Request-ID": self.ids[-1]}
        )
        assert answer.headers["X-Request-ID"] == self.ids[-1]
        self.statuses.add(answer.status_code)
        return answer


async def live(caller: Caller) -> str:
    """Do all that can be done with users, well and badly; returns a user's id."""
    created = await caller.send("POST", "/api/v1/users/", PERSON)
    user = f"/api/v1/users/{created.json()['data']['id']}"
    other = await caller.send("POST", "/api/v1/users/", OTHER)
    await caller.send("GET", user)
    for field in ("email", "phone", "external_id"):
        await caller.send("POST", "/api/v1/users/lookup", {field: PERSON[field]})
    for token in TOKENS:
        device = {"token": token, "platform": "android"}
        await caller.send("POST", f"{user}/devices", device)
        await caller.send("POST", f"/api/v1/users/{other.json()['data']['id']}/devices", device)
    await caller.send("PATCH", f"{user}/preferences", {"consent": {"source": PERSON["name"]}})
    passwords = {"password": NEW_PASSWORD, "current_password": PERSON["password"]}
    await caller.send("PUT", f"{user}/password", passwords)
    await caller.send("PUT", f"{user}/password", passwords)
    for password in (NEW_PASSWORD, WRONG_PASSWORD):
        tried = {"email": PERSON["email"], "password": password}
        await caller.send("POST", "/api/v1/credentials/verify", tried)
    # What is refused: taken, not valid, in the wrong place, unreadable, nowhere.
    await caller.send("POST", "/api/v1/users/", {**PERSON, "external_id": None})
    await caller.send("PATCH", user, {"email": OTHER["email"]})
    await caller.send("PATCH", user, {"external_id": OTHER["external_id"]})
    await caller.send("POST", "/api/v1/users/", {**PERSON, "phone": PERSON["email"]})
    await caller.send("POST", "/api/v1/users/", {PERSON["email"]: PERSON["password"]})
    await caller.send("POST", "/api/v1/users/", list(PERSON.values()))
    await caller.send("GET", f"/api/v1/users/{PERSON['email']}")
    await caller.send("GET", f"/api/v1/users?cursor={PERSON['email']}")
    await caller.send("GET", f"/{PERSON['email']}/{TOKENS[0]}")
    return user


async def test_logs_hold_request_ids_and_nothing_personal(own_engines: Engines) -> None:
    database = own_engines.create_database("logs")
    valkey, postgres = own_engines.valkey, own_engines.postgres
    key = await make_key(settings_for(database, valkey.url), "logged", *EVERYTHING)
    with serving(database, valkey.url, **REQUIRED, LOG_LEVEL="debug") as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=15) as http:
            caller = Caller(http)
            for wrong in (NOBODYS_KEY, f"{key[:16]}_{'0' * 64}", NOBODYS_KEY[:-1]):
                http.headers.update(showing(wrong))
                assert (await caller.send("GET", "/api/v1/users")).status_code == 401
            http.headers.update(showing(key))
            user = await live(caller)
            # A statement that Postgres has to refuse, with the values of a person in it.
            psql = ("psql", "-h", str(postgres.socket_dir), "-d", "logs", "-qc")
            assert postgres.run(*psql, "ALTER TABLE users RENAME TO elsewhere").returncode == 0
            await caller.send("PATCH", user, {"name": OTHER["name"]})
            assert postgres.run(*psql, "ALTER TABLE elsewhere RENAME TO users").returncode == 0
            await asyncio.to_thread(postgres.kill)
            await caller.send("PATCH", user, {"name": OTHER["name"]})
            await caller.send("POST", "/api/v1/users/lookup", {"email": PERSON["email"]})
            await asyncio.to_thread(valkey.kill)
            await caller.send("GET", user)
        assert caller.statuses >= {200, 201, 400, 401, 404, 409, 422, 500, 503}
        assert server.stop() == 0
        log = server.log.read_text()

    entries = [json.loads(line) for line in log.splitlines()]
    answered = [entry["request_id"] for entry in entries if entry["event"] == "request"]
    assert [number for number in answered if number.startswith("caller-")] == caller.ids
    (crash,) = [entry for entry in entries if entry["event"] == "request.crashed"]
    assert crash["request_id"] in caller.ids
    said = log + postgres.log_path.read_text()
    secrets = [*PERSONAL, key, key.split("_")[2], SECRET_KEY]
    words = {word for value in secrets for word in {value, *value.split()}}
    words |= {word.replace("@", "%40") for word in words}
    assert [word for word in sorted(words) if word.lower() in said.lower()] == []
