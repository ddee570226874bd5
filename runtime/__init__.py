"""Answers requests: the agent, its engine, the API and the command line. It imports memory and never trains."""
