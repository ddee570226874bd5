"""What tests of several folders need: waiting, stalls, a played turn, a fake engine, a PostgreSQL cluster."""
