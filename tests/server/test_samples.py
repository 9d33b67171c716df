"""The samples of the original request, and what surrounds every answer."""

import httpx

JOHN = {
    "name": "John Doe",
    "email": "john@example.com",
    "password": "StrongPass123!",
    "preferences": {"email": True, "push": False},
}


async def test_the_samples_of_the_request_work_in_their_order(http: httpx.AsyncClient) -> None:
    created = await http.post("/api/v1/users/", json=JOHN)
    assert created.status_code == 201
    user = created.json()["data"]
    assert created.headers["location"] == f"/api/v1/users/{user['id']}"

    fetched = await http.get(f"/api/v1/users/{user['id']}")
    assert fetched.json()["data"] == user
    assert fetched.headers["etag"] == created.headers["etag"]

    quiet = {
        "email": False,
        "push": True,
        "quiet_hours_start": "22:00",
        "quiet_hours_end": "07:00",
    }
    updated = await http.put(f"/api/v1/users/{user['id']}/preferences", json=quiet)
    assert updated.status_code == 200
    assert quiet.items() <= updated.json()["data"].items()

    device = {"token": "fcm_device_token_123", "platform": "android", "active": True}
    registered = await http.post(f"/api/v1/users/{user['id']}/devices", json=device)
    assert registered.status_code == 201
    assert device.items() <= registered.json()["data"].items()

    health = await http.get("/health")
    assert health.json()["data"]["status"] == "healthy"

    document = (await http.get(f"/api/v1/users/{user['id']}")).json()["data"]
    assert document["version"] == 3
    assert [d["token"] for d in document["devices"]] == ["fcm_device_token_123"]


async def test_unknown_routes_and_methods_answer_in_the_envelope(http: httpx.AsyncClient) -> None:
    missing = await http.get("/nope")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "route_not_found"
    wrong = await http.put("/api/v1/users/")
    assert wrong.status_code == 405
    assert wrong.json()["error"]["code"] == "method_not_allowed"
    assert "POST" in wrong.headers["allow"]
