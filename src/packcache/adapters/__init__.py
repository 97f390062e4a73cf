"""The same cache in other people's models; nothing here is imported unless it is asked for."""
