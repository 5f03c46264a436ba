"""Sequence length: what a model can take, how to lengthen it step by step, what of its manners is kept."""
