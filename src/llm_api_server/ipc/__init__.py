"""The contract between workers, the manager and the command line: messages, framing, the run directory."""
