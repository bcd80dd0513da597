"""What several benchmarks share: steps, loaders and images to time, the clock, the record."""
