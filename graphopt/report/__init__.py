"""What is reported of a run: plain records, and their rendering as text, on a terminal and as HTML."""
