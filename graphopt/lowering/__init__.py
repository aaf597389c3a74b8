"""What a target is: its contract with the core, measured choices of forms, and a result that is never slower."""
