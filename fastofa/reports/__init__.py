"""Human-readable reports of a run: curves, confusion matrix, HTML page."""
