"""The revisions of the database schema, in order; `upgrade` applies those that a database lacks."""
