"""What a job's lost attempts had reached, so that those that get on are not counted together."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("forgotten", sa.Integer(), server_default="0", nullable=False))
    op.add_column("jobs", sa.Column("lost_at_step", sa.Integer(), nullable=True))


def downgrade() -> None:
    op.drop_column("jobs", "lost_at_step")
    op.drop_column("jobs", "forgotten")
