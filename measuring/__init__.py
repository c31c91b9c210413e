"""A folder measured: how fast it runs, and what it holds."""
