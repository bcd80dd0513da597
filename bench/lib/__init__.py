"""Code that several benchmarks share: steps, loaders and images to time, timing, records."""
