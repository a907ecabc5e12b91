"""Alembic's migrations of the experiments' database, run at start and by
`pilothouse experiments migrate`. A change of tables in database.py is a new file in versions/; a
test compares the two."""
