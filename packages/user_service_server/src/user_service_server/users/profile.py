"""What a profile's fields may be, beyond their types: the judgement of well-kept libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import langcodes
import phonenumbers
from email_validator import EmailNotValidError, validate_email
from msgspec import UnsetType
from user_service_schemas import CreateUser, FieldError, UserUpdate, canonical_email

from ..errors import Invalid


def profile_values(
    request: CreateUser | UserUpdate,
) -> tuple[dict[str, str | None], list[FieldError]]:
    """Return the columns that `request` sets, and every field that is wrong."""
    values: dict[str, str | None] = {}
    errors: list[FieldError] = []
    for field in ("name", "email", "phone", "external_id", "locale"):
        value: str | None | UnsetType = getattr(request, field)
        if isinstance(value, UnsetType):
            continue
        try:
            values |= dict(_columns(field, value))
        except ValueError as error:
            errors.append(FieldError(field=field, message=str(error)))
    return values, errors


def judge_profile(request: Any) -> list[FieldError]:
    """Return what is wrong with the profile fields of a request that may be valid only in part."""
    return profile_values(request)[1]


def phone_key(phone: str) -> str:
    """Return the form in which a telephone number is kept; raises `Invalid` if it cannot be."""
    try:
        return _phone(phone)
    except ValueError as error:
        raise Invalid(FieldError(field="phone", message=str(error))) from error


def email_key(email: str) -> str:
    """Return the key by which an email is found; raises `Invalid` if it cannot be one."""
    try:
        return _email(email)
    except ValueError as error:
        raise Invalid(FieldError(field="email", message=str(error))) from error


def _columns(field: str, value: str | None) -> Iterator[tuple[str, str | None]]:
    check = _CHECKS.get(field)
    if field == "email":
        yield "email_key", _email(str(value))
        yield field, str(value)
    elif check and value is not None:
        yield field, check(str(value))
    else:
        yield field, None if value is None else str(value)


def _email(email: str) -> str:
    """Check the syntax (RFC 5321, RFC 6531; no DNS) and return the key."""
    try:
        validate_email(email, check_deliverability=False)
        return canonical_email(email)
    except (EmailNotValidError, ValueError):
        raise ValueError("This is not an email address.") from None


def _phone(phone: str) -> str:
    """Return the E.164 form of a possible number.

    Possible, not assigned: numbering plans change faster than libraries are updated.
    """
    try:
        number = phonenumbers.parse(phone, None)
    except phonenumbers.NumberParseException:
        number = None
    if number is None or not phonenumbers.is_possible_number(number):
        raise ValueError("This is not a possible telephone number.")
    return phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)


def _locale(tag: str) -> str:
    """Return a valid BCP 47 tag in the case that RFC 5646 recommends (section 2.1.1).

    Nothing else of it is changed: the order of variants means something.
    """
    if not langcodes.tag_is_valid(tag):
        raise ValueError("This is not a BCP 47 language tag.")
    language, *subtags = tag.lower().split("-")
    cased = [language]
    for subtag in subtags:
        after_singleton = any(len(before) == 1 for before in cased)
        recase = {2: str.upper, 4: str.title}.get(len(subtag), str.lower)
        cased.append(subtag if after_singleton else recase(subtag))
    return "-".join(cased)


_CHECKS: dict[str, Callable[[str], str]] = {"phone": _phone, "locale": _locale}
