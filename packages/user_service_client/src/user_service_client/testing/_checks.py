"""What a profile's fields and a password may be, beyond their types.

The service asks libraries that know every telephone plan, language tag and leaked password, which
a client should not bring along. These checks refuse what is refused for its form, and only that:
they never refuse what the service takes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from msgspec import UNSET, UnsetType
from user_service_schemas import (
    Catalogue,
    Choices,
    FieldError,
    RuleViolation,
    canonical_email,
    merge_preferences,
)

_LOCAL = re.compile(
    r"[\w!#$%&'*+/=?^`{|}~\-\u0080-\U0010ffff]+(\.[\w!#$%&'*+/=?^`{|}~\-\u0080-\U0010ffff]+)*"
)
_DOMAIN = re.compile(r"([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+([a-z0-9-]*[a-z])")
_NO_DOMAINS = re.compile(r"(.*\.)?(arpa|invalid|local|localhost|onion|test)")
"""Names that RFC 6761 and others took out of the DNS: nobody can have an address there."""
_POSSIBLE_PHONE = re.compile(r"\+[1-9][0-9]{6,14}")
_COMMON = frozenset(
    {
        *("12345678", "123456789", "1234567890", "11111111", "baseball", "football", "iloveyou"),
        *("letmein1", "password", "password1", "princess", "qwerty123", "qwertyui", "sunshine"),
        *("superman", "trustno1", "welcome1"),
    }
)


def profile_values(request: object) -> tuple[dict[str, str | None], list[FieldError]]:
    """Return the values that `request` sets, and every field that is wrong.

    `email` brings `email_key` along. The request may be one that is valid only in part.
    """
    values: dict[str, str | None] = {}
    errors: list[FieldError] = []
    for field in ("name", "email", "phone", "external_id", "locale"):
        value: str | None | UnsetType = getattr(request, field)
        if isinstance(value, UnsetType):
            continue
        try:
            if field == "email":
                values["email_key"] = email_key(str(value))
            elif field == "phone" and value is not None:
                value = phone_key(value)
            elif field == "locale" and value is not None:
                value = _locale(value)
        except ValueError as error:
            errors.append(FieldError(field=field, message=str(error)))
        values[field] = value
    return values, errors


def email_key(email: str) -> str:
    """Return the form in which an email is unique; raises `ValueError` if it cannot be one."""
    try:
        key = canonical_email(email)
    except ValueError:
        key = ""
    local, _, domain = key.rpartition("@")
    if (
        not _LOCAL.fullmatch(local)
        or not _DOMAIN.fullmatch(domain)
        or _NO_DOMAINS.fullmatch(domain)
    ):
        raise ValueError("This is not an email address.")
    return key


def phone_key(phone: str) -> str:
    """Return a telephone number as it is kept; raises `ValueError` if it cannot be one."""
    if not _POSSIBLE_PHONE.fullmatch(phone):
        raise ValueError("This is not a possible telephone number.")
    return phone


def _locale(tag: str) -> str:
    """Return a language tag in the case that RFC 5646 recommends (section 2.1.1)."""
    language, *subtags = tag.lower().split("-")
    if not re.fullmatch("[a-z]{2,8}|[ix]", language):
        raise ValueError("This is not a BCP 47 language tag.")
    cased = [language]
    for subtag in subtags:
        after_singleton = any(len(before) == 1 for before in cased)
        recase = {2: str.upper, 4: str.title}.get(len(subtag), str.lower)
        cased.append(subtag if after_singleton else recase(subtag))
    return "-".join(cased)


def judge_password(password: str, *, email: str, name: str) -> list[FieldError]:
    """Return what is wrong with a new password."""
    lowered = password.casefold().strip()
    if lowered in _COMMON:
        message = "This password is among the most common ones."
    elif lowered in (email.casefold(), name.casefold()):
        message = "The password must not be the email or name."
    else:
        return []
    return [FieldError(field="password", message=message)]


def judge_registration(
    request: object, *, password_required: bool, catalogue: Catalogue | None
) -> list[FieldError]:
    """Return what is wrong with a registration that may be valid only in part."""
    said: Mapping[str, object] = {
        name: getattr(request, name) for name in ("email", "name", "password", "preferences")
    }
    _, errors = profile_values(request)
    preferences, password = said["preferences"], said["password"]
    if preferences is not UNSET:
        try:
            merge_preferences(Choices(), preferences, catalogue)  # type: ignore[arg-type]  # valid in part
        except RuleViolation as violation:
            errors += [
                FieldError(field=f"preferences.{detail.field}", message=detail.message)
                for detail in violation.details
            ]
    if isinstance(password, str):
        about = {name: str(said[name] or "") for name in ("email", "name")}
        errors += judge_password(password, **about)
    elif password is None and password_required:
        errors.append(FieldError(field="password", message="This field is required."))
    return errors
