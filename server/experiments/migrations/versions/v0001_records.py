"""Answers and events."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "experiment_answers",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("experiment", sa.Text, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("arm", sa.Text, nullable=False),
        sa.Column("unit", sa.Text, nullable=False),
        sa.Column("sticky", sa.Boolean, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("pair", sa.Text, nullable=False),
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("profile", sa.Text, nullable=False),
        sa.Column("fingerprint", sa.Text, nullable=False),
        sa.Column("strength", sa.Double),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("weights", sa.Text, nullable=False),
        sa.Column("prompt_class", sa.Text, nullable=False),
        sa.Column("benign_probability", sa.Double),
        sa.Column("refusal_score", sa.Double),
        sa.Column("answer_probability", sa.Double),
        sa.Column("outcome", sa.Text),
        sa.Column("judge", sa.Text, nullable=False),
        sa.Column("finish_reason", sa.Text, nullable=False),
        sa.Column("prompt_tokens", sa.Integer, nullable=False),
        sa.Column("completion_tokens", sa.Integer, nullable=False),
        sa.Column("ttft_seconds", sa.Double),
        sa.Column("duration_seconds", sa.Double, nullable=False),
        sa.Column("prompt", sa.Text),
        sa.Column("reply", sa.Text),
    )
    op.create_index("ix_experiment_answers_time", "experiment_answers", ["time"])
    op.create_index(
        "ix_experiment_answers_order", "experiment_answers", ["experiment", "version", "time", "id"]
    )
    op.create_table(
        "experiment_events",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("time", sa.Double, nullable=False),
        sa.Column("experiment", sa.Text, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("kind", sa.Text, nullable=False),
        sa.Column("arm", sa.Text),
        sa.Column("detail", sa.JSON, nullable=False),
    )
    op.create_index(
        "ix_experiment_events_order", "experiment_events", ["experiment", "version", "time", "id"]
    )


def downgrade() -> None:
    op.drop_table("experiment_events")
    op.drop_table("experiment_answers")
