"""The one exception that means: the user can mend this."""


class UserError(ValueError):
    """A mistake in a config, a file or a flag.

    Its message is one sentence that names the value, what would be allowed and the
    fix. The command line prints it without a stack trace and exits with 1.
    """


class StoppedError(UserError):
    """A run was asked to stop; it is saved, and goes on when it is started again."""
