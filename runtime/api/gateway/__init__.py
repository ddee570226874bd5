"""The middleware in front of every route: connection limits, origins, authentication, permissions, quotas, metrics."""
