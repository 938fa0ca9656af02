"""Manifests that ship with Mantle, as readable YAML, and the function that fills them."""
