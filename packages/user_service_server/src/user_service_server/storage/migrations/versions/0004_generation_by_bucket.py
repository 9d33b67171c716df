"""A generation for each bucket of the cache, in place of one for all that is cached.

Deploy order: stop the servers, migrate, start the new ones. Nothing was released before, so this
migration may ask for it: the release before looks for the one generation, and without it neither
reads nor writes Postgres. It must not: it caches under other keys, so that neither release would
hear of the other's writes. What it has cached it would go on answering; therefore stop it first.
"""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def _columns() -> tuple[sa.Column[int], sa.Column[datetime]]:
    return (
        sa.Column("generation", sa.BigInteger, nullable=False, server_default=sa.text("1")),
        sa.Column(
            "raised_at",
            sa.DateTime(timezone=True),
            nullable=False,
            server_default=sa.text("'2000-01-01T00:00:00Z'"),
        ),
    )


def upgrade() -> None:
    op.create_table(
        "cache_generations",
        sa.Column("bucket", sa.SmallInteger, autoincrement=False, nullable=False),
        *_columns(),
        sa.PrimaryKeyConstraint("bucket", name="pk_cache_generations"),
    )
    # Generations go on rising, there and back: Redis may hold what was cached under each before.
    op.execute(
        "INSERT INTO cache_generations (bucket, generation)"
        " SELECT bucket, generation + 1 FROM service_state, generate_series(0, 63) AS bucket"
    )
    for column in ("raised_at", "generation"):
        op.drop_column("service_state", column)


def downgrade() -> None:
    for column in _columns():
        op.add_column("service_state", column)
    op.execute(
        "UPDATE service_state SET generation = (SELECT max(generation) + 1 FROM cache_generations)"
    )
    op.drop_table("cache_generations")
