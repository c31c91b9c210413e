"""Images on their way into a prompt: read, cut into tiles, encoded, put in their places."""
