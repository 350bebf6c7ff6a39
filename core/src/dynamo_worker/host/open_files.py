"""The limit on open files, which counts connections too."""

from __future__ import annotations

import contextlib
import resource

#: Enough for any worker, and the default maximum of Linux (fs.nr_open). With a higher limit, old programs that close
#: every possible descriptor before they start another program would take long.
_MOST = 1 << 20


def raise_limit() -> None:
    """Raise the soft limit of this process and its future children to the hard limit.

    The usual soft limit of 1024 protects programs that use ``select()``, which accepts no larger descriptor. The
    runtime, the event loop and ZeroMQ do not use it, nor do the engines: vLLM's server and SGLang raise the limit, too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # Refused if fs.nr_open was lowered below the hard limit.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
