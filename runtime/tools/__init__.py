"""What the agent can do besides talk: functions, MCP servers, documents, the web, a sandboxed Python."""
