"""The HTTP layer: listener, connections, admission, authentication and limits."""
