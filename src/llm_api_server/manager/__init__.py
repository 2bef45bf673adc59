"""The manager process: loads models, schedules requests, counts usage."""
