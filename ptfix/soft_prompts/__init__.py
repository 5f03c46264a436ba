"""Soft prompts: what they are, and how they are generated with and trained. `proof` holds what judges that."""
