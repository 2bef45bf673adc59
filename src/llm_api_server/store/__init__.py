"""The store: keys made while the server runs, who changed them, and what was used. SQLAlchemy, nothing asynchronous."""
