"""The one exception that means "the input is wrong, not the program"; it is shown as one line, exit code 2."""


class InputError(ValueError):
    """Wrong input from the user; the message says in one line what is wrong and what to do."""
