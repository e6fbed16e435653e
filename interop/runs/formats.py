"""The formats of checkpoint files, by name and by suffix; apart, for the command line to know without torch or JAX."""

FORMATS = ("torch", "safetensors", "orbax", "dcp", "trainer")
SUFFIXES = {
    ".pt": "torch",
    ".pth": "torch",
    ".bin": "torch",
    ".ckpt": "torch",
    ".safetensors": "safetensors",
    ".orbax": "orbax",
    ".dcp": "dcp",
}
