"""The devices of this host, and how much memory each has and holds."""
