"""The database: keys, their audit trail, and usage. SQLAlchemy, nothing asynchronous."""
