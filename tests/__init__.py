"""The tests, and the commands that write their records."""
