"""Command `llm-api-server`. Each module holds the commands of one subject, and how their results are printed."""
