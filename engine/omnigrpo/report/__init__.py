"""The page and the picture that a run leaves behind."""
