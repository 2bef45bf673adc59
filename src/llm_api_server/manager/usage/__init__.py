"""Usage and keys of the database, written and read for all workers."""
