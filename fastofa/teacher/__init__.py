"""The teacher, and the cache of its predictions for every view."""
