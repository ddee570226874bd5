"""The database in SQLite or PostgreSQL, its migrations, and the lock on the data directory."""
