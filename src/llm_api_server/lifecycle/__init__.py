"""A running server seen from outside: its lock and port, its configuration, reload, restart and stop."""
