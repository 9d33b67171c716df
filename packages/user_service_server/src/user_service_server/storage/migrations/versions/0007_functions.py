"""Functions for statements that need to see more than was committed when they began.

What a volatile function asks sees what was committed until then (PostgreSQL, "Function Volatility
Categories"): also what was done by whoever had a lock that the statement has got since.

Deploy order: migrate first, then the servers. The previous release passes on this schema.
Downgrade: the servers first; those of this release cannot register anybody without it.
"""

from __future__ import annotations

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_SEQUENCER = 0x75736663  # "usfc": one sequencer at a time


def upgrade() -> None:
    # Whether mail to an address may be tried.
    op.execute("""
        CREATE FUNCTION is_deliverable(of_name bytea) RETURNS boolean
        LANGUAGE plpgsql VOLATILE AS $$
        BEGIN
            RETURN NOT EXISTS (
                SELECT FROM suppressed_addresses WHERE digest = of_name AND lifted_at IS NULL
            );
        END $$
    """)
    # Gives positions to committed changes, and says how many and how far the feed goes then; nulls,
    # if another process is at it. Versions of one user are committed in their order, so whoever
    # sees a later one sees the earlier ones, too: ordered by (user, version), no batch skips one.
    # All that was acknowledged before the call began is seen, so a batch that takes all makes the
    # feed complete up to then.
    op.execute(f"""
        CREATE FUNCTION number_changes(
            batch integer,
            OUT numbered bigint, OUT now_last bigint, OUT now_pruned bigint,
            OUT now_through timestamptz
        ) LANGUAGE plpgsql VOLATILE AS $$
        BEGIN
            IF pg_try_advisory_xact_lock({_SEQUENCER}) THEN
                WITH waiting AS (
                    SELECT id, row_number() OVER (ORDER BY user_id, version, id) AS n
                    FROM changes WHERE position IS NULL
                    ORDER BY user_id, version, id
                    LIMIT batch
                ), given AS (
                    UPDATE changes SET position = change_feed.last_position + waiting.n
                    FROM waiting, change_feed
                    WHERE changes.id = waiting.id
                    RETURNING 1
                ), counted AS (
                    SELECT count(*) AS n FROM given
                )
                UPDATE change_feed
                SET last_position = last_position + counted.n,
                    complete_through = CASE WHEN counted.n < batch THEN statement_timestamp()
                        ELSE complete_through END
                FROM counted
                RETURNING counted.n, last_position, pruned_position, complete_through
                INTO numbered, now_last, now_pruned, now_through;
            END IF;
        END $$
    """)  # noqa: S608 - of a constant


def downgrade() -> None:
    op.execute("DROP FUNCTION number_changes(integer)")
    op.execute("DROP FUNCTION is_deliverable(bytea)")
