"""No test reads or writes the tables of plans of whoever runs it."""

import os
import tempfile

os.environ["TRITON_GN_CACHE_DIR"] = tempfile.mkdtemp(prefix="triton-gn-tests-")
