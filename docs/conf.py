"""How Sphinx builds these pages: Markdown by MyST, the theme Furo, nothing from a network."""

project = "rlhf-toolkit"
author = "the rlhf-toolkit contributors"
extensions = ["myst_parser"]
exclude_patterns = ["README.md"]
nitpicky = True  # a reference without a target is a warning, and `make docs` makes it an error

# A heading is a target: page.md#the-heading.
myst_heading_anchors = 3

html_theme = "furo"
html_title = "rlhf-toolkit"
html_copy_source = False
html_use_index = False
html_show_sphinx = False
