"""What a command tells a person in one line: what was found, what was expected, what to do."""


class MimoError(Exception):
    """Something in a file, a model or the machine is wrong. Commands print it and exit with 1."""

    exit_code = 1


class FormatError(MimoError):
    """A file or a config is not what it should be; the message begins with its name."""


class UsageError(MimoError):
    """The command line or an argument is wrong. Commands print it and exit with 2."""

    exit_code = 2
