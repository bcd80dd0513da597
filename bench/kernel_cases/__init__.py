"""The cases of `bench.bench_kernels`: for each kernel, its sizes and the implementations to compare.

Shapes: B batch, C classes or channels, K classes kept of the teacher, S side.
"""
