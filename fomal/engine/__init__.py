"""How a function of tensors is computed: as written, vectorised, traced, in chunks, as a CUDA graph."""
