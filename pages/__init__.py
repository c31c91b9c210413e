"""Pages that people read: one template, pictures in light and dark, and the trend over many runs."""
