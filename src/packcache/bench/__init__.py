"""How long it takes, beside what the operations say and what is possible."""
