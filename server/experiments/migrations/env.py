"""Run by Alembic, on the connection that `Database.migrate` has locked."""

from __future__ import annotations

from alembic import context

from server.experiments.database import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
)
with context.begin_transaction():
    context.run_migrations()
