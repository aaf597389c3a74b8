"""Axes: how those of one operation relate, which shrink together, which are padded; and cutting them."""
