"""How the tables came to be, in steps: Alembic's revisions. Imported only when a database is behind."""
