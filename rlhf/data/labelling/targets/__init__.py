"""Tasks as the files of labelling tools, and labels read back."""
