"""The ways to compute a function of tensors: as written, vectorised, traced, in chunks, as a CUDA graph."""
