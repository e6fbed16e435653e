"""Many runs in one compiled program, and what they say about learning rates."""
