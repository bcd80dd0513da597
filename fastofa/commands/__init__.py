"""The commands. Each calls one function with its parsed arguments and prints the result."""
