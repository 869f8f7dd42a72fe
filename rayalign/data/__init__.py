"""Data sets as prompts and examples."""
