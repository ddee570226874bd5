"""What every request passes before its route: limits, authentication, permissions, quotas, metrics."""
