"""What happens to the rows: kills, full disks, wrong clocks, two owners, and whose they are."""
