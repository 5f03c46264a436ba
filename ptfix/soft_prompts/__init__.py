"""Soft prompts: what they are, how they are generated with and trained, and what the truth about them is."""
