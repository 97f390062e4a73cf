"""Seeing: the same clip under several policies, as a picture, a report and plain numbers."""
