"""Imported by every Python process of the tests: vLLM's processes sleep where they would spin.

They wait for each other in loops of ``sched_yield``. Two busy engines on two cores then starve everything else,
Linux 6.18 for seconds, and what the tests would measure is the scheduler.
"""

import os
import time

os.sched_yield = lambda: time.sleep(50e-6)
