"""The generation of what is cached, and the servers of Redis that were seen.

Deploy order: migrate first, then the servers. The previous release passes on this schema, but
knows no generation: until all servers are of this release, no write is protected from a lost Redis.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "service_state",
        sa.Column("generation", sa.BigInteger, nullable=False, server_default=sa.text("1")),
    )
    op.add_column(
        "service_state",
        sa.Column(
            "raised_at",
            sa.DateTime(timezone=True),
            nullable=False,
            server_default=sa.text("'2000-01-01T00:00:00Z'"),
        ),
    )
    op.add_column(
        "service_state",
        sa.Column(
            "redis_servers",
            postgresql.ARRAY(sa.Text),
            nullable=False,
            server_default=sa.text("'{}'"),
        ),
    )


def downgrade() -> None:
    for column in ("redis_servers", "raised_at", "generation"):
        op.drop_column("service_state", column)
