"""Requests, and their sums by hour and day."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "requests",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
        sa.Column("row", sa.Text, nullable=False, unique=True),
        sa.Column("worker", sa.Text, nullable=False),
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("key_id", sa.Text, nullable=False),
        sa.Column("key_name", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("stream", sa.Boolean, nullable=False),
        sa.Column("prompt", sa.Text),
        sa.Column("started_at", sa.Double, nullable=False),
        sa.Column("ended_at", sa.Double),
        sa.Column("status", sa.Integer),
        sa.Column("error", sa.Text),
        sa.Column("instance", sa.Text),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("reasoning_tokens", sa.BigInteger, nullable=False),
        sa.Column("queued", sa.Double),
        sa.Column("first_token", sa.Double),
        sa.Column("duration", sa.Double),
    )
    op.create_index("ix_requests_started_at", "requests", ["started_at"])
    op.create_index("ix_requests_key_id", "requests", ["key_id", "id"])
    is_open = sa.text("ended_at IS NULL")
    op.create_index("ix_requests_open", "requests", ["key_id"], sqlite_where=is_open, postgresql_where=is_open)
    for name in ("usage_hours", "usage_days"):
        _create_sums(name)


def _create_sums(name: str) -> None:
    op.create_table(
        name,
        sa.Column("key_id", sa.Text, primary_key=True),
        sa.Column("start", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("key_name", sa.Text, nullable=False),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.Column("errors", sa.BigInteger, nullable=False),
        sa.Column("aborted", sa.BigInteger, nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("cached_tokens", sa.BigInteger, nullable=False),
        sa.Column("completion_tokens", sa.BigInteger, nullable=False),
        sa.Column("reasoning_tokens", sa.BigInteger, nullable=False),
        sa.Column("seconds", sa.Double, nullable=False),
        sa.Column("queued_seconds", sa.Double, nullable=False),
        sa.Column("queued_count", sa.BigInteger, nullable=False),
        sa.Column("first_token_seconds", sa.Double, nullable=False),
        sa.Column("first_token_count", sa.BigInteger, nullable=False),
    )
    op.create_index(f"ix_{name}_start", name, ["start"])
