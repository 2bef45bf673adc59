"""A running server seen from outside: its lock, its configuration, reload, restart and stop."""
