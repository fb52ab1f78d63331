"""The ways a run ends on purpose: the input is unusable, a gate said no, or the disk is full."""

import errno
import re

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room, none left of one's quota, none below `ulimit -f`
IN_WORDS = re.compile(rf"(?:os error |\[[Ee]rrno )({'|'.join(map(str, FULL))})\b")


class UserError(ValueError):
    """Something the user can mend. One line: what was found, what was expected, what to do."""


class GateFailed(Exception):
    """A gate's verdict is FAIL. The message names the gate, the metric and both numbers."""


def disk_full(error: BaseException | None) -> bool:
    """Whether a write failed for want of room. shutil and what is written in Rust say so in words alone."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:  # a chain of causes may lead back to its start
        if getattr(error, "errno", None) in FULL or IN_WORDS.search(str(error)):
            return True
        seen.append(error)
        error = error.__cause__
    return False
