"""The state of the change feed, and the recorded answers of repeatable writes.

Deploy order: migrate first, then the servers. The previous release passes on this schema.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_EXACT = sa.Text(collation="C")
_INSTANT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "change_feed",
        sa.Column("id", sa.SmallInteger, autoincrement=False, nullable=False),
        sa.Column("last_position", sa.BigInteger, nullable=False),
        sa.Column("pruned_position", sa.BigInteger, nullable=False),
        sa.Column("complete_through", _INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_change_feed"),
        sa.CheckConstraint("id = 1", name=op.f("ck_change_feed_one_row")),
    )
    op.execute("INSERT INTO change_feed VALUES (1, 0, 0, '2000-01-01T00:00:00Z')")
    op.create_table(
        "recorded_answers",
        sa.Column("caller", _EXACT, nullable=False),
        sa.Column("key", _EXACT, nullable=False),
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("status", sa.SmallInteger, nullable=False),
        sa.Column("headers", postgresql.JSONB, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.Column("user_id", postgresql.UUID(as_uuid=False), nullable=False),
        sa.Column("at", _INSTANT, nullable=False),
        sa.PrimaryKeyConstraint("caller", "key", name="pk_recorded_answers"),
    )
    op.create_index("ix_recorded_answers_user_id", "recorded_answers", ["user_id"])
    op.create_index("ix_recorded_answers_at", "recorded_answers", ["at"])


def downgrade() -> None:
    op.drop_table("recorded_answers")
    op.drop_table("change_feed")
