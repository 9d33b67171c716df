"""The answers: immutable to the bottom, open to what a newer server adds, and plain values."""

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from user_service_schemas import (
    BatchOfUsers,
    Envelope,
    FoundUsers,
    FrozenDict,
    Health,
    Page,
    User,
)

from .strategies import choices, json_values, steadily, users

MUTATIONS: list[Callable[[dict[str, Any]], object]] = [
    lambda mapping: mapping.__setitem__("new", 1),
    lambda mapping: mapping.__delitem__("new"),
    lambda mapping: mapping.__ior__({"new": 1}),
    lambda mapping: mapping.update(new=1),
    lambda mapping: mapping.setdefault("new", 1),
    lambda mapping: mapping.pop("new", None),
    lambda mapping: mapping.popitem(),
    lambda mapping: mapping.clear(),
]


def parts(value: object) -> Iterator[object]:
    """Yield `value` and all that it is made of."""
    yield value
    if isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            yield from parts(getattr(value, name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from parts(item)
    elif isinstance(value, tuple | list | set):
        for item in value:
            yield from parts(item)


def assert_immutable(value: object) -> None:
    for part in parts(value):
        assert not isinstance(part, list | set | bytearray)
        if isinstance(part, msgspec.Struct):
            for name in part.__struct_fields__:
                with pytest.raises(AttributeError):
                    setattr(part, name, None)
                with pytest.raises(AttributeError):
                    delattr(part, name)
        elif isinstance(part, dict):
            before = dict(part)
            for mutate in MUTATIONS:
                with pytest.raises(TypeError):
                    mutate(part)
            assert part == before


def decoded(document: dict[str, Any]) -> User:
    return msgspec.json.decode(json.dumps(document), type=User)


@steadily
@given(users)
def test_a_user_is_immutable_to_the_bottom(document: dict[str, Any]) -> None:
    assert_immutable(decoded(document))


@steadily
@given(users)
def test_the_answers_around_users_are_immutable_too(document: dict[str, Any]) -> None:
    sent = {"users": [document], "missing": ["x"], "items": [document], "next_cursor": None}
    for type_ in (FoundUsers, BatchOfUsers, Page[User]):
        assert_immutable(msgspec.json.decode(json.dumps(sent), type=type_))
    envelope = {"success": True, "data": document, "message": "", "error": None}
    assert_immutable(msgspec.json.decode(json.dumps(envelope), type=Envelope[User]))


@steadily
@given(choices)
def test_choices_are_immutable_to_the_bottom(said: Any) -> None:
    assert_immutable(said)


def test_the_dependencies_of_health_are_immutable() -> None:
    up = {"status": "up", "latency_ms": 0.1}
    raw = {"status": "healthy", "version": "1", "dependencies": {"postgres": up}}
    assert_immutable(msgspec.convert(raw, Health))


@steadily
@given(users)
def test_a_user_is_written_as_it_was_read(document: dict[str, Any]) -> None:
    user = decoded(document)
    assert decoded(json.loads(msgspec.json.encode(user))) == user
    assert json.loads(msgspec.json.encode(user)).keys() == document.keys()


def grown(value: Any, more: dict[str, Any]) -> Any:
    """Return `value` with unknown fields in each of its objects but the map of categories."""
    if isinstance(value, list):
        return [grown(item, more) for item in value]
    if isinstance(value, dict):
        inner = {
            name: {key: grown(said, more) for key, said in item.items()}
            if name == "categories"
            else grown(item, more)
            for name, item in value.items()
        }
        return {**more, **inner}
    return value


@steadily
@given(users, st.dictionaries(st.text().map("x_".__add__), json_values, min_size=1, max_size=3))
def test_fields_of_a_newer_server_are_passed_over(
    document: dict[str, Any], more: dict[str, Any]
) -> None:
    assert decoded(grown(document, more)) == decoded(document)


@steadily
@given(users, st.text())
def test_a_platform_of_a_newer_server_is_kept(document: dict[str, Any], platform: str) -> None:
    device = {
        "id": "1",
        "token": "t",
        "platform": platform,
        "app": None,
        "active": True,
        "registered_at": "2026-01-02T03:04:05Z",
    }
    assert decoded({**document, "devices": [device]}).devices[0].platform == platform


@steadily
@given(users)
def test_users_are_values(document: dict[str, Any]) -> None:
    user, same = decoded(document), decoded(document)
    backwards = dict(reversed(document["preferences"]["categories"].items()))
    preferences = {**document["preferences"], "categories": backwards}
    alike = decoded({**document, "preferences": preferences})
    assert user == same == alike
    assert hash(user) == hash(same) == hash(alike)
    assert len({user, same, alike}) == 1
    assert decoded({**document, "version": document["version"] + 1}) != user


@steadily
@given(users, st.integers(2, pickle.HIGHEST_PROTOCOL))
def test_a_user_that_was_pickled_or_copied_is_the_same(
    document: dict[str, Any], protocol: int
) -> None:
    user = decoded(document)
    for again in (
        pickle.loads(pickle.dumps(user, protocol)),  # noqa: S301 - of this very line
        copy.copy(user),
        copy.deepcopy(user),
        msgspec.structs.replace(user),
    ):
        assert again == user
        assert hash(again) == hash(user)
        assert_immutable(again)


@steadily
@given(users)
def test_a_user_that_is_made_in_code_is_immutable_too(document: dict[str, Any]) -> None:
    user = decoded(document)
    mutable = dict(user.preferences.categories)
    preferences = msgspec.structs.replace(user.preferences, categories=mutable)
    assert_immutable(preferences)
    mutable["later"] = mutable.get("news")  # type: ignore[assignment]
    assert "later" not in preferences.categories


def test_a_read_only_mapping_is_read_as_any_other() -> None:
    mapping = FrozenDict({"a": 1})
    assert mapping == {"a": 1}
    assert mapping | {"b": 2} == {"a": 1, "b": 2}
    assert msgspec.json.encode(mapping) == b'{"a":1}'
    assert {**mapping} == {"a": 1}
