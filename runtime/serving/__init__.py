"""Which policy serves: activation, draining, and pauses of the engine."""
