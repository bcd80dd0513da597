"""Training: the step, the epochs, the loop around them, and what is done with a finished student."""
