"""Keys whose requests come after all others."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column("keys", sa.Column("priority_class", sa.Text, nullable=False, server_default="interactive"))
