"""Users, preferences, devices, the change log, the consent history and the epoch.

Deploy order: migrate first, then the servers. There is no earlier release.
"""

from __future__ import annotations

import secrets

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_ID = postgresql.UUID(as_uuid=False)
_INSTANT = sa.DateTime(timezone=True)
_EXACT = sa.Text(collation="C")


def upgrade() -> None:
    op.create_table(
        "users",
        sa.Column("id", _ID, nullable=False),
        sa.Column("external_id", _EXACT),
        sa.Column("name", sa.Text),
        sa.Column("email", sa.Text),
        sa.Column("email_key", _EXACT),
        sa.Column("email_deliverable", sa.Boolean, nullable=False, server_default=sa.text("true")),
        sa.Column("phone", _EXACT),
        sa.Column("locale", sa.Text),
        sa.Column("password_hash", sa.Text),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("created_at", _INSTANT, nullable=False),
        sa.Column("updated_at", _INSTANT, nullable=False),
        sa.Column("deleted_at", _INSTANT),
        sa.PrimaryKeyConstraint("id", name="pk_users"),
        sa.UniqueConstraint("external_id", name="uq_users_external_id"),
        sa.UniqueConstraint("email_key", name="uq_users_email_key"),
        sa.CheckConstraint(
            "deleted_at IS NULL OR num_nonnulls(external_id, name, email, email_key, phone,"
            " locale, password_hash) = 0",
            name=op.f("ck_users_erased_is_empty"),
        ),
        sa.CheckConstraint(
            "deleted_at IS NOT NULL OR num_nulls(name, email, email_key) = 0",
            name=op.f("ck_users_user_is_complete"),
        ),
    )
    op.create_index("ix_users_phone", "users", ["phone"])
    op.create_table(
        "preferences",
        sa.Column("user_id", _ID, nullable=False),
        sa.Column("email", sa.Boolean, nullable=False),
        sa.Column("push", sa.Boolean, nullable=False),
        sa.Column("quiet_hours_start", sa.Text),
        sa.Column("quiet_hours_end", sa.Text),
        sa.Column("timezone", sa.Text),
        sa.Column("muted_until", _INSTANT),
        sa.Column("categories", postgresql.JSONB, nullable=False, server_default=sa.text("'{}'")),
        sa.PrimaryKeyConstraint("user_id", name="pk_preferences"),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name="fk_preferences_user_id_users", ondelete="CASCADE"
        ),
        sa.CheckConstraint(
            "num_nulls(quiet_hours_start, quiet_hours_end) <> 1",
            name=op.f("ck_preferences_quiet_hours_pair"),
        ),
    )
    op.create_table(
        "devices",
        sa.Column("id", _ID, nullable=False),
        sa.Column("user_id", _ID, nullable=False),
        sa.Column("token", sa.Text, nullable=False),
        sa.Column("token_digest", sa.LargeBinary, nullable=False),
        sa.Column("platform", sa.Text, nullable=False),
        sa.Column("app", sa.Text),
        sa.Column("active", sa.Boolean, nullable=False),
        sa.Column("inactive_reason", sa.Text),
        sa.Column("registered_at", _INSTANT, nullable=False),
        sa.Column("last_seen_at", _INSTANT, nullable=False),
        sa.Column("deactivated_at", _INSTANT),
        sa.PrimaryKeyConstraint("id", name="pk_devices"),
        sa.UniqueConstraint("token_digest", name="uq_devices_token_digest"),
        sa.ForeignKeyConstraint(
            ["user_id"], ["users.id"], name="fk_devices_user_id_users", ondelete="CASCADE"
        ),
        sa.CheckConstraint(
            "active = (deactivated_at IS NULL)", name=op.f("ck_devices_active_or_deactivated")
        ),
    )
    op.create_index("ix_devices_user_id", "devices", ["user_id"])
    op.create_table(
        "changes",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), nullable=False),
        sa.Column("position", sa.BigInteger),
        sa.Column("user_id", _ID, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("at", _INSTANT, nullable=False),
        sa.Column("actor", sa.Text),
        sa.PrimaryKeyConstraint("id", name="pk_changes"),
        sa.UniqueConstraint("position", name="uq_changes_position"),
    )
    op.create_index(
        "ix_changes_waiting",
        "changes",
        ["user_id", "version", "id"],
        postgresql_where=sa.text("position IS NULL"),
    )
    op.create_table(
        "preference_history",
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), nullable=False),
        sa.Column("user_id", _ID, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("at", _INSTANT, nullable=False),
        sa.Column("actor", sa.Text),
        sa.Column("source", sa.Text),
        sa.Column("policy_version", sa.Text),
        sa.Column("changes", postgresql.JSONB, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_preference_history"),
        sa.ForeignKeyConstraint(
            ["user_id"],
            ["users.id"],
            name="fk_preference_history_user_id_users",
            ondelete="CASCADE",
        ),
    )
    op.create_index("ix_preference_history_user_id_id", "preference_history", ["user_id", "id"])
    state = op.create_table(
        "service_state",
        sa.Column("id", sa.SmallInteger, autoincrement=False, nullable=False),
        sa.Column("epoch", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_service_state"),
        sa.CheckConstraint("id = 1", name=op.f("ck_service_state_one_row")),
    )
    op.bulk_insert(state, [{"id": 1, "epoch": secrets.token_hex(4)}])


def downgrade() -> None:
    for table in (
        "service_state",
        "preference_history",
        "changes",
        "devices",
        "preferences",
        "users",
    ):
        op.drop_table(table)
