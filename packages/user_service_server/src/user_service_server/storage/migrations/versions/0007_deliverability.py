"""Whether mail to an address may be tried, as it is when a statement comes to ask.

A statement sees what was committed when it began. What a volatile function asks sees what was
committed until then (PostgreSQL, "Function Volatility Categories"), and so what was done by whoever
had the lock on the address's name just before.

Deploy order: migrate first, then the servers. The previous release passes on this schema.
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        CREATE FUNCTION is_deliverable(name bytea) RETURNS boolean LANGUAGE plpgsql VOLATILE AS $$
        BEGIN
            RETURN NOT EXISTS (
                SELECT FROM suppressed_addresses WHERE digest = name AND lifted_at IS NULL
            );
        END $$
    """)


def downgrade() -> None:
    op.execute("DROP FUNCTION is_deliverable(bytea)")
