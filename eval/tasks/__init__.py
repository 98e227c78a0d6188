"""Tasks that policies are measured on: rows, how they are asked, and what is counted."""
