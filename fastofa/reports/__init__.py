"""Reports of a run for people: curves, confusion matrix, the HTML page."""
