"""Four real models, each in PyTorch and in JAX, trained by torch.optim, interop.optim and jopt."""
