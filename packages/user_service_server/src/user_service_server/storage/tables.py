"""The tables. Constraint names are made by one convention, so that errors can be told apart."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, UUID

REVISION = "0007"
"""The migration that makes these tables. Revisions are numbers, so that they can be compared."""

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _id() -> UUID[str]:
    return UUID(as_uuid=False)


def _instant() -> DateTime:
    return DateTime(timezone=True)


# Compared byte by byte: whether two keys are equal must not depend on the database's locale.
_exact = Text(collation="C")

users = Table(
    "users",
    metadata,
    Column("id", _id(), primary_key=True),
    Column("external_id", _exact, unique=True),
    Column("name", Text),
    Column("email", Text),
    Column("email_key", _exact, unique=True),
    Column("email_deliverable", Boolean, nullable=False, server_default=text("true")),
    Column("phone", _exact, index=True),
    Column("locale", Text),
    Column("password_hash", Text),
    Column("version", BigInteger, nullable=False),
    Column("created_at", _instant(), nullable=False),
    Column("updated_at", _instant(), nullable=False),
    Column("deleted_at", _instant()),
    # Of an erased user only the id, the version and the times stay.
    CheckConstraint(
        "deleted_at IS NULL OR num_nonnulls(external_id, name, email, email_key, phone, locale,"
        " password_hash) = 0",
        name="erased_is_empty",
    ),
    CheckConstraint(
        "deleted_at IS NOT NULL OR num_nulls(name, email, email_key) = 0", name="user_is_complete"
    ),
)

preferences = Table(
    "preferences",
    metadata,
    Column("user_id", _id(), ForeignKey(users.c.id, ondelete="CASCADE"), primary_key=True),
    Column("email", Boolean, nullable=False),
    Column("push", Boolean, nullable=False),
    Column("quiet_hours_start", Text),
    Column("quiet_hours_end", Text),
    Column("timezone", Text),
    Column("muted_until", _instant()),
    Column("categories", JSONB, nullable=False, server_default=text("'{}'")),
    CheckConstraint("num_nulls(quiet_hours_start, quiet_hours_end) <> 1", name="quiet_hours_pair"),
)

devices = Table(
    "devices",
    metadata,
    Column("id", _id(), primary_key=True),
    Column("user_id", _id(), ForeignKey(users.c.id, ondelete="CASCADE"), nullable=False),
    Column("token", Text, nullable=False),
    # SHA-256 of the token: tokens reach 4096 characters, more than an index entry may have.
    Column("token_digest", LargeBinary, nullable=False, unique=True),
    Column("platform", Text, nullable=False),
    Column("app", Text),
    Column("active", Boolean, nullable=False),
    Column("inactive_reason", Text),
    Column("registered_at", _instant(), nullable=False),
    Column("last_seen_at", _instant(), nullable=False),
    Column("deactivated_at", _instant()),
    CheckConstraint("active = (deactivated_at IS NULL)", name="active_or_deactivated"),
    Index(None, "user_id"),
)

changes = Table(
    "changes",
    metadata,
    # The order of insertion is not the order of commits: readers go by `position`, which is given
    # to committed rows only, by one sequencer.
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("position", BigInteger, unique=True),
    Column("user_id", _id(), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("kind", Text, nullable=False),
    Column("at", _instant(), nullable=False),
    Column("actor", Text),
    # In the order in which the sequencer takes them.
    Index(
        "ix_changes_waiting",
        *("user_id", "version", "id"),
        postgresql_where=text("position IS NULL"),
    ),
)

change_feed = Table(
    "change_feed",
    metadata,
    Column("id", SmallInteger, primary_key=True, autoincrement=False),
    # The last position that was given, and the last that was deleted.
    Column("last_position", BigInteger, nullable=False),
    Column("pruned_position", BigInteger, nullable=False),
    # Every change that was acknowledged before this instant has a position.
    Column("complete_through", _instant(), nullable=False),
    CheckConstraint("id = 1", name="one_row"),
)

recorded_answers = Table(
    "recorded_answers",
    metadata,
    Column("caller", _exact, primary_key=True),
    Column("key", _exact, primary_key=True),
    # Of what was asked, keyed by SECRET_KEY: a body may hold a password.
    Column("digest", LargeBinary, nullable=False),
    Column("status", SmallInteger, nullable=False),
    Column("headers", JSONB, nullable=False),
    Column("body", LargeBinary, nullable=False),
    # Whom it is about: erasing a user erases it. Null where it holds no personal data.
    Column("user_id", _id()),
    Column("at", _instant(), nullable=False),
    Index(None, "user_id"),
    Index(None, "at"),
)

suppressed_addresses = Table(
    "suppressed_addresses",
    metadata,
    # Of the address, whoever has it now: `users.repository.email_name`.
    Column("digest", LargeBinary, primary_key=True),
    Column("reason", Text, nullable=False),
    Column("at", _instant(), nullable=False),
    # The address may be tried again; what is reported of the time before changes nothing.
    Column("lifted_at", _instant()),
)

feedback_counts = Table(
    "feedback_counts",
    metadata,
    Column("caller", _exact, primary_key=True),
    Column("minute", _instant(), primary_key=True),
    Column("applied", Integer, nullable=False),
)

preference_history = Table(
    "preference_history",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("user_id", _id(), ForeignKey(users.c.id, ondelete="CASCADE"), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("at", _instant(), nullable=False),
    Column("actor", Text),
    Column("source", Text),
    Column("policy_version", Text),
    Column("changes", JSONB, nullable=False),
    Index(None, "user_id", "id"),
)

service_keys = Table(
    "service_keys",
    metadata,
    Column("id", _exact, primary_key=True),
    Column("name", Text, nullable=False),
    # SHA-256 of the secret, which nobody can be told again.
    Column("secret_digest", LargeBinary, nullable=False),
    Column("scopes", ARRAY(Text), nullable=False),
    Column("created_at", _instant(), nullable=False),
    Column("expires_at", _instant()),
    # In the future while the grace after a rotation lasts.
    Column("revoked_at", _instant()),
    Column("last_used_at", _instant()),
)

service_state = Table(
    "service_state",
    metadata,
    Column("id", SmallInteger, primary_key=True, autoincrement=False),
    Column("epoch", Text, nullable=False),
    # Which servers of Redis were seen: a new one may hold what is long outdated.
    Column("redis_servers", ARRAY(Text), nullable=False, server_default=text("'{}'")),
    # The nightly sweep of devices: when the last one began, and how far the one under way is.
    Column(
        "sweep_began_at",
        _instant(),
        nullable=False,
        server_default=text("'2000-01-01 00:00:00+00'"),
    ),
    Column("sweep_after", _id()),
    CheckConstraint("id = 1", name="one_row"),
)

cache_generations = Table(
    "cache_generations",
    metadata,
    # One row for each of `buckets.BUCKETS`. Whoever raises several locks them by ascending bucket.
    Column("bucket", SmallInteger, primary_key=True, autoincrement=False),
    # What is cached under an earlier generation is not believed; see `cache`.
    Column("generation", BigInteger, nullable=False, server_default=text("1")),
    Column(
        "raised_at",
        _instant(),
        nullable=False,
        server_default=text("'2000-01-01 00:00:00+00'"),
    ),
)
