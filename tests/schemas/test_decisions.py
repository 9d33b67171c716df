"""The rules of a delivery: the table of api.md, section 6, row by row, and what goes with it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from user_service_schemas import (
    Catalogue,
    Choices,
    Decision,
    Device,
    Reason,
    ResolveDeliveries,
    RuleViolation,
    UnknownRules,
    User,
    Verdict,
    check_delivery,
    convert_request,
    decide,
    effective_preferences,
    is_decidable,
)

from ..delivery_rules import (
    CATALOGUES,
    MUTED_UNTIL,
    NIGHT,
    QUIET,
    STATES,
    UNREACHABLE,
    UNTIL,
    VERDICTS,
    reason_on,
    table,
)
from .wall_clocks import PHONE, somebody


def document(state: str, catalogue: Catalogue | None) -> User | None:
    if state == "unknown":
        return None
    preferences = effective_preferences(Choices(**STATES[state]), "UTC", catalogue)
    user = msgspec.structs.replace(somebody(Choices()), preferences=preferences)
    if state.startswith("unreachable"):
        user = msgspec.structs.replace(user, email_deliverable=False, devices=())
    # As a client has it: what the server knows from its settings must have come along.
    return msgspec.json.decode(msgspec.json.encode(user), type=User)


@pytest.mark.parametrize(("channel", "state", "catalogue", "priority", "reason"), table())
def test_the_first_rule_that_holds_decides(
    channel: Any, state: str, catalogue: str, priority: Any, reason: str
) -> None:
    user = document(state, CATALOGUES[catalogue])
    asked: dict[str, Any] = {"category": "news", "priority": priority}

    if reason == "refused":
        with pytest.raises(RuleViolation) as refused:
            check_delivery(channel, "news", priority, CATALOGUES[catalogue])
        assert [detail.field for detail in refused.value.details] == ["priority"]
        if user is not None:  # who has no document cannot know of a catalogue
            with pytest.raises(RuleViolation) as refused:
                decide(user, channel, NIGHT, **asked)
            assert [detail.field for detail in refused.value.details] == ["priority"]
        return

    check_delivery(channel, "news", priority, CATALOGUES[catalogue])
    decision = decide(user, channel, NIGHT, **asked, user_id="nobody")
    reason = reason_on(channel, reason)
    assert decision.reason == reason
    assert decision.decision == VERDICTS.get(reason, "suppress")
    assert decision.deferred_until == UNTIL.get(reason)
    assert decision.user_id == ("nobody" if user is None else user.id)
    assert decision.version == (None if user is None else user.version)
    allowed = decision.decision == "allow"
    assert decision.email == ("jane@example.com" if allowed and channel == "email" else None)
    assert [d.token for d in decision.devices] == ["a token"] * (allowed and channel == "push")
    assert_explained(
        decide(user, channel, NIGHT, **asked, user_id="nobody", explain=True), decision
    )


def assert_explained(explained: Decision, decision: Decision) -> None:
    """All rules are told, in their order, and by them the decision is what it is."""
    assert msgspec.structs.replace(explained, explanation=()) == decision
    rules = [said.rule for said in explained.explanation]
    unreachable = [rule for rule in rules if rule in UNREACHABLE.values()]
    order = [rule.value for rule in Reason if rule.value not in UNREACHABLE.values()]
    assert rules == [order[0], *unreachable, *order[1:]]
    assert len(unreachable) == 1
    verdicts = [said.verdict for said in explained.explanation]
    decided = rules.index(decision.reason)
    assert verdicts[decided] == decision.decision
    assert set(verdicts[:decided]) <= {"no", "passed_over"}
    assert set(verdicts[decided + 1 :]) <= {"no", "passed_over", "holds", "unknown"}
    assert all(said.why.endswith(".") for said in explained.explanation)
    assert not any("jane@" in said.why or "a token" in said.why for said in explained.explanation)


def test_an_explanation_tells_what_would_have_held_and_what_was_passed_over() -> None:
    user = document("channel off, muted, quiet hours", None)
    priorities: tuple[Any, ...] = ("normal", "urgent", "critical")
    by_priority = {
        priority: [
            said.verdict
            for said in decide(
                user, "push", NIGHT, priority=priority, category="news", explain=True
            ).explanation
        ]
        for priority in priorities
    }
    over = "passed_over"
    assert by_priority == {
        "normal": ["no", "no", "suppress", "no", "holds", "holds", "no"],
        "urgent": ["no", "no", "suppress", "no", over, over, "no"],
        "critical": ["no", "no", over, "no", over, over, "allow"],
    }


def test_an_explanation_is_in_words() -> None:
    said = Choices(
        **QUIET,
        timezone="Europe/Warsaw",
        muted_until=datetime(2026, 3, 28, 23, 45, tzinfo=UTC),
        categories={"news": {"push": False}},
    )
    at = datetime(2026, 3, 28, 23, 30, tzinfo=UTC)
    decision = decide(somebody(said), "push", at, category="sport", app="shop", explain=True)
    assert [entry.why for entry in decision.explanation] == [
        "The user exists; their document is version 7.",
        "The user has no active devices of the app shop, and 1 of others.",
        "The user has push as a whole switched on.",
        "The user has said nothing about the category sport: it is on.",
        "The user has muted messages until Sunday 2026-03-29 00:45 (UTC+01:00) in Europe/Warsaw.",
        (
            "Quiet hours are from 22:00 to 07:00 in Europe/Warsaw. There it is Sunday 2026-03-29 "
            "00:30 (UTC+01:00), which is inside of them. They end on Sunday 2026-03-29 07:00 "
            "(UTC+02:00)."
        ),
        "A message is allowed where none of these rules decides.",
    ]
    decision = decide(somebody(said), "push", at, category="news", priority="urgent", explain=True)
    assert [entry.why for entry in decision.explanation][3:5] == [
        "The category news is switched off for push.",
        (
            "The user has muted messages until Sunday 2026-03-29 00:45 (UTC+01:00) in "
            "Europe/Warsaw. Urgent messages pass this over."
        ),
    ]
    decision = decide(somebody(said), "push", at, explain=True)
    assert decision.deferred_until == datetime(2026, 3, 29, 5, 0, tzinfo=UTC)
    assert decision.explanation[4].why.endswith(
        " That is in their quiet hours, which then end on Sunday 2026-03-29 07:00 (UTC+02:00)."
    )


@pytest.mark.parametrize(
    ("effective", "words"),
    [
        (
            "Europe/Warsaw",
            "The user has said no time zone, so the default, Europe/Warsaw, is used.",
        ),
        ("Mars/Olympus", "The time zone Mars/Olympus is not known, so UTC is used instead."),
    ],
)
def test_an_explanation_says_which_zone_was_taken_and_why(effective: str, words: str) -> None:
    shown = effective_preferences(Choices(**QUIET), effective)
    user = msgspec.structs.replace(somebody(Choices()), preferences=shown)
    decision = decide(user, "push", NIGHT, explain=True)
    assert decision.explanation[5].why.startswith(words)
    assert decision.reason == "quiet_hours"
    assert is_decidable(user) == (effective == "Europe/Warsaw")


def test_a_category_is_required_on_its_channel_alone() -> None:
    catalogue = Catalogue.parse('{"news": {"email": "required", "push": "on"}}')
    user = document("channel and category off", catalogue)
    assert decide(user, "email", NIGHT, category="news").reason == "allowed"
    assert decide(user, "push", NIGHT, category="news").reason == "channel_opted_out"
    assert decide(user, "email", NIGHT, category="news", priority="critical").reason == "allowed"
    with pytest.raises(RuleViolation):
        decide(user, "push", NIGHT, category="news", priority="critical")


MISTAKES = [
    ("sms", None, "normal", "channel"),
    ("push", None, "loud", "priority"),
    ("push", "Not a name", "normal", "category"),
    ("push", "a" * 65, "normal", "category"),
    ("push", "", "normal", "category"),
]
MISTAKES_BY_CATALOGUE = [
    ("push", "sport", "normal", "category"),
    ("push", "sport", "critical", "category"),
    ("push", None, "critical", "priority"),  # to name none would be the way around
]


@pytest.mark.parametrize("catalogue", CATALOGUES)
@pytest.mark.parametrize(
    ("channel", "category", "priority", "field"), [*MISTAKES, *MISTAKES_BY_CATALOGUE]
)
def test_a_mistake_of_the_sender_is_no_decision(
    catalogue: str, channel: Any, category: str | None, priority: Any, field: str
) -> None:
    user = document("nothing said", CATALOGUES[catalogue])
    asked = (channel, category, priority, field)
    if catalogue == "none" and asked in MISTAKES_BY_CATALOGUE:
        check_delivery(channel, category, priority, None)
        assert (
            decide(user, channel, NIGHT, category=category, priority=priority).reason == "allowed"
        )
        return
    with pytest.raises(RuleViolation) as by_check:
        check_delivery(channel, category, priority, CATALOGUES[catalogue])
    with pytest.raises(RuleViolation) as by_decision:
        decide(user, channel, NIGHT, category=category, priority=priority)
    assert by_check.value.details == by_decision.value.details
    assert [detail.field for detail in by_check.value.details] == [field]


def test_an_instant_without_an_offset_is_a_mistake() -> None:
    with pytest.raises(RuleViolation) as raised:
        decide(somebody(Choices()), "push", datetime(2026, 1, 1))  # noqa: DTZ001
    assert [detail.field for detail in raised.value.details] == ["at"]


@pytest.mark.parametrize("user", [None, somebody(Choices())])
def test_whoever_it_is_for_a_mistake_is_one(user: User | None) -> None:
    """A word that is none, such as an unset variable's, must not drop messages in silence."""
    for asked in ({"app": ""}, {"app": "a" * 129}, {"category": ""}, {"category": "Not a name"}):
        said: dict[str, Any] = asked
        with pytest.raises(RuleViolation) as raised:
            decide(user, "push", NIGHT, **said)
        assert [detail.field for detail in raised.value.details] == list(asked)


