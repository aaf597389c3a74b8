"""The command line: `app` holds the commands, and the other files one group of them each."""
