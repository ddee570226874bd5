"""Where rows are kept: the database in its two forms, its migrations, and the lock on the data directory."""
