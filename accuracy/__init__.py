"""Two runs → where and how much they differ → verdict."""
