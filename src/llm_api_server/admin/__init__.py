"""Management of keys and reports of usage, shared by the command line and the admin API."""
