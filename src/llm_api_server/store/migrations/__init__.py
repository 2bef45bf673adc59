"""Alembic's revisions of the tables. Imported only to upgrade an older database."""
