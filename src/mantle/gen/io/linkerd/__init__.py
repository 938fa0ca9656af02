"""Generated from proto/ by tools/gen.py: do not edit."""