def test_a_mute_without_an_offset_is_in_utc() -> None:
    said = Choices(muted_until=MUTED_UNTIL.replace(tzinfo=None))
    assert decide(somebody(said), "push", NIGHT).deferred_until == MUTED_UNTIL


def test_a_document_of_other_rules_is_not_decided_here() -> None:
    user = msgspec.structs.replace(somebody(Choices()), rules=2)
    assert not is_decidable(user)
    with pytest.raises(UnknownRules):
        decide(user, "push", NIGHT)


def phone(app: str | None, *, active: bool = True) -> Device:
    return msgspec.structs.replace(PHONE, id=f"{app} {active}", app=app, active=active)


@pytest.mark.parametrize(
    ("app", "ids"),
    [
        (None, ["shop True", "None True", "bank True"]),
        ("shop", ["shop True"]),
        ("bank", ["bank True"]),
        ("news", []),
    ],
)
def test_a_push_goes_to_the_active_devices_of_the_app(app: str | None, ids: list[str]) -> None:
    devices = (phone("shop"), phone("shop", active=False), phone(None), phone("bank"))
    user = msgspec.structs.replace(somebody(Choices()), devices=devices)
    decision = decide(user, "push", NIGHT, app=app)
    assert [device.id for device in decision.devices] == ids
    assert decision.reason == ("allowed" if ids else "no_active_device")
    assert decide(user, "email", NIGHT, app=app).email == "jane@example.com"


