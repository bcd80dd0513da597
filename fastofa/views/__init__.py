"""Views: every augmentation of every image, drawn up front as a table."""
