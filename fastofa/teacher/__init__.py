"""The teacher, and the cache that holds its predictions for every view."""
