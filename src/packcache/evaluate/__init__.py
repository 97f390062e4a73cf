"""Quality of clips: what they show against what is true."""
