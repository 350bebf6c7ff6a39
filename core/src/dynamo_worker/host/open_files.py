"""The limit of open files, which counts connections too."""

from __future__ import annotations

import contextlib
import resource

#: More than this nobody needs, and programs that close every number up to the limit, as old ones do before they start
#: another, would take long. It is also what Linux allows by default (fs.nr_open).
_MOST = 1 << 20


def raise_limit() -> None:
    """Raise the soft limit of this process, and of those it starts, to the hard one.

    The usual soft limit of 1024 is kept low for programs that use ``select()``, which takes no larger descriptor. The
    runtime, the event loop and ZeroMQ do not, nor do the engines' own processes: vLLM's server and SGLang raise it
    for theirs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # Refused where the hard limit is above fs.nr_open, which was lowered later.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
