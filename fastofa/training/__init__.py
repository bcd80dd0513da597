"""Training (step, epochs and loop), and evaluation, export and prediction with a trained student."""
