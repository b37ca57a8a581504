"""Rows: the truth about identities, projects, jobs, events and checkpoints. SQLite (embedded) or PostgreSQL, same code."""
