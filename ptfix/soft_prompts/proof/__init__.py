"""Is a soft prompt right? The truth about it, and everything that compares with the truth."""
