"""Suppressed addresses, what callers' feedback has done in the last hour, and the nightly sweep.

And answers that belong to no user are recorded, too.

Deploy order: migrate first, then the servers. The previous release passes on this schema, but
gives a new address no thought: until all servers are of this release, a user who changes to a
suppressed address is shown as one who can be reached.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

_EXACT = sa.Text(collation="C")
_INSTANT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "suppressed_addresses",
        sa.Column("digest", sa.LargeBinary, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("at", _INSTANT, nullable=False),
        sa.Column("lifted_at", _INSTANT),
        sa.PrimaryKeyConstraint("digest", name="pk_suppressed_addresses"),
    )
    op.create_table(
        "feedback_counts",
        sa.Column("caller", _EXACT, nullable=False),
        sa.Column("minute", _INSTANT, nullable=False),
        sa.Column("applied", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("caller", "minute", name="pk_feedback_counts"),
    )
    op.add_column(
        "service_state",
        sa.Column(
            "sweep_began_at",
            _INSTANT,
            nullable=False,
            server_default=sa.text("'2000-01-01T00:00:00Z'"),
        ),
    )
    op.add_column("service_state", sa.Column("sweep_after", postgresql.UUID(as_uuid=False)))
    op.alter_column("recorded_answers", "user_id", nullable=True)


def downgrade() -> None:
    # A repeat of these within the day is answered anew, and changes nothing.
    op.execute("DELETE FROM recorded_answers WHERE user_id IS NULL")
    op.alter_column("recorded_answers", "user_id", nullable=False)
    for column in ("sweep_after", "sweep_began_at"):
        op.drop_column("service_state", column)
    op.drop_table("feedback_counts")
    # Who is shown as one who cannot be reached stays so until the address changes: documents must
    # not change under their versions.
    op.drop_table("suppressed_addresses")
