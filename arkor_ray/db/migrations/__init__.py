"""The schema's history, for alembic; applied by `Database.migrate()`."""
