"""How the tables came to be, one ordered revision at a time; `upgrade` runs those that a file has not seen."""
