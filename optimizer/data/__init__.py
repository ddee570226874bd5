"""Training rows from trajectories, exact to the token."""
