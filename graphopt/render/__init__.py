"""Reports, diffs and tables for people: text (plain, 100 columns), terminal (rich) and html (one page)."""
