"""How long a model's input may be, what the training rows ask for, and whether both modes agree about it."""
