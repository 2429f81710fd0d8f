"""For processes that tests start: they see no torch, as after the base install, and are up a third sooner."""

import sys

if "pytest" not in sys.orig_argv:
    sys.modules["torch"] = None
