"""Commands and servers that answer questions about audio."""
