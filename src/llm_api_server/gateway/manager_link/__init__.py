"""A worker's connection to the manager, and what it keeps of the manager's decisions."""
