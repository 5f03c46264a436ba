"""Chat templates: which one a checkpoint should carry, and putting it there for every reader."""
