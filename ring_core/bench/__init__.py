"""Variants measured side by side."""
