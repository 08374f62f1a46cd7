"""Adapters on disk: written whole or not at all, read from the file alone."""
