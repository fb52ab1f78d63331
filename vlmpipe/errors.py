"""The two ways a run ends on purpose: the input is unusable, or a gate said no."""


class UserError(ValueError):
    """Something the user can mend. One line: what was found, what was expected, what to do."""


class GateFailed(Exception):
    """A gate's verdict is FAIL. The message names the gate, the metric and both numbers."""
