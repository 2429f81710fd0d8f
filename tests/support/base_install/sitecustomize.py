"""For processes that tests start: they see no torch, as after the base install, and are up a third sooner."""

import gc
import sys

if "pytest" not in sys.orig_argv:
    sys.modules["torch"] = None
    gc.set_threshold(20_000, 20, 20)  # as in conftest.py: a tenth of the time is that of the collector
