"""The agent's tools: Python functions, MCP servers, document search, web pages, sandboxed Python."""
