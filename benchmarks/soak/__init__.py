"""Load on a real server, with every answer checked."""
