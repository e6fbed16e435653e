"""Runs that move between torch and JAX: live, and in files."""
