"""Jobs: runs that the board starts. Each has a folder, and a supervisor that outlives the board."""
