"""Generated clips: a drawn face and a synthesised voice that carry an emotion only together."""
