"""What people look at: curves, confusion, the page of a run."""
