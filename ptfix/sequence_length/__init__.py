"""How long a model's input may be and what the rows ask for; growing that length; noticing what it costs."""
