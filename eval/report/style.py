"""How report.html looks: for light and dark screens, and for paper."""

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #f2f4f7;
  --line: #c9d0d8; --link: #1f5fa8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --paper: #14171b; --soft: #20252b;
  --line: #454d57; --link: #8fbcf5; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  margin: 0 auto; max-width: 72rem; padding: 1rem 1.25rem 4rem; }
h1, h2 { line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
a { color: var(--link); }
nav ul { display: flex; flex-wrap: wrap; gap: 0 1.25rem; list-style: none; padding: 0; }
p { overflow-wrap: anywhere; white-space: pre-wrap; max-width: 60rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .75rem 0; }
caption { text-align: left; font-weight: 600; padding: .25rem 0; }
th, td { border: 1px solid var(--line); padding: .3rem .6rem; text-align: left;
  vertical-align: top; }
th { background: var(--soft); }
tbody th { font-weight: 500; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td bdi, th bdi { white-space: pre-wrap; overflow-wrap: anywhere; }
figure { margin: 1.25rem 0; }
figcaption { font-weight: 600; }
img { max-width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line); }
@media print { .wide { overflow: visible; } figure, tr { break-inside: avoid; } }
"""
