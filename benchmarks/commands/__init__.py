"""The command of each benchmark: its arguments, and what it runs."""
