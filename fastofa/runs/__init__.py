"""A run: its configuration, recipe, folder, checkpoints and log."""
