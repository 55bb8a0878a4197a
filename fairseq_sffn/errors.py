"""How a command stops when it cannot do what was asked."""


class UsageError(SystemExit):
    """Ends the command with one line on stderr and exit status 1.

    It is a ``SystemExit``, so that no traceback hides the line and fairseq's ``except Exception``
    clauses do not replace it.
    """
