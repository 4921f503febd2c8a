"""The one exception that means "the input is wrong, not the program": its text is shown as a single line, exit code 2."""


class InputError(ValueError):
    """Wrong input from the user; the message says in one line what is wrong and what to do."""
