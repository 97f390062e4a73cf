"""PackCache."""