def test_a_decision_is_written_as_the_contract_shows_it() -> None:
    decision = decide(somebody(Choices(**QUIET)), "push", NIGHT)
    assert json.loads(msgspec.json.encode(decision)) == {
        "user_id": "somebody",
        "decision": "defer",
        "reason": "quiet_hours",
        "deferred_until": "2026-01-02T07:00:00Z",
        "email": None,
        "devices": [],
        "version": 7,
    }
    allowed = decide(somebody(Choices()), "push", NIGHT)
    assert json.loads(msgspec.json.encode(allowed))["devices"] == [
        {"id": "a phone", "token": "a token", "platform": "android", "app": None}
    ]
    explained = decide(somebody(Choices()), "push", NIGHT, explain=True)
    (*_, last) = json.loads(msgspec.json.encode(explained))["explanation"]
    assert last.keys() == {"rule", "verdict", "why"}


def test_words_of_a_newer_server_are_kept() -> None:
    explained = decide(somebody(Choices()), "push", NIGHT, explain=True)
    raw = json.loads(msgspec.json.encode(explained))
    raw |= {"decision": "digest", "reason": "too_many", "more": 1}
    raw["explanation"][0] |= {"rule": "too_many", "verdict": "perhaps"}
    decision = msgspec.json.decode(msgspec.json.encode(raw), type=Decision)
    assert (decision.decision, decision.reason) == ("digest", "too_many")
    assert decision.explanation[0].verdict == "perhaps"


def test_decisions_are_compared_with_the_words_of_the_package() -> None:
    decision = decide(somebody(Choices()), "push", NIGHT)
    assert decision.decision == Verdict.ALLOW
    assert decision.reason == Reason.ALLOWED
    assert type(decision.decision) is type(decision.reason) is str


def test_a_request_names_every_bad_field() -> None:
    bad = {
        "channel": "sms",
        "user_ids": ["x"],
        "category": "Not a name",
        "app": "",
        "priority": "loud",
        "at": "2026-01-01T00:00:00",
        "explain": 1,
        "more": 1,
    }
    with pytest.raises(RuleViolation) as raised:
        convert_request(bad, ResolveDeliveries)
    fields = {detail.field for detail in raised.value.details}
    assert fields == {name if name != "user_ids" else "user_ids[0]" for name in bad}


def test_a_request_says_little() -> None:
    request = convert_request({"channel": "push", "user_ids": []}, ResolveDeliveries)
    assert (request.priority, request.category, request.app) == ("normal", None, None)
    assert (request.at, request.explain) == (None, False)
    with pytest.raises(RuleViolation):
        convert_request({"channel": "push", "user_ids": ["x"] * 1001}, ResolveDeliveries)
